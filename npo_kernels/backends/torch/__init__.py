"""impl="torch": the primitives of `npo_kernels.core.backend` in PyTorch, for CPU, MPS and GPUs without Triton.

KL and token statistics combine a few numbers per row in float64. MPS has no float64, so they do not run there.
"""

from npo_kernels.backends.torch.blocks import block_v, describe, empty_slab, slab_dtype
from npo_kernels.backends.torch.compaction import compact, gather_rows
from npo_kernels.backends.torch.exp_logits import (
    exp_logits,
    exp_logits_at,
    partial_sums,
    resum,
    scratch,
    target_logits,
)
from npo_kernels.backends.torch.linear_kl import kl_logits, kl_scratch, kl_sums, softmax_sums
from npo_kernels.backends.torch.moments import moment_gradient, moment_scratch, row_moments
from npo_kernels.backends.torch.rows import (
    add_targets,
    coefficients,
    finish_hidden_grad,
    group_targets,
    ratio_epilogue,
    scale_gradient,
    scale_rows,
    sequence_sums,
)
from npo_kernels.core.formulas import sequence_scale
from npo_kernels.core.softmax_stats import row_statistics

__all__ = [
    "add_targets",
    "block_v",
    "coefficients",
    "compact",
    "describe",
    "empty_slab",
    "exp_logits",
    "exp_logits_at",
    "finish_hidden_grad",
    "gather_rows",
    "group_targets",
    "kl_logits",
    "kl_scratch",
    "kl_sums",
    "moment_gradient",
    "moment_scratch",
    "partial_sums",
    "ratio_epilogue",
    "resum",
    "row_moments",
    "row_statistics",
    "scale_gradient",
    "scale_rows",
    "scratch",
    "sequence_scale",
    "sequence_sums",
    "slab_dtype",
    "softmax_sums",
    "target_logits",
]
