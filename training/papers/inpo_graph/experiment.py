"""Unlearning of nodes by Adam from the reference, full-batch, and what is measured during training.

With r = log p - log p_ref of the label of a forget node, and means over the forget nodes:

    GA      mean log p                                          arXiv 2404.05868, eq. 2
    NPO     mean (2/beta) log(1 + (p / p_ref)^beta)             arXiv 2404.05868, eq. 3
    INPO    mean w (2/beta) log(1 + (p / p_ref)^beta)           arXiv 2510.19479; w reconstructed, see `influence`
    +RT     + mean NLL on the retain nodes, in the graph that is left

INPO (mixed) is the control: the weights of INPO, dealt to the forget nodes at random. What it has in common with INPO
is due to uneven weights, and not to influence.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from npo_kernels import fused_npo_loss, sequence_logprobs
from training.papers.inpo_graph.influence import influence_weights, removal_influence
from training.papers.inpo_graph.setting import GCN, Setting, make_setting
from training.papers.paths import at_place, first_place

STEPS, EVAL_EVERY, LR, BETA = 100, 5, 1e-3, 3.0


class Method(NamedTuple):
    family: str  # "ga", "npo", "inpo", "mixed"
    retain: bool  # + RT


METHODS = {
    "GA": Method("ga", False),
    "NPO": Method("npo", False),
    "INPO": Method("inpo", False),
    "INPO (mixed)": Method("mixed", False),
    "GA+RT": Method("ga", True),
    "NPO+RT": Method("npo", True),
    "INPO+RT": Method("inpo", True),
    "INPO (mixed)+RT": Method("mixed", True),
}


class Forgetting(NamedTuple):
    """Constants of the forget loss, (m,) each, from the reference model."""

    ref_logps: Tensor
    weights: dict[str, Tensor]  # {family: w}, of those that have some

    @classmethod
    def of(cls, setting: Setting, seed: int = 0) -> "Forgetting":
        reference, nodes = setting.reference, setting.forget
        influence = removal_influence(reference, setting.graph, setting.words, nodes)
        weights = influence_weights(influence)
        mixed = weights[torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))]
        with torch.no_grad():
            hidden = reference(setting.graph, reference.bags(setting.words))[nodes]
            ref_logps = node_logps(hidden, reference.head, setting.labels[nodes])
        return cls(ref_logps, {"inpo": weights, "mixed": mixed})


@dataclass(frozen=True)
class Curve:
    """What was measured after `steps` steps: {name: (S, E)} for S seeds and E evaluations; distances in nats."""

    steps: np.ndarray  # (E,)
    values: dict[str, np.ndarray]
    aim: np.ndarray  # (S,) the retrained model's mean probability of the labels of forget nodes

    def reached(self) -> np.ndarray:
        """(S,) whether the forget nodes become as improbable as they are to the retrained model."""
        return (self.values["forget_probability"] <= self.aim[:, None]).max(1)

    def at_aim(self) -> dict[str, np.ndarray]:
        """{name: (S,)} where they first are, between two evaluations by a line, or at the end where they never are.

        Methods of different speed are compared there: each of them would be stopped there.
        """
        pairs = zip(self.values["forget_probability"], self.aim, strict=True)
        places = [first_place(-probability, -aim) for probability, aim in pairs]
        values = self.values | {"step": np.broadcast_to(self.steps, (len(self.aim), len(self.steps)))}
        return {
            name: np.array([at_place(row, place) for place, row in zip(places, rows, strict=True)])
            for name, rows in values.items()
        }

    def summary(self) -> dict[str, float]:
        """Medians over the seeds: at the aim, and at the end."""
        stopped = {f"aim_{name}": float(np.median(values)) for name, values in self.at_aim().items()}
        ends = {f"end_{name}": float(np.median(values[:, -1])) for name, values in self.values.items()}
        return {"reached": float(self.reached().mean())} | stopped | ends


def node_logps(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """(m,) log p(label) of nodes by their representations (m, H), in nats."""
    return sequence_logprobs(hidden.unsqueeze(1), head, labels.unsqueeze(1), shift=False)[0]


def forget_loss(
    family: str, hidden: Tensor, head: Tensor, labels: Tensor, constants: Forgetting, beta: float
) -> Tensor:
    """Of the representations (m, H) and labels (m,) of the forget nodes; a 0-d tensor."""
    if family == "ga":
        return node_logps(hidden, head, labels).mean()
    return fused_npo_loss(
        hidden.unsqueeze(1),
        head,
        labels.unsqueeze(1),
        ref_logps=constants.ref_logps,
        beta=beta,
        shift=False,
        weights=constants.weights.get(family),
    )


def loss_of(method: Method, setting: Setting, model: GCN, constants: Forgetting, beta: float) -> Tensor:
    """Forget loss + retain term, both with weight 1; a 0-d tensor."""
    bags, forget, retain = model.bags(setting.words), setting.forget, setting.retain
    hidden = model(setting.graph, bags)[forget]
    loss = forget_loss(method.family, hidden, model.head, setting.labels[forget], constants, beta)
    if method.retain:
        logits = model(setting.left, bags)[retain] @ model.head.T
        loss = loss + F.cross_entropy(logits, setting.labels[retain])
    return loss


@torch.no_grad()
def measure(setting: Setting, model: GCN) -> dict[str, float]:
    """KL(retrained || model), accuracy and probability of the label: means over forget, retain and test nodes."""
    found = {}
    for name, aim in setting.aims.items():
        nodes = getattr(setting, name)
        labels, logp = setting.labels[nodes], setting.log_probabilities(model, name)
        found[f"{name}_kl"] = F.kl_div(logp, aim, reduction="batchmean", log_target=True).item()
        found[f"{name}_accuracy"] = (logp.argmax(1) == labels).float().mean().item()
        found[f"{name}_probability"] = logp.gather(1, labels.unsqueeze(1)).exp().mean().item()
    return found


def unlearn(
    setting: Setting, method: Method, constants: Forgetting, beta: float, lr: float, steps: int
) -> dict[str, list[float]]:
    """{name: (E,)} measured after 0, `EVAL_EVERY`, ..., `steps` steps."""
    model = deepcopy(setting.reference).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    history = [measure(setting, model)]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(method, setting, model, constants, beta).backward()
        optimizer.step()
        if step % EVAL_EVERY == 0:
            history.append(measure(setting, model))
    return {name: [entry[name] for entry in history] for name in history[0]}


def curves(
    settings: Sequence[Setting], constants: Sequence[Forgetting], beta: float, lr: float, steps: int,
    on_run: Callable[[], None] = lambda: None,
) -> dict[str, Curve]:  # fmt: skip
    """{method: curve} over the seeds."""
    aim = np.array([measure(setting, setting.retrained)["forget_probability"] for setting in settings])
    found = {}
    for name, method in METHODS.items():
        histories = []
        for setting, of_setting in zip(settings, constants, strict=True):
            histories.append(unlearn(setting, method, of_setting, beta, lr, steps))
            on_run()
        values = {key: np.array([history[key] for history in histories]) for key in histories[0]}
        found[name] = Curve(np.arange(0, steps + 1, EVAL_EVERY), values, aim)
    return found


def make_settings(num_seeds: int, num_nodes: int, on_seed: Callable[[], None] = lambda: None) -> list[Setting]:
    """Seeds 1000, 2000, ..."""
    settings = []
    for i in range(num_seeds):
        settings.append(make_setting(num_nodes, 1000 * (i + 1)))
        on_seed()
    return settings
