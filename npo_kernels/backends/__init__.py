"""The primitives of `npo_kernels.core.execute`, once in plain PyTorch and once on the Triton kernels."""
