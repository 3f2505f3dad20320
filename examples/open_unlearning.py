"""OpenUnlearning's NPO, SimNPO, DPO and GradDiff trainers, fused: the same losses from log-probabilities.

    python -m examples.open_unlearning

In OpenUnlearning, after its trainers are registered (src/trainer/__init__.py)::

    from examples.open_unlearning import fused
    _register_trainer(fused(NPO))  # handler: FusedNPO

The trainers are subclassed by what they have, not by import: `gamma`, `alpha`, `beta`, `delta`, `ref_model`,
`retain_loss_type`, and batches {"forget": ..., "retain": ...}. One forward over forget and retain rows together gives
one gradient of the head; a reference that is kept costs one forward without logits. retain_loss_type="KL" runs the
trainer's own `compute_retain_loss`.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.tiny import PAD, collate, random_rows, tiny_model
from npo_kernels import fused_logprob_loss
from npo_kernels.hf import add_fused_unlearning_head

Batch = dict[str, Tensor]
FILL = {"input_ids": PAD, "attention_mask": 0, "labels": -100}


class FusedLoss:
    """What `fused` puts before a trainer: the head, and a `compute_loss` without logits."""

    loss_is_scaled_for_ga = False  # a mean over the micro-batch, as the trainers have it: the Trainer divides
    # what the trainers have
    gamma: float
    alpha: float
    beta: float
    delta: float
    retain_loss_type: str
    ref_model: torch.nn.Module
    compute_retain_loss: Callable[..., Tensor]

    def __init__(self, *args, model, **kwargs):
        model = add_fused_unlearning_head(model)  # before ref_model is copied from it
        super().__init__(*args, **kwargs | {"model": model})
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forget = self.forget_batches(inputs["forget"])
        fuse_retain = self.retain_loss_type == "NLL"
        batch = stack([*forget, inputs["retain"]] if fuse_retain else forget)
        sizes = [len(part["labels"]) for part in forget]
        refs = self.reference(stack(forget)).split(sizes) if self.needs_reference else [None] * len(forget)

        def loss_fn(logps: Tensor, num_tokens: Tensor) -> Tensor:
            rows = sum(sizes)
            pieces = zip(logps[:rows].split(sizes), num_tokens[:rows].split(sizes), refs, strict=True)
            loss = self.gamma * self.forget_loss(list(pieces))
            if fuse_retain:
                loss = loss - self.alpha * logps[rows:].sum() / num_tokens[rows:].sum()
            return loss

        outputs = model(**batch, fused_unlearning=partial(fused_logprob_loss, loss_fn=loss_fn))
        loss = outputs.loss
        if not fuse_retain:
            loss = loss + self.alpha * self.compute_retain_loss(model=model, retain_inputs=stack([inputs["retain"]]))
        return (loss, outputs) if return_outputs else loss

    compute_unlearn_loss = compute_loss  # the name in some of its versions

    @torch.no_grad()
    def reference(self, batch: Batch) -> Tensor:
        """(B,) summed log-probabilities under the reference."""
        return self.ref_model(**batch, fused_unlearning=True).logps

    needs_reference = False

    def forget_batches(self, inputs) -> list[Batch]:
        return [inputs]

    def forget_loss(self, pieces: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
        """Of (logps, num_tokens, ref_logps) of each of `forget_batches`."""
        raise NotImplementedError


class GradDiffLoss(FusedLoss):
    def forget_loss(self, pieces):
        ((logps, num_tokens, _),) = pieces
        return logps.sum() / num_tokens.sum()


class NPOLoss(FusedLoss):
    needs_reference = True

    def forget_loss(self, pieces):
        ((logps, _, refs),) = pieces
        return -(2 / self.beta) * F.logsigmoid(-self.beta * (logps - refs)).mean()


class SimNPOLoss(FusedLoss):
    def forget_loss(self, pieces):
        ((logps, num_tokens, _),) = pieces
        return -(2 / self.beta) * F.logsigmoid(self.beta * (-logps / num_tokens - self.delta)).mean()


class DPOLoss(FusedLoss):
    """The alternate answer is preferred to the original one."""

    needs_reference = True

    def forget_batches(self, inputs):
        return [inputs["original"], inputs["alternate"]]

    def forget_loss(self, pieces):
        (lose, _, lose_refs), (win, _, win_refs) = pieces
        return -(2 / self.beta) * F.logsigmoid(self.beta * ((win - win_refs) - (lose - lose_refs))).mean()


LOSSES = {"GradDiff": GradDiffLoss, "NPO": NPOLoss, "SimNPO": SimNPOLoss, "DPO": DPOLoss}


def fused(trainer: type) -> type:
    """The trainer class `NPO` -> `FusedNPO`, with the same arguments."""
    if trainer.__name__ not in LOSSES:
        raise ValueError(f"fused: expected one of {', '.join(LOSSES)}, got {trainer.__name__}; it keeps its own loss")
    return type(f"Fused{trainer.__name__}", (LOSSES[trainer.__name__], trainer), {})


def stack(batches: list[Batch]) -> Batch:
    """One batch of the rows of several, padded on the right to the longest."""
    longest = max(batch["labels"].shape[1] for batch in batches)

    def padded(name: str, batch: Batch) -> Tensor:
        return F.pad(batch[name], (0, longest - batch[name].shape[1]), value=FILL[name])

    return {name: torch.cat([padded(name, batch) for batch in batches]) for name in FILL}


# ---------------------------------------------------------------------------------------------------------------------
# A run without OpenUnlearning: a stand-in for its NPO trainer
# ---------------------------------------------------------------------------------------------------------------------


class NPO:
    """As much of the trainer as its loss needs."""

    def __init__(self, model, gamma=1.0, alpha=1.0, beta=0.1, retain_loss_type="NLL"):
        self.model, self.gamma, self.alpha, self.beta = model, gamma, alpha, beta
        self.retain_loss_type = retain_loss_type
        self.ref_model = copy.deepcopy(model).eval()

    def step(self, optimizer: torch.optim.Optimizer, inputs: dict, compute_loss: Callable) -> float:
        loss = compute_loss(self.model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()


def main() -> list[float]:
    trainer = fused(NPO)(model=tiny_model(), beta=0.1)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3)
    inputs = {"forget": collate(random_rows(4, seed=1)), "retain": collate(random_rows(4, seed=2))}
    losses = [trainer.step(optimizer, inputs, trainer.compute_loss) for _ in range(5)]
    print(" ".join(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()
