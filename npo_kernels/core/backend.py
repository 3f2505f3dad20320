"""The interface of a backend: every primitive with its shapes, dtypes and the PyTorch code that it replaces.

`npo_kernels.backends` has two modules that implement it. The Protocol is defined here, beside the code that uses it, so
that nothing in `core` imports a backend.

Notation: n is the number of rows (scored positions) in a call, x (n, H) are their hidden states in the dtype of the
head, and

    z = logits = softcap * tanh(logit_scale * (x @ weight.T + bias) / softcap)          # (n, V) float32, never kept
    slope = 1 - (z / softcap) ** 2                                                      # 1 without a softcap

Row vectors (n,), sums and products are float32. n = 0 is allowed everywhere.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from npo_kernels.core.formulas import RatioLoss
from npo_kernels.core.layout import Rows
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.row_moments import GradientRows, Moments
from npo_kernels.core.softmax_stats import Divergence, Lowered, Statistics


class Backend(Protocol):
    """A module with these functions is a backend."""

    def block_v(self, x: Tensor) -> int:
        """Columns of one partial sum. A vocabulary slice that is summed must start at a multiple of it."""

    def slab_dtype(self, x: Tensor) -> torch.dtype:
        """Dtype of the stored exponentials; its products accumulate in float32 on the device of x."""

    def describe(self, x: Tensor) -> str:
        """One line about the kernels and tiles for operands like x, for `npo_kernels.explain`."""

    def scratch(self, x: Tensor, rows: int, vocab_size: int, capped: bool) -> Scratch:
        """Memory that the primitives (except those of KL) allocate beyond their results, for `rows` rows like x."""

    def kl_scratch(self, x: Tensor, head: Head, ref_x: Tensor, ref_head: Head) -> Scratch:
        """The same for `softmax_sums`, `kl_logits` and `kl_sums`, for all rows of x."""

    def compact(
        self,
        labels: Tensor,  # (B, S) if padded, (T,) if packed
        cu_seqlens: Tensor | None,  # (B+1,) int32 or int64 if packed
        shift: bool,
        vocab_size: int,
        ignore_index: int,
        num_rows: int | None,
    ) -> Rows:
        """The scored positions of a batch, in order.

        positions = layout.flatten(labels, cu_seqlens, shift, ignore_index)
        rows = layout.compact(*positions, vocab_size, ignore_index, num_rows)
        """

    def gather_rows(self, hidden: Tensor, rows: Rows) -> Tensor:
        """(N, H) hidden[rows.index] of hidden (T, H); 0 for padding rows (`layout.PADDING_ROW`)."""

    def target_logits(self, x: Tensor, head: Head, target: Tensor) -> Tensor:
        """(n,) z[i, target_i]; NaN where target_i == V, unspecified where it is negative.

        z.gather(1, target[:, None])[:, 0]
        """

    def empty_slab(self, x: Tensor, columns: tuple[int, int]) -> Tensor:
        """Uninitialized (n, end - begin) in slab_dtype, with rows aligned as the kernels need them."""

    def exp_logits(
        self,
        x: Tensor,
        head: Head,  # of the whole vocabulary
        target: Tensor,  # (n,)
        anchor: Tensor,  # (n,)
        columns: tuple[int, int],  # the vocabulary slice [begin, end), begin a multiple of block_v
        out: Tensor | None = None,  # slab to write and return; by default a new one
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(slab (n, end - begin) in slab_dtype, partial sums (blocks, n), final anchor (n,)).

            e = exp(z - anchor[:, None]).scatter(1, target[:, None], 0)[:, begin:end]
            slab, sums = e * slope, [block.sum(1) for block in e.split(block_v, 1)]

        If a logit exceeds the anchor of its row by more than `softmax_stats.anchor_headroom`, the anchor is raised, and
        slab and sums are relative to the raised anchor.
        """

    def exp_logits_at(
        self,
        x: Tensor,
        head: Head,
        target: Tensor,
        anchor: Tensor,
        columns: tuple[int, int],
        out: Tensor | None = None,
    ) -> Tensor:
        """The slab of `exp_logits` for an anchor that is already high enough; the slice may start anywhere."""

    def partial_sums(self, x: Tensor, head: Head, target: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """(partial sums (blocks, n), anchor (n,)) of `exp_logits` over all columns, without a slab."""

    def resum(self, x: Tensor, head: Head, target: Tensor, anchor: Tensor, raised: Tensor, parts: Tensor) -> None:
        """Recompute the partial sums `parts` (blocks, n) at `anchor`, in place, for the rows in `raised` (n,) bool."""

    def row_statistics(self, parts: Tensor, anchor: Tensor, target_logit: Tensor) -> Statistics:
        """`softmax_stats.row_statistics` from the partial sums (blocks, n)."""

    def softmax_sums(self, x: Tensor, head: Head, beside: Tensor, lowered: Lowered | None) -> tuple[Tensor, Tensor]:
        """(maxima, sums of exp(z - maximum)), (blocks, n) each, over all columns.

            z = z - shift * one_hot(target)             # lowered, if given; no column for a target outside [0, V)
            maximum, total = block.amax(1), exp(block - block.amax(1, keepdim=True)).sum(1)     # block of z

        The exponential of the lowered logit is computed as exp((z - maximum) - shift), so a rounding error of the
        maximum does no harm (`softmax_stats.Normalizers`). `beside` are the rows of the other model; with them the
        backend picks the blocks of `kl_logits`, so that the logits are bitwise equal in both.
        """

    def kl_logits(
        self,
        x: Tensor,
        head: Head,  # of the whole vocabulary, as is ref_head
        ref_x: Tensor,  # (n, H_ref)
        ref_head: Head,
        divergence: Divergence,
        columns: tuple[int, int],
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(slab (n, end - begin) in slab_dtype, partial sums (blocks, n)).

        p, q = softmax(z), softmax(ref_z - shift * one_hot(target))        # shift and target of divergence.lowered
        grad, terms = p - q, q * log(q / p) + p - q                        # summed over each block
        grad, terms = p * (log(p / q) - kl[:, None]), p * log(p / q) + q - p              # divergence.reverse
        slab, sums = (grad * slope)[:, begin:end], [block.sum(1) for block in terms.split(...)]
        """

    def kl_sums(self, x: Tensor, head: Head, ref_x: Tensor, ref_head: Head, divergence: Divergence) -> Tensor:
        """Partial sums (blocks, n) of `kl_logits` over all columns, without a slab; `divergence.kl` is not read."""

    def moment_scratch(self, x: Tensor, rows: int, vocab_size: int, capped: bool) -> Scratch:
        """Memory that `row_moments` and `moment_gradient` allocate beyond their results, for `rows` rows like x."""

    def row_moments(self, x: Tensor, head: Head, target: Tensor) -> Moments:
        """`row_moments.Moments` (blocks, n) of the logits, for blocks of any fixed width from left to right.

        maximum, argmax = block.max(1)
        e = exp(block - maximum[:, None]), 0 at the target
        total, first, second = (e * (block - maximum[:, None]) ** k).sum(1) for k = 0, 1, 2
        logits = block.sum(1)
        """

    def moment_gradient(
        self,
        x: Tensor,
        head: Head,  # of the whole vocabulary
        target: Tensor,  # (n,)
        rows: GradientRows,
        columns: tuple[int, int],  # the vocabulary slice, which may start anywhere
        out: Tensor | None = None,
    ) -> Tensor:
        """The slab (n, end - begin) in slab_dtype that `row_moments.GradientRows` describes, 0 at target and argmax.

        e, c = exp(z - rows.anchor), z - rows.anchor - rows.center
        slab = (e * (rows.constant + rows.linear * c + rows.square * c**2) + rows.flat) * slope
        """

    def scale_rows(self, x: Tensor, scale: Tensor, sign: float = 1.0) -> Tensor:
        """(n, H) sign * scale[:, None] * x, rounded once to slab_dtype; 0 for a row of scale 0, even if x is NaN."""

    def finish_hidden_grad(
        self,
        product: Tensor,  # (n, H) float32: slab @ weight
        row_coef: Tensor,  # (n,)
        target_coef: Tensor,  # (n,)
        head: Head,
        target: Tensor,  # (n,)
        index: Tensor,  # (n,) rows of `out`
        out: Tensor,  # (T, H)
    ) -> None:
        """out[index] = target_coef[:, None] * weight[target] - row_coef[:, None] * product, rounded once.

        A negative target has no target term, and a padding row (`layout.PADDING_ROW`) writes nothing.
        """

    def group_targets(self, target: Tensor) -> Any:
        """Prepare the targets (n,) for `add_targets` of the same backend, once for all slices."""

    def add_targets(self, grad: Tensor, x: Tensor, coef: Tensor, targets: Any, columns: tuple[int, int]) -> None:
        """Add the target terms to grad (end - begin, H) float32, for the targets in [begin, end).

        grad.index_add_(0, target - begin, coef[:, None] * x)
        """

    def scale_gradient(
        self, grad: Tensor, unit: Tensor | None, upstream: Tensor, dtype: torch.dtype, in_place: bool = False
    ) -> Tensor:
        """grad (rows, H) or (rows,) of any dtype, times unit (rows,) if given, times upstream (0-d).

        (grad.float() * (upstream.float() * unit)[:, None]).to(dtype)

        A new tensor; with `in_place`, the memory of grad if grad is contiguous and has this dtype.
        """

    def sequence_scale(
        self, num_tokens: Tensor, reduction: str, normalizer: Tensor | None, weights: Tensor | None = None
    ) -> Tensor:
        """(B,) `formulas.sequence_scale`."""

    def sequence_sums(self, values: Tensor, sequence: Tensor, starts: Tensor) -> Tensor:
        """(B,) sums of values (n,) over the rows [starts[s], starts[s+1]); padding rows belong to no sequence."""

    def coefficients(
        self,
        stats: Statistics,
        rows: Rows,
        grad_tokens: Tensor | None,  # (T,) upstream gradient of the token log-probabilities
        grad_logps: Tensor | None,  # (B,) upstream gradient of the sequence log-probabilities
        head: Head,
    ) -> tuple[Tensor, Tensor]:
        """(row_coef (n,), target_coef (n,)), 0 for padding rows.

        grad = grad_tokens[rows.index] + grad_logps[rows.sequence]
        row_coef, target_coef = softmax_stats.gradient_coefficients(stats, grad, head)
        """

    def ratio_epilogue(
        self,
        stats: Statistics,
        sequence: Tensor,  # (n,) sequence of each row, relative to the first of the chunk
        starts: Tensor,  # (B+1,) first row of each sequence, relative to the first of the chunk
        ratio: RatioLoss,  # for the sequences of the chunk
        head: Head,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(logps (B,), losses (B,), row_coef (n,), target_coef (n,)) of a chunk: sequence sums, loss, coefficients.

        logps = sequence_sums(stats.logp, sequence, starts)
        losses, grad = ratio.value_and_grad(logps)
        row_coef, target_coef = softmax_stats.gradient_coefficients(stats, grad[sequence], head)
        """
