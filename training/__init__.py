"""TOFU-style unlearning with `npo_kernels`, from data to figures. Run from the checkout: `python -m training.demo`."""
