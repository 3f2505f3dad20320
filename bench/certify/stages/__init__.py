"""One file a stage: `units(context)`, in the order in which they are worth having."""
