"""Several processes, as `accelerate launch` starts them, on the batches of one.

Every process draws the same batches from the same seed and computes every n-th row of each. Wrappers average gradients
over processes, so what is a sum over the rows of a process is divided by (total of the whole batch) / n: the step is
that of one process on the whole batch, up to rounding, however ragged the shares are.
"""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, reduce
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from training.data import IGNORE_INDEX, Example


def start(device: str) -> None:
    """Join the other processes, if there are any: on a CPU where that is asked for, or all there is."""
    PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())


def is_main() -> bool:
    return PartialState().is_main_process


def count() -> int:
    return PartialState().num_processes


def on_main(write: Callable[[], None]) -> None:
    """Run by one process, which alone prints and writes files, while the others wait."""
    if is_main():
        write()
    PartialState().wait_for_everyone()


def share(examples: Sequence[Example], members: list[int]) -> tuple[list[int], list[Example]]:
    """(indices, examples) of this process's part of a batch.

    Where a batch has fewer rows than there are processes, some get its first row with nothing to score: gradients are
    exchanged in every step, so every process has to take it.
    """
    mine = members[PartialState().process_index :: count()]
    if mine:
        return mine, [examples[i] for i in mine]
    first = examples[members[0]]
    return members[:1], [Example(first.input_ids, [IGNORE_INDEX] * len(first.labels))]


def scored_tokens(examples: Sequence[Example], members: list[int]) -> int:
    """Of a whole batch. No example scores its first token, which nothing precedes."""
    return sum(label != IGNORE_INDEX for i in members for label in examples[i].labels[1:])


def total(values: Tensor) -> Tensor:
    """The sum over processes."""
    return reduce(values, "sum")


class Trained:
    """A model and its optimiser under whatever wrapper the launch file asks for."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.accelerator = Accelerator(device_placement=False)  # the model is where it belongs
        if self.accelerator.distributed_type is DistributedType.DEEPSPEED:
            unset_hf_deepspeed_config()  # or from_pretrained would shard models that are only evaluated
            # a data loader would say it; the losses bring their own normaliser, so nothing depends on it
            self.accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def step(self, loss: Tensor, max_grad_norm: float) -> None:
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """The whole state dict, wherever its parts are; every process has to ask."""
        return self.accelerator.get_state_dict(self.model)
