"""impl="triton": the primitives of `npo_kernels.core.backend` with the kernels of `csrc_triton`.

Plain matrix products use cuBLAS. The same code runs on CPU tensors in the Triton interpreter (set TRITON_INTERPRET=1
before the first import); this is how the tests check every kernel without a GPU. Only this package imports Triton.
"""

from npo_kernels.backends.triton.compaction import compact, gather_rows
from npo_kernels.backends.triton.exp_logits import (
    exp_logits,
    exp_logits_at,
    partial_sums,
    resum,
    row_statistics,
    scratch,
    target_logits,
)
from npo_kernels.backends.triton.launch import block_v, describe, empty_slab, slab_dtype
from npo_kernels.backends.triton.linear_kl import kl_logits, kl_scratch, kl_sums, softmax_sums
from npo_kernels.backends.triton.moments import moment_gradient, moment_scratch, row_moments
from npo_kernels.backends.triton.rows import (
    add_targets,
    coefficients,
    finish_hidden_grad,
    group_targets,
    ratio_epilogue,
    scale_gradient,
    scale_rows,
    sequence_scale,
    sequence_sums,
)

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
