"""A file for each stage with `units(context)`, the most valuable units first."""
