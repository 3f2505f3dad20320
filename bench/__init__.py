"""The benchmark suite, run from the checkout: `python -m bench --help`."""
