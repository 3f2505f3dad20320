"""Teaching the model its authors, and the optimiser that all training here shares."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from npo_kernels import fused_logprob_loss
from training.data import Example, collate, shuffled_batches
from training.model import autocast, hidden_states

WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0


class Optimizer:
    """AdamW with linear warm-up, linear decay to zero and clipped gradients, the recipe of the NPO paper (E.1.4)."""

    def __init__(self, model: PreTrainedModel, lr: float, num_steps: int, warmup_steps: int):
        self.parameters = list(model.parameters())
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=WEIGHT_DECAY)
        self.schedule = get_linear_schedule_with_warmup(self.adamw, warmup_steps, num_steps)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()


def mean_token_nll(logps: Tensor, num_tokens: Tensor) -> Tensor:
    """Cross-entropy over all scored tokens of the batch: -sum_s logp_s / sum_s |y_s|."""
    return -logps.sum() / num_tokens.sum()


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
) -> float:
    """Minimise the answers' negative log-likelihood; returns the mean loss per batch of the last epoch."""
    device, generator = model.device, torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(examples) // batch_size)
    optimizer = Optimizer(model, lr, epochs * steps_per_epoch, warmup_steps=steps_per_epoch)
    model.train()
    losses: list[float] = []
    for _ in range(epochs):
        losses.clear()
        for members in shuffled_batches(examples, batch_size, generator):
            batch = collate([examples[i] for i in members], pad_id, device)
            with autocast(device):
                hidden = hidden_states(model, batch)
                loss = fused_logprob_loss(hidden, model.lm_head.weight, batch["labels"], mean_token_nll)
            optimizer.step(loss)
            losses.append(loss.item())
            on_step(losses[-1])
    return sum(losses) / len(losses)
