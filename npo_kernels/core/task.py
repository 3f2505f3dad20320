"""`Task`: a call after compaction, with its backend; and the plan for it."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.core.backend import Backend
from npo_kernels.core.layout import Rows
from npo_kernels.core.lm_head import Head
from npo_kernels.core.matmul import result_bytes
from npo_kernels.core.plan import Plan, Scratch, default_workspace, grad_slices, make_plan
from npo_kernels.core.vocab_parallel import Shard, clip

# The bias is treated as the weight of a constant feature 1. The feature is repeated 8 times, because matrix products
# need aligned rows.
BIAS_COLUMNS = 8


class Needs(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True)
class Task:
    """One call: the batch, the head, the scored rows, and which gradients are needed."""

    hidden: Tensor  # (T, H)
    head: Head
    rows: Rows  # targets in columns of the head
    needs: Needs
    backend: Backend
    shard: Shard | None = None  # set if the head is this rank's shard of a vocabulary-parallel one
    # True if gradients are computed before the upstream gradient is known. float16 would then underflow before the loss
    # scale can help, so dHidden and dBias stay in float32, and each row of dWeight gets a power of two as its unit.
    upstream_later: bool = False

    @property
    def wide_dtype(self) -> torch.dtype:
        """Dtype of dHidden and dBias."""
        dtype = self.hidden.dtype
        return torch.float32 if self.upstream_later and dtype == torch.float16 else dtype

    @property
    def gathers(self) -> bool:
        """Whether `gather` copies: not every position is scored, or the host does not know (num_rows was passed)."""
        return self.rows.index.shape[0] != self.hidden.shape[0] or self.rows.host_starts is None

    def gather(self) -> Tensor:
        """(N, H) hidden states of the scored rows; padding rows are 0, even if hidden is NaN at their index."""
        if not self.gathers:
            return self.hidden
        return self.backend.gather_rows(self.hidden, self.rows)

    def plan(
        self,
        workspace_bytes: int | None,  # the caller's limit
        gradient_in_forward: bool,
        separable: bool = True,
        summed: bool = False,
        scratch: Scratch | None = None,  # by default that of `exp_logits` and related primitives
        beside: int = 0,  # bytes that the caller itself holds
    ) -> Plan:
        """`make_plan` with the sizes of this task. Ranks that share a head all use the plan of the largest shard."""
        num_rows, hidden_size = self.rows.index.shape[0], self.hidden.shape[1]
        local_size = self.head.weight.shape[0]
        vocab_size = local_size if self.shard is None else max(self.shard.sizes)
        # a separate backward has no host_starts, so its `gather` copies
        copied = self.gathers or (self.needs.any and not gradient_in_forward)
        # KL and the statistics pass their own scratch; `describe` is about the kernels of the others
        blocks = self.backend.describe(self.hidden) if scratch is None else ""
        if scratch is None:
            scratch = self.backend.scratch(self.hidden, num_rows, vocab_size, self.head.softcap is not None)
        held = num_rows * hidden_size * self.hidden.itemsize if copied else 0
        if self.needs.any:
            held += result_bytes(self.hidden, max(num_rows, vocab_size), hidden_size)
        if self.shard is not None:
            held += num_rows * self.shard.row_bytes(self.backend.block_v(self.hidden), hidden_size)
        plan = make_plan(
            num_rows=num_rows,
            host_starts=self.rows.host_starts,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            weight_itemsize=self.head.weight.itemsize,
            slab_itemsize=self.backend.slab_dtype(self.hidden).itemsize,
            block_v=self.backend.block_v(self.hidden),
            need_hidden=self.needs.hidden,
            need_head=self.needs.head,
            bias_columns=BIAS_COLUMNS if self.needs.bias else 0,
            gradient_in_forward=gradient_in_forward,
            limit=default_workspace(self.hidden.device) if workspace_bytes is None else workspace_bytes,
            bound=workspace_bytes is not None,
            separable=separable,
            summed=summed,
            grad_slices=grad_slices(hidden_size, self.hidden.device),
            held_bytes=beside + held,
            scratch=scratch,
            blocks=blocks,
        )
        return plan if self.shard is None else replace(plan, slices=clip(plan.slices, local_size))
