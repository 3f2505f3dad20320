"""The losses inside the forward of a Hugging Face model: `add_fused_unlearning_head`."""

from npo_kernels.hf.model import FusedUnlearningOutput, add_fused_unlearning_head

__all__ = ["FusedUnlearningOutput", "add_fused_unlearning_head"]
