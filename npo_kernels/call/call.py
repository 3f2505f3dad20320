"""`Call` and `KLCall`: the normalised description of a call, which the operators take as their argument.

Operators of torch take flat lists of tensors and numbers. `npo_kernels.ops.schema` derives these lists from the records
here, so a field added here becomes an argument of every operator that takes the record, of its fake and its backward.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from npo_kernels.core.layout import Positions, flatten
from npo_kernels.core.lm_head import Head
from npo_kernels.core.task import Needs
from npo_kernels.core.vocab_parallel import Shard


class Execution(NamedTuple):
    """How a call runs: backend, memory limit, ranks that share the head, and which gradients are needed."""

    impl: str  # "torch" | "triton"; or "reference", which never reaches an operator
    workspace_bytes: int | None  # the caller's limit, if any
    group: str | None  # name of the process group whose ranks share the head; None: the head is not sharded
    sizes: Sequence[int]  # number of vocabulary entries on each rank
    needs: Needs

    @property
    def shard(self) -> Shard | None:
        return None if self.group is None else Shard(self.group, tuple(self.sizes))


class Call(NamedTuple):
    """A batch of sequences and a head, for log-probabilities of the labels and losses of them."""

    hidden: Tensor  # (T, H)
    head: Head
    labels: Tensor  # int64: (B, S) if padded, with T = B S; (T,) if packed
    cu_seqlens: Tensor | None  # (B+1,) if packed
    shift: bool
    ignore_index: int
    num_rows: int | None  # number of scored positions or an upper bound, if the caller passed it
    execution: Execution

    @property
    def num_sequences(self) -> int:
        return self.labels.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def positions(self) -> Positions:
        """Targets of the T positions and offsets of the sequences."""
        return flatten(self.labels, self.cu_seqlens, self.shift, self.ignore_index)


class KLCall(NamedTuple):
    """Hidden states and heads of a model and of a reference, for their KL divergence."""

    hidden: Tensor  # (T, H)
    head: Head
    ref_hidden: Tensor  # (T, H_ref)
    ref_head: Head
    counted: Tensor  # (T,) bool, the mask
    labels: Tensor | None  # (T,) int64; None if target_shift is 0
    target_shift: float  # subtracted from the reference's logit at the label
    reverse: bool  # KL(model || reference) instead of KL(reference || model)
    execution: Execution
