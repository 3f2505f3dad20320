"""Teaching the model its authors, and the optimiser that all training here shares."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from npo_kernels import fused_logprob_loss
from training.data import Example, collate, shuffled_batches
from training.model import autocast
from training.processes import Trained, count, scored_tokens, share, total

WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0


class Optimizer:
    """AdamW with linear warm-up, linear decay to zero and clipped gradients, the recipe of the NPO paper (E.1.4)."""

    def __init__(self, model: PreTrainedModel, lr: float, num_steps: int, warmup_steps: int):
        adamw = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
        self.schedule = get_linear_schedule_with_warmup(adamw, warmup_steps, num_steps)
        self.trained = Trained(model, adamw)

    @property
    def model(self) -> PreTrainedModel:
        """The model as losses have to call it: in its wrapper."""
        return self.trained.model

    def step(self, loss: Tensor) -> float:
        """The loss of the whole batch."""
        self.trained.step(loss, MAX_GRAD_NORM)
        self.schedule.step()
        return total(loss.detach()).item() / count()


def token_nll(model: PreTrainedModel, batch: dict[str, Tensor], num_tokens: float | None = None) -> Tensor:
    """Cross-entropy over the scored tokens: -sum_s logp_s / sum_s |y_s|, or divided by `num_tokens`."""

    def loss_fn(logps: Tensor, counts: Tensor) -> Tensor:
        return -logps.sum() / (counts.sum() if num_tokens is None else num_tokens)

    return model(**batch, fused_unlearning=partial(fused_logprob_loss, loss_fn=loss_fn)).loss


class Finetuned(NamedTuple):
    loss: float  # per batch, the mean of the last epoch
    weights: dict[str, Tensor]


def finetune(
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Finetuned:
    """Minimise the answers' negative log-likelihood, in place."""
    device, generator = model.device, torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(examples) // batch_size)
    optimizer = Optimizer(model, lr, epochs * steps_per_epoch, warmup_steps=steps_per_epoch)
    model.train()
    losses: list[float] = []
    for _ in range(epochs):
        losses.clear()
        for members in shuffled_batches(examples, batch_size, generator):
            batch = collate(share(examples, members)[1], pad_id, device)
            with autocast(device):
                loss = token_nll(optimizer.model, batch, scored_tokens(examples, members) / count())
            losses.append(optimizer.step(loss))
            on_step(losses[-1])
    return Finetuned(sum(losses) / len(losses), optimizer.trained.weights())
