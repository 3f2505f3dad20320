"""The grid of an experiment: forget sets x methods x seeds, and what it says about the NPO paper."""
