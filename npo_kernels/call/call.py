"""The one description of a call: what the operators take, whatever the caller wrote.

The operators of torch take flat lists of tensors and numbers. `npo_kernels.ops.schema` reads those lists from the
records here: a field added here is an argument of every operator that takes the record, of its fake and its backward.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

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
    """A batch of sequences, flattened and shifted, and a head: log-probabilities of labels and losses of them."""

    hidden: Tensor  # (T, H)
    head: Head
    targets: Tensor  # (T,) int64, ignore_index where nothing is scored
    offsets: Tensor  # (B+1,) int64: sequence s owns the positions offsets[s] to offsets[s+1]
    ignore_index: int
    num_rows: int | None  # scored positions, or a bound above their number, if the caller knows
    execution: Execution

    @property
    def num_sequences(self) -> int:
        return self.offsets.shape[0] - 1


class KLCall(NamedTuple):
    """Positions of a model and of a reference, each with its head."""

    hidden: Tensor  # (T, H)
    head: Head
    ref_hidden: Tensor  # (T, H_ref)
    ref_head: Head
    counted: Tensor  # (T,) bool
    execution: Execution
