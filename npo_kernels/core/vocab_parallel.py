"""Vocabulary parallelism: a head sharded along the vocabulary over the ranks of a process group.

Every rank has the same hidden states and labels, and its own rows of the head, in rank order. Exponentials are relative
to an anchor, so no running maximum is exchanged. The communication of a call is

    forward     target logits, from the rank that owns the label     one SUM all-reduce of N floats
                partial sums of the exponentials, and anchors        one all-gather of (splits + 1) N floats per rank
    backward    dHidden, the sum of the ranks' contributions         one SUM all-reduce of N H floats

dWeight and dBias stay on their rank. The partial sums are gathered instead of added, so that every rank reduces them in
the same order: all ranks get bitwise the same result, and that of the unsharded head if shards start at multiples of a
split. Anchors are gathered too, because they may differ between ranks after an overflow repair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from npo_kernels.core.layout import OTHER_RANK, PADDING_ROW, Rows
from npo_kernels.core.row_moments import Moments
from npo_kernels.core.softmax_stats import Statistics

if TYPE_CHECKING:  # some builds of torch have no distributed package
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """How the vocabulary is sharded. `group` is a name, because operators take strings but no process groups."""

    group: str
    sizes: tuple[int, ...]  # number of vocabulary entries on each rank

    @property
    def process_group(self) -> "dist.ProcessGroup":
        return dist.distributed_c10d._resolve_process_group(self.group)  # type: ignore[attr-defined,arg-type]

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the whole head."""
        return sum(self.sizes)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.process_group)

    def localize(self, rows: Rows) -> Rows:
        """The rows with targets relative to this rank's first vocabulary entry; OTHER_RANK for those of other ranks."""
        size, begin = self.sizes[self.rank], sum(self.sizes[: self.rank])
        target = rows.target - begin
        target = torch.where((target >= 0) & (target < size), target, OTHER_RANK)
        target = torch.where(rows.target == self.vocab_size, size, target)  # poisoned on every rank
        return replace(rows, target=torch.where(rows.target == PADDING_ROW, PADDING_ROW, target))

    def sum_owned(self, z: Tensor, target: Tensor) -> Tensor:
        """(n,) target logit of each row, from the rank that owns its label."""
        z = torch.where(target == OTHER_RANK, 0.0, z)
        dist.all_reduce(z, group=self.process_group)
        return z

    def sum(self, partial: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(partial, group=self.process_group)
        return partial

    def row_bytes(self, block_v: int, hidden_size: int) -> int:
        """Bytes per row that `gather` and the sum of dHidden need."""
        splits = [-(-size // block_v) + 1 for size in self.sizes]
        return 4 * (max(splits) * (len(splits) + 1) + 2 * sum(splits) + hidden_size) + 8 * 12 * (len(splits) + 1)

    def gather(self, parts: Tensor, anchor: Tensor, block_v: int) -> tuple[Tensor, Tensor]:
        """(partial sums of all ranks (splits, n), their common anchor (n,), the largest of all ranks)."""
        splits = [-(-size // block_v) for size in self.sizes]
        mine = parts.new_zeros(max(splits) + 1, parts.shape[1])
        mine[: parts.shape[0]] = parts
        mine[-1] = anchor
        received = [torch.empty_like(mine) for _ in self.sizes]
        dist.all_gather(received, mine, group=self.process_group)
        common = torch.stack([message[-1] for message in received]).amax(0)
        scaled = [m[:n] * torch.exp(m[-1] - common) for m, n in zip(received, splits, strict=True)]
        return torch.cat(scaled), common

    def gather_moments(self, whole: Moments) -> Moments:
        """Moments (ranks, n) of every rank's columns, float64; argmax int64, in columns of the whole head."""
        mine = torch.stack([value.double() for value in whole])  # column numbers are exact in float64
        received = [torch.empty_like(mine) for _ in self.sizes]
        dist.all_gather(received, mine, group=self.process_group)
        for rank, message in enumerate(received):
            message[1] += sum(self.sizes[:rank])
        maximum, argmax, total, first, second, logits = torch.stack(received, 1)
        return Moments(maximum, argmax.long(), total, first, second, logits)


def at_anchor(stats: Statistics, anchor: Tensor) -> Statistics:
    """The same statistics for exponentials stored relative to another anchor."""
    return replace(stats, anchor=anchor, prob_scale=stats.prob_scale * torch.exp(anchor - stats.anchor))


def local_head(
    weight: Tensor, bias: Tensor | None, process_group: "dist.ProcessGroup | None"
) -> tuple[Tensor, Tensor | None, Shard | None]:
    """(weight, bias, shard): this rank's part as plain tensors, and how the head is sharded.

    Without a process group the tensors are returned unchanged, with shard None. The shard sizes of a DTensor are known;
    for plain tensors the ranks exchange them, which costs a host sync on a GPU.
    """
    if process_group is None:
        return weight, bias, None
    if _is_dtensor(weight):
        _check_dtensor("lm_head_weight", weight, process_group)
        ranks, vocab_size = weight.device_mesh.size(), weight.shape[0]
        width = -(-vocab_size // ranks)  # as torch.chunk splits
        edges = [min(r * width, vocab_size) for r in range(ranks + 1)]
        sizes = tuple(b - a for a, b in pairwise(edges))
        weight = weight.to_local()
        if weight.shape[0] != sizes[dist.get_rank(process_group)]:
            raise ValueError(
                f"lm_head_weight: a DTensor of {vocab_size} rows on {ranks} ranks has {width} on each but the last, "
                f"got {weight.shape[0]} here; pass the local tensor of an uneven split instead"
            )
    else:
        mine = torch.tensor([weight.shape[0]], device=weight.device)
        received = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
        dist.all_gather(received, mine, group=process_group)
        sizes = tuple(int(size) for size in received)
    if _is_dtensor(bias):
        _check_dtensor("bias", bias, process_group)
        bias = bias.to_local()
    if min(sizes) == 0:
        raise ValueError(f"process_group: a rank has no vocabulary entry (sizes {sizes}): use fewer ranks")
    return weight, bias, Shard(process_group.group_name, sizes)


def _is_dtensor(value: Tensor | None) -> "TypeGuard[DTensor]":
    return type(value).__name__ == "DTensor"


def _check_dtensor(name: str, value: "DTensor", process_group: "dist.ProcessGroup") -> None:
    mesh, placements = value.device_mesh, value.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0) or mesh.get_group().group_name != process_group.group_name:
        raise ValueError(
            f"{name} is a DTensor {placements} on {mesh}: with process_group it has to be split along the vocabulary, "
            "(Shard(0),) on the mesh of that group (process_group=mesh.get_group()); redistribute() it, or unshard it"
        )


def clip(slices: Sequence[tuple[int, int]], vocab_size: int) -> tuple[tuple[int, int], ...]:
    """Clip vocabulary slices that were planned for the largest shard to a smaller shard."""
    return tuple((begin, min(end, vocab_size)) for begin, end in slices if begin < vocab_size)
