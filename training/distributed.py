"""Several processes, started by `accelerate launch`, that share the batches of one.

Every process draws the same batches from the same seed and computes every n-th row of each. Wrappers average gradients
over processes, so a sum over the rows of a process is divided by (total of the whole batch) / n: the step equals that
of one process on the whole batch, up to rounding, even if the shares differ in size.
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
    """Join the other processes, if any. On a CPU if `device` says so or there is no accelerator."""
    PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())


def is_main() -> bool:
    return PartialState().is_main_process


def count() -> int:
    return PartialState().num_processes


def index() -> int:
    return PartialState().process_index


def on_main(write: Callable[[], object]) -> None:
    """Call `write` in the main process only, while the others wait. Only the main process prints and writes files."""
    if is_main():
        write()
    PartialState().wait_for_everyone()


def parts(members: list[int], size: int | None = None) -> list[list[int]]:
    """This process's share of a batch, in pieces of `size` (None: in one piece).

    Every process gets the same number of pieces, as they wait for each other. With fewer rows than processes, some
    pieces are empty.
    """
    n = count()
    mine, largest = members[index() :: n], -(-len(members) // n)
    size = size or largest
    return [mine[i : i + size] for i in range(0, largest, size)]


def rows(examples: Sequence[Example], part: list[int], members: list[int]) -> list[Example]:
    """The examples of a piece. For an empty piece: the first example of the batch with nothing to score."""
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
    """Wait for all processes."""
    PartialState().wait_for_everyone()


def any_of(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if count() == 1:
        return flag
    return bool(total(torch.tensor(float(flag), device=PartialState().device)).item())


def largest(number: int) -> int:
    """The largest number over all processes."""
    return int(gather(torch.tensor([number], device=PartialState().device)).max())


def from_main(value: Value) -> Value:
    """The value of the main process, in every process."""
    values = [value]
    if count() > 1:
        broadcast_object_list(values)
    return values[0]
