"""The training loop: accumulation, clipping, the schedule, interruption, and the state saved in checkpoints.

It uses accelerate rather than transformers' Trainer: a step's rows, their partners and the denominators of its means
are known before it starts (`training.steps`), so accumulation, several processes and resumption are exact. A Trainer
would hand over one kind of rows, one micro-batch at a time. The arithmetic is that of accelerate's wrappers in both
cases. Under bfloat16 autocast the weights and the optimizer's state stay float32.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from training import distributed
from training.config import TrainConfig
from training.durable import SharpnessAware
from training.interruption import Interrupted, check, check_alone, interruptible
from training.model import autocast
from training.observed import Observed
from training.random_states import RandomStates
from training.steps import Pass

logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # it warns about tied heads at each save


class Job(Protocol):
    def __len__(self) -> int: ...

    def passes(self, model: torch.nn.Module, step: int) -> list[Pass]: ...


class Metrics(NamedTuple):
    """Metrics of one step."""

    step: int  # from 1
    loss: float  # of the whole step
    grad_norm: float  # before clipping
    lr: float
    num_tokens: int  # of this process, without padding


class Stateful(Protocol):
    """State that changes during training besides weights and optimizer."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class DivergedError(ValueError):
    """A loss or a gradient is not finite."""


class Trainer:
    """AdamW with warm-up, schedule and gradient clipping, under the wrapper of the launch file."""

    def __init__(
        self, model: PreTrainedModel, config: TrainConfig, num_steps: int, observed: Observed | None = None
    ):  # fmt: skip
        self.device, self.max_grad_norm, self.autocast = model.device, config.max_grad_norm, partial(autocast, model)
        self.frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
        adamw = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.lr, fused=True)
        self.schedule = get_scheduler(config.lr_scheduler_type, adamw, config.warmup(num_steps), num_steps)
        self.accelerator = Accelerator(device_placement=False)  # the model is on its device already
        self.observed = observed  # by the objectives of the passes
        self.sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if self.sharded and self.frozen:
            raise ValueError(
                "a part of the parameters (LoRA, --train_only, RMU) is trained in one process or with DDP: expected "
                "training/launch/ddp.yaml"
            )
        if self.sharded and config.saf_format != "off":
            raise ValueError(
                "--saf_format rounds weights that a process holds whole: expected one process, or DDP by "
                "training/launch/ddp.yaml"
            )
        self.saf = None if config.saf_format == "off" else SharpnessAware(model, config.saf_format, config.saf_rho)
        if self.accelerator.distributed_type is DistributedType.DEEPSPEED:
            unset_hf_deepspeed_config()  # or from_pretrained would shard models that are only evaluated
            # usually read from a data loader; no result depends on it, as the losses have their own denominators
            deepspeed = self.accelerator.state.deepspeed_plugin.deepspeed_config
            deepspeed |= {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": config.max_grad_norm}
        self.module = model
        self.model, self.optimizer = self.accelerator.prepare(model, adamw)
        self.states: dict[str, Stateful] = {"schedule": self.schedule}  # of numbers, as JSON has them

    def step(
        self, passes: list[Pass], number: int = 1, after_pass: Callable[[int], None] = lambda num_tokens: None
    ) -> Metrics:
        """One optimiser step on the sum of the passes' losses, at rounded weights with `saf_format`."""
        with self.saf.rounded(partial(self._backward, passes)) if self.saf else nullcontext():
            if self.observed is not None:
                self.observed.begin()  # rounding may have run the passes already
            loss = self._backward(passes, after_pass)
        lr = self.schedule.get_last_lr()[0]
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm or math.inf)
        num_tokens = sum(p.num_tokens for p in passes)
        whole = distributed.total(loss).item() / distributed.count()
        metrics = Metrics(number, whole, float(norm or 0.0), lr, num_tokens)
        if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
            raise DivergedError(
                f"step {number}: the loss is {metrics.loss} and the gradients' norm {metrics.grad_norm}; the newest "
                "checkpoint is kept. Lower --lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return metrics

    def _backward(self, passes: list[Pass], after_pass: Callable[[int], None] = lambda num_tokens: None) -> Tensor:
        """Accumulate the gradients of the passes. Returns the sum of their losses in this process."""
        loss = torch.zeros((), device=self.device)
        for i, (inputs, objective, num_tokens) in enumerate(passes):
            last = i == len(passes) - 1
            self.accelerator.sync_gradients = last
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.autocast():
                    part = self.model(**inputs, fused_unlearning=objective).loss
                self.accelerator.backward(part)
            loss += part.detach()
            after_pass(num_tokens)
            check_alone()
        return loss

    def train(
        self,
        job: Job,
        *,
        first_step: int = 0,
        after_step: Callable[[Metrics], None] = lambda metrics: None,
        after_pass: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
        """All steps of the job from `first_step` on.

        A signal raises `Interrupted` and discards the current step: weights, optimizer, random generators and `states`
        are then those after the last finished step.
        """
        self.model.train()
        with interruptible():
            for step in range(first_step, len(job)):
                random_states, states = RandomStates.now(self.device), self.state_dicts()
                try:
                    with self.autocast():
                        passes = job.passes(self.model, step)
                    metrics = self.step(passes, step + 1, after_pass)
                except Interrupted:
                    random_states.restore(self.device)
                    self.load_state_dicts(states)
                    self.optimizer.zero_grad()
                    raise
                after_step(metrics)
                check()

    def state_dicts(self) -> dict[str, dict[str, Any]]:
        return {name: state.state_dict() for name, state in self.states.items()}

    def load_state_dicts(self, states: Mapping[str, dict[str, Any]]) -> None:
        for name, state in self.states.items():
            state.load_state_dict(states[name])

    def trained(self) -> dict[str, Tensor]:
        """The tensors that training changes, by name. A weight with two names appears once, frozen ones do not."""
        names = {name for name, _ in self.module.named_parameters()} | {name for name, _ in self.module.named_buffers()}
        whole = self.module.state_dict()
        return {name: tensor for name, tensor in whole.items() if name in names and name not in self.frozen}

    def weights(self) -> dict[str, Tensor]:
        """The whole state dict, gathered if it is sharded. Every process must call this."""
        return self.accelerator.get_state_dict(self.model)


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not, as in transformers' Trainer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = ({"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
