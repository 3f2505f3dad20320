"""Unlearning by full-batch gradient descent, with forget and retain distances, and their medians."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch

from training.papers.npo_logistic.methods import METHODS, SETTINGS, Method, Outputs
from training.papers.npo_logistic.setting import Setting, make_setting

STEPS, EVAL_EVERY = 2000, 25
BETAS, BETA_LR, BETA_STEPS = (0.01, 0.1, 0.2, 0.5, 1.0), 5e-4, 10_000  # the paper's figure 3


class Run(NamedTuple):
    method: Method
    lr: float
    beta: float | None


@dataclass(frozen=True)
class Curve:
    """Distances after `steps` steps, (S, E) for S seeds and E evaluations, in nats."""

    steps: np.ndarray  # (E,)
    forget: np.ndarray
    retain: np.ndarray

    def summary(self) -> dict[str, float]:
        """Medians over the seeds: distances at the end, and where the forget distance is least.

        Medians, because a seed now and then diverges by orders of magnitude under gradient ascent.
        """
        least = self.forget.argmin(1)[:, None]
        return {
            "end_fd": float(np.median(self.forget[:, -1])),
            "end_rd": float(np.median(self.retain[:, -1])),
            "min_fd": float(np.median(self.forget.min(1))),
            "min_fd_step": float(np.median(self.steps[least])),
            "rd_at_min_fd": float(np.median(np.take_along_axis(self.retain, least, 1))),
        }


def unlearn(
    setting: Setting, runs: Sequence[Run], steps: int = STEPS, eval_every: int = EVAL_EVERY
) -> tuple[np.ndarray, np.ndarray]:
    """(M, E) forget and retain distances of M runs after 0, `eval_every`, ..., `steps` steps.

    Gradient descent from the reference on all examples, without momentum or decay. The models are the columns of one
    matrix, so that a step is one product for all of them; they do not touch each other.
    """
    theta = setting.reference.unsqueeze(1).repeat(1, len(runs)).requires_grad_()
    ref = Outputs(setting, setting.forget @ setting.reference, setting.retain @ setting.reference)
    lr = torch.tensor([run.lr for run in runs], dtype=torch.float64)
    distances = []
    for step in range(steps + 1):
        if step % eval_every == 0:
            distances.append(setting.distances(theta.detach()))
        columns = zip(runs, (setting.forget @ theta).unbind(1), (setting.retain @ theta).unbind(1), strict=True)
        losses = (run.method.loss(Outputs(setting, *logits), ref, run.beta) for run, *logits in columns)
        loss = reduce(torch.add, losses)
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - lr * gradient).detach().requires_grad_()
    forget, retain = (torch.stack(column, 1).numpy() for column in zip(*distances, strict=True))
    return forget, retain


def curves(
    settings: Sequence[Setting], runs: dict[str, Run], steps: int, on_seed: Callable[[], None] = lambda: None
) -> dict[str, Curve]:
    """{name: curve} over the seeds."""
    found = []
    for setting in settings:
        found.append(unlearn(setting, list(runs.values()), steps))
        on_seed()
    forget, retain = (np.stack(part, 1) for part in zip(*found, strict=True))  # (M, S, E)
    at = np.arange(0, steps + 1, EVAL_EVERY)
    return {name: Curve(at, forget[i], retain[i]) for i, name in enumerate(runs)}


def method_runs(alpha: int) -> dict[str, Run]:
    """All methods with the paper's settings."""
    return {name: Run(method, *SETTINGS[alpha][method.family]) for name, method in METHODS.items()}


def beta_runs() -> dict[str, Run]:
    """GA, and NPO at one learning rate for all beta: NPO tends to GA as beta -> 0 (the paper's proposition 1)."""
    npo = {f"NPO, beta {beta:g}": Run(METHODS["NPO"], BETA_LR, beta) for beta in BETAS}
    return {"GA": Run(METHODS["GA"], BETA_LR, None)} | npo


def make_settings(alpha: int, num_seeds: int, on_seed: Callable[[], None] = lambda: None) -> list[Setting]:
    """Seeds 1000, 2000, ..., as in the paper's code."""
    settings = []
    for i in range(num_seeds):
        settings.append(make_setting(alpha, 1000 * (i + 1)))
        on_seed()
    return settings
