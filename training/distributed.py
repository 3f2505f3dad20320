"""Several processes, as `accelerate launch` starts them, on the batches of one.

Every process draws the same batches from the same seed and computes every n-th row of each. Wrappers average gradients
over processes, so what is a sum over the rows of a process is divided by (total of the whole batch) / n: the step is
that of one process on the whole batch, up to rounding, however ragged the shares are.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, reduce
from torch import Tensor

from training.data import IGNORE_INDEX, Example

Value = TypeVar("Value")


def start(device: str) -> None:
    """Join the other processes, if there are any: on a CPU where that is asked for, or all there is."""
    PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())


def is_main() -> bool:
    return PartialState().is_main_process


def count() -> int:
    return PartialState().num_processes


def index() -> int:
    return PartialState().process_index


def on_main(write: Callable[[], object]) -> None:
    """Run by one process, which alone prints and writes files, while the others wait."""
    if is_main():
        write()
    PartialState().wait_for_everyone()


def parts(members: list[int], size: int | None = None) -> list[list[int]]:
    """This process's share of a batch, in pieces of `size` (None: in one). As many in every process, which wait for
    each other: where there are fewer rows than processes some pieces are empty."""
    n = count()
    mine, largest = members[index() :: n], -(-len(members) // n)
    size = size or largest
    return [mine[i : i + size] for i in range(0, largest, size)]


def rows(examples: Sequence[Example], part: list[int], members: list[int]) -> list[Example]:
    """The examples of a piece; of an empty one the batch's first with nothing to score."""
    if part:
        return [examples[i] for i in part]
    first = examples[members[0]]
    return [Example(first.input_ids, [IGNORE_INDEX] * len(first.labels))]


def share(examples: Sequence[Example], members: list[int]) -> tuple[list[int], list[Example]]:
    """(indices, examples) of this process's part of a batch, in one piece."""
    (mine,) = parts(members)
    return mine or members[:1], rows(examples, mine, members)


def total(values: Tensor) -> Tensor:
    """The sum over processes."""
    return reduce(values, "sum")


def wait() -> None:
    """For all processes."""
    PartialState().wait_for_everyone()


def any_of(flag: bool) -> bool:
    """Whether it is set in any process."""
    if count() == 1:
        return flag
    return bool(total(torch.tensor(float(flag), device=PartialState().device)).item())


def largest(number: int) -> int:
    """Of all processes."""
    return int(gather(torch.tensor([number], device=PartialState().device)).max())


def from_main(value: Value) -> Value:
    """What the main process has there, in all of them."""
    values = [value]
    if count() > 1:
        broadcast_object_list(values)
    return values[0]
