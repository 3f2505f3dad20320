"""The primitives of `npo_kernels.core.backend`, implemented twice: in plain PyTorch and with Triton kernels."""
