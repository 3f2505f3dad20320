"""Unlearning of forget1 and forget2 by NPO and SimNPO, and what is measured during training.

With logp_s the summed log-probability of sequence s, |s| its predictions, r_s = logp_s - logp_ref,s:

    NPO      mean_s (2/beta) log(1 + exp(beta r_s))                 arXiv 2404.05868, eq. 3
    SimNPO   mean_s (2/beta) log(1 + exp(beta logp_s / |s|))        arXiv 2410.07163, gamma 0
    +RT      + mean NLL a state of retain sequences
    +KL      + KL(reference || model) on retain sequences, summed over a sequence, mean over the sequences

As in the authors' code, a batch is 4 forget and 4 retain sequences, and AdamW takes 50 of them.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from npo_kernels import fused_linear_kl, fused_npo_loss, fused_simnpo_loss, sequence_logprobs
from training.data import IGNORE_INDEX
from training.papers.paths import at_place, first_place
from training.papers.simnpo_markov.setting import CHAINS, Case, Setting, batches, hidden_states, log_probabilities

STEPS, BATCH, LR, BETA = 50, 4, 5e-4, 1.0
DENSE, SPARSE = 10, 5  # measured after each of the first steps, where most of it happens, and then after every fifth
BUDGET = 0.1  # nats of retain distance that a method may spend
PUBLISHED_LENGTHS = (5, 20)


class Method(NamedTuple):
    family: str  # "NPO" or "SimNPO"
    retain: str | None = None  # "RT" or "KL"


class Run(NamedTuple):
    method: Method
    lr: float = LR
    beta: float = BETA


class Batch(NamedTuple):
    """Of one step; rows (4, 20), and the reference's log-probabilities (4,) of the forget rows."""

    forget: Tensor
    retain: Tensor
    ref_logps: Tensor


@dataclass(frozen=True)
class Path:
    """What was measured after `steps` steps of one run: {name: (E,)}, as `measure` names it."""

    steps: np.ndarray  # (E,)
    values: dict[str, np.ndarray]

    def forget(self, kind: str) -> np.ndarray:
        """(E,) mean of both chains, of which neither counts more for having longer sequences."""
        return (self.values[f"forget1_{kind}"] + self.values[f"forget2_{kind}"]) / 2

    def outcome(self, aim: float) -> dict[str, float]:
        """`aim` is the forget quality of the retrained model.

        spent_: where the retain distance (to the chain) is first `BUDGET`, which is how the authors' figures are read.
        aim_: where the forget quality is first that of the retrained model, as an operator would stop there.
        best_: where the forget distance is least. end_: after the last step.
        A run that never gets to a place is taken at its end.
        """
        places = {
            "spent": first_place(self.values["retain_quality"], BUDGET),
            "aim": first_place(self.forget("quality"), aim),
            "best": float(self.forget("distance").argmin()),
            "end": len(self.steps) - 1.0,
        }
        wanted = {name: self.values[f"{name}_quality"] for name in CHAINS}
        wanted |= {"distance": self.forget("distance"), "step": self.steps}
        return {f"{at}_{name}": at_place(wanted[name], place) for at, place in places.items() for name in wanted}


METHODS = {
    family + (f"+{retain}" if retain else ""): Method(family, retain)
    for retain in (None, "RT", "KL")
    for family in ("NPO", "SimNPO")
}
SWEEP = {
    f"{family}, {text}": Run(Method(family), lr, beta)
    for family in ("NPO", "SimNPO")
    for text, lr, beta in (
        ("beta 0.1", LR, 0.1),
        ("beta 5", LR, 5.0),
        ("lr 0.0002", 2e-4, BETA),
        ("lr 0.0002, beta 5", 2e-4, 5.0),
    )
}


def case_runs(case: Case) -> dict[str, Run]:
    """At the published learning rate and beta; with retain terms for the lengths that the authors have."""
    return {
        name: Run(method)
        for name, method in METHODS.items()
        if not method.retain or (case.seen and case.length in PUBLISHED_LENGTHS)
    }


def draw_batches(setting: Setting, steps: int, seed: int) -> list[Batch]:
    """The same for every method. What the reference says of them is computed here, once."""
    rng = torch.Generator().manual_seed(seed)
    forget = batches(torch.cat([setting.train["forget1"], setting.train["forget2"]]), steps, BATCH, rng)
    retain = batches(setting.train["retain"], steps, BATCH, rng)
    rows, reference = torch.cat(forget), setting.reference
    with torch.no_grad():
        logps, _ = sequence_logprobs(hidden_states(reference, rows), reference.lm_head.weight, rows)
    return [Batch(*parts) for parts in zip(forget, retain, logps.split(BATCH), strict=True)]


def loss_of(method: Method, model: GPT2LMHeadModel, reference: GPT2LMHeadModel, batch: Batch, beta: float) -> Tensor:
    """Forget loss + retain term, both with weight 1; a 0-d tensor."""
    head = model.lm_head.weight
    hidden = hidden_states(model, batch.forget)
    if method.family == "NPO":
        loss = fused_npo_loss(hidden, head, batch.forget, ref_logps=batch.ref_logps, beta=beta)
    else:
        loss = fused_simnpo_loss(hidden, head, batch.forget, beta=beta)
    if method.retain is None:
        return loss
    hidden = hidden_states(model, batch.retain)
    if method.retain == "RT":
        logps, num_states = sequence_logprobs(hidden, head, batch.retain)
        return loss - logps.sum() / num_states.sum()
    with torch.no_grad():
        ref_hidden = hidden_states(reference, batch.retain)
    kl = fused_linear_kl(
        hidden[:, :-1],
        head,
        ref_hidden[:, :-1],
        reference.lm_head.weight,
        mask=batch.retain[:, 1:] != IGNORE_INDEX,
        reduction="sum",
    )
    return loss + kl / len(batch.retain)


def measure(setting: Setting, model: GPT2LMHeadModel) -> dict[str, float]:
    """Means over the predictions of the test sequences of every chain, in nats.

    `{chain}_distance` is KL(retrained || model), and `{chain}_quality` is KL(chain || model): what the authors draw,
    as forget quality, and for retain as retain distance.
    """
    found = {}
    for chain in CHAINS:
        logp = log_probabilities(model, setting.test[chain])
        for name, wanted in (("distance", setting.aims[chain]), ("quality", setting.truth[chain])):
            found[f"{chain}_{name}"] = (wanted.exp() * (wanted - logp)).sum(-1).mean().item()
    return found


def measured_at(steps: int) -> list[int]:
    """0, 1, ..., 10, 15, 20, ..., and the last."""
    return [step for step in range(steps + 1) if step <= DENSE or step % SPARSE == 0 or step == steps]


def unlearn(setting: Setting, run: Run, drawn: Sequence[Batch]) -> Path:
    """AdamW from the reference, a step a batch."""
    model = deepcopy(setting.reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr)
    steps = measured_at(len(drawn))
    history = [measure(setting, model)]
    for step, batch in enumerate(drawn, 1):
        optimizer.zero_grad()
        loss_of(run.method, model, setting.reference, batch, run.beta).backward()
        optimizer.step()
        if step in steps:
            history.append(measure(setting, model))
    return Path(np.array(steps), {name: np.array([entry[name] for entry in history]) for name in history[0]})


def median_path(paths: Sequence[Path]) -> dict[str, list[float]]:
    """{name: (E,)} medians of several seeds, step by step, and the steps."""
    middle = {name: np.median([path.values[name] for path in paths], 0).tolist() for name in paths[0].values}
    return {"step": paths[0].steps.tolist(), **middle}
