"""Certifying a GPU in a given time: `python -m bench certify`, which begins in command.py."""
