"""One call as the modes see it: rows compacted, a backend chosen; and the plan that it gets."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npo_kernels.core.backend import Backend
from npo_kernels.core.layout import DEAD_ROW, Rows
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Plan, make_plan
from npo_kernels.core.vocab_parallel import Shard, clip


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

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
    """One call: the batch, the head, the scored rows, and which gradients are wanted."""

    hidden: Tensor  # (T, H)
    head: Head
    rows: Rows  # targets counted from the first column of the head
    needs: Needs
    backend: Backend
    shard: Shard | None = None  # the head is this rank's part of one that a process group shares
    # The gradients are formed before the upstream gradient is known. float16 would lose the small ones, which a loss
    # scale is there to save: so dHidden and dBias stay in float32, and each row of dWeight has a power of two as unit.
    upstream_later: bool = False

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of dHidden and dBias."""
        dtype = self.hidden.dtype
        return torch.float32 if self.upstream_later and dtype == torch.float16 else dtype

    def gather(self) -> Tensor:
        """(N, H) the scored rows; filling rows are zero, whatever the position they point at holds."""
        rows = self.rows
        if rows.index.shape[0] == self.hidden.shape[0] and rows.host_starts is not None:
            return self.hidden
        x = self.hidden[rows.index]
        return x if rows.host_starts is not None else x.masked_fill_((rows.target == DEAD_ROW).unsqueeze(1), 0)

    def plan(self, limit: int, gradient_in_forward: bool, separable: bool = True) -> Plan:
        """`make_plan` with the sizes of this task; ranks that share a head agree on the plan of the largest part."""
        vocab_size = self.head.weight.shape[0]
        plan = make_plan(
            num_rows=self.rows.index.shape[0],
            host_starts=self.rows.host_starts,
            hidden_size=self.hidden.shape[1],
            vocab_size=vocab_size if self.shard is None else max(self.shard.sizes),
            weight_itemsize=self.head.weight.itemsize,
            slab_itemsize=self.backend.slab_dtype(self.hidden).itemsize,
            block_v=self.backend.block_v(self.hidden),
            need_hidden=self.needs.hidden,
            need_head=self.needs.head,
            gradient_in_forward=gradient_in_forward,
            limit=limit,
            separable=separable,
        )
        return plan if self.shard is None else replace(plan, slices=clip(plan.slices, vocab_size))
