"""The one description of a call: what the operators take, whatever the caller wrote.

The operators of torch take flat lists of tensors and numbers. `npo_kernels.ops.schema` reads those lists from the
records here: a field added here is an argument of every operator that takes the record, of its fake and its backward.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from npo_kernels.core.layout import Positions, flatten
from npo_kernels.core.lm_head import Head
from npo_kernels.core.task import Needs
from npo_kernels.core.vocab_parallel import Shard


class Execution(NamedTuple):
    """How a call runs: the backend, the memory, the ranks that share the head, and which gradients are formed."""

    impl: str  # "torch" | "triton", or "reference", which no operator sees
    workspace_bytes: int | None  # a bound, if the caller gave one
    group: str | None  # name of the process group whose ranks share the head; None: the whole head is here
    sizes: Sequence[int]  # vocabulary entries of each rank
    needs: Needs

    @property
    def shard(self) -> Shard | None:
        return None if self.group is None else Shard(self.group, tuple(self.sizes))


class Call(NamedTuple):
    """A batch of sequences and a head: log-probabilities of labels and losses of them."""

    hidden: Tensor  # (T, H)
    head: Head
    labels: Tensor  # (B, S) int64 of a padded batch, T = B S; (T,) of a packed one
    cu_seqlens: Tensor | None  # (B+1,) of a packed batch
    shift: bool
    ignore_index: int
    num_rows: int | None  # scored positions, or a bound above their number, if the caller knows
    execution: Execution

    @property
    def num_sequences(self) -> int:
        return self.labels.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def positions(self) -> Positions:
        """Targets and offsets of the T positions."""
        return flatten(self.labels, self.cu_seqlens, self.shift, self.ignore_index)


class KLCall(NamedTuple):
    """Positions of a model and of a reference, each with its head."""

    hidden: Tensor  # (T, H)
    head: Head
    ref_hidden: Tensor  # (T, H_ref)
    ref_head: Head
    counted: Tensor  # (T,) bool
    labels: Tensor | None  # (T,) int64, where target_shift is not 0
    target_shift: float  # by which the reference's logit at the label is lowered
    reverse: bool  # KL(model || reference)
    execution: Execution
