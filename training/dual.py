"""The retain weight of a primal-dual method: the multiplier of `retain <= epsilon`, updated during training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training import distributed
from training.methods import Settings


class DualWeight:
    """weight = max(0, weight + dual_lr * (retain - epsilon)), once per optimizer step.

    `retain` is the mean of the retain term over the whole step, all micro-batches and all processes, so that the weight
    is the same everywhere and does not depend on accumulation. It is applied when the next step begins (`begin_step`).
    With `dual_update="micro_batch"` every micro-batch updates it by its own mean, in each process, as published code
    does. If a step runs its passes twice (`training.durable`), both count. Checkpoints hold its
    `state_dict`.
    """

    def __init__(self, settings: Settings, steps_per_epoch: int, device: torch.device):
        self.settings, self.device = settings, device
        self.first_step = round(settings.dual_warmup_epochs * steps_per_epoch)  # whose retain term counts
        self.weight, self.step = settings.retain_weight, -1
        self._sum: Tensor | float = 0.0
        self._count: Tensor | float = 0.0

    def begin_step(self, step: int) -> None:
        """Apply the update of the previous step, if it was observed here. Every process must call this."""
        if step == self.step + 1 and step > 0 and self.settings.dual_update == "step":
            seen = torch.tensor([float(self._sum), float(self._count)], device=self.device)
            total, count = distributed.total(seen).tolist()
            if count:
                self._update(total / count)
        self.step, self._sum, self._count = step, 0.0, 0.0

    def observe(self, total: Tensor, count: Tensor) -> None:
        """Record the retain term of a micro-batch: its sum, and the number of tokens."""
        if self.settings.dual_update == "step":
            self._sum, self._count = self._sum + total, self._count + count
        elif count > 0:
            self._update(float(total / count))

    def _update(self, retain: float) -> None:
        if self.step >= self.first_step:
            self.weight = max(0.0, self.weight + self.settings.dual_lr * (retain - self.settings.epsilon))

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "step": self.step, "sum": float(self._sum), "count": float(self._count)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight, self.step = float(state["weight"]), int(state["step"])
        self._sum, self._count = float(state["sum"]), float(state["count"])
