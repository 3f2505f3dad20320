"""The unlearning methods on one label a question: an answer is one token, so sums and means over tokens are the same.

With r = log p(y|x) - log p_ref(y|x), r' the same of the "I don't know" label, means over the forget examples:

    GA      mean log p                                      NPO     -(2/beta) mean log sigma(-beta r)          (eq. 3)
    IDK     -mean log p(y'|x)                               SimNPO  -(2/beta) mean log sigma(-beta log p - gamma)
    DPO     -(2/beta) mean log sigma(beta (r' - r))         KTO     -(2/beta) mean log sigma(beta (z - r))
    +RT     + mean NLL on retain                            +KL     + mean KL(ref || theta) on retain

arXiv 2404.05868, sections 2 and 3; SimNPO: arXiv 2410.07163, gamma = 0. KTO's z is the mean of KL(theta || ref) on the
forget questions, without gradient, as in the paper's code. Learning rates and beta are those of the paper's table 1;
methods that it does not list have those of NPO.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from training.papers.npo_logistic.setting import Setting, bernoulli_kl


@dataclass(frozen=True)
class Outputs:
    """What a loss may use, of one model: logits and, where they are asked for, log-probabilities of labels, (n,)."""

    setting: Setting
    forget_logits: Tensor
    retain_logits: Tensor

    @cached_property
    def logp(self) -> Tensor:
        return F.logsigmoid(self.setting.forget_signs * self.forget_logits)

    @cached_property
    def idk_logp(self) -> Tensor:
        return F.logsigmoid(self.setting.idk_signs * self.forget_logits)

    @cached_property
    def retain_logp(self) -> Tensor:
        return F.logsigmoid(self.setting.retain_signs * self.retain_logits)


def ga(o: Outputs, ref: Outputs, beta: float) -> Tensor:
    return o.logp


def idk(o: Outputs, ref: Outputs, beta: float) -> Tensor:
    return -o.idk_logp


def npo(o: Outputs, ref: Outputs, beta: float) -> Tensor:
    return 2 / beta * F.softplus(beta * (o.logp - ref.logp))


def simnpo(o: Outputs, ref: Outputs, beta: float) -> Tensor:
    return 2 / beta * F.softplus(beta * o.logp)


def dpo(o: Outputs, ref: Outputs, beta: float) -> Tensor:
    return 2 / beta * F.softplus(beta * ((o.logp - ref.logp) - (o.idk_logp - ref.idk_logp)))


def kto(o: Outputs, ref: Outputs, beta: float) -> Tensor:
    z = bernoulli_kl(o.forget_logits, ref.forget_logits).mean().detach()
    return 2 / beta * F.softplus(beta * (o.logp - ref.logp - z))


@dataclass(frozen=True)
class Method:
    forget: Callable[[Outputs, Outputs, float], Tensor]  # (n,) losses
    retain: str | None = None  # "RT" or "KL"

    @property
    def family(self) -> str:
        return self.forget.__name__

    def loss(self, o: Outputs, ref: Outputs, beta: float | None) -> Tensor:
        """Forget loss + retain term, both with weight 1."""
        loss = self.forget(o, ref, math.nan if beta is None else beta).mean()  # GA and IDK have none
        if self.retain == "RT":
            loss = loss - o.retain_logp.mean()
        elif self.retain == "KL":
            loss = loss + bernoulli_kl(ref.retain_logits, o.retain_logits).mean()
        return loss


METHODS = {
    "GA": Method(ga),
    "GA+RT": Method(ga, "RT"),
    "GA+KL": Method(ga, "KL"),
    "IDK+RT": Method(idk, "RT"),
    "DPO": Method(dpo),
    "DPO+RT": Method(dpo, "RT"),
    "DPO+KL": Method(dpo, "KL"),
    "KTO": Method(kto),
    "KTO+RT": Method(kto, "RT"),
    "KTO+KL": Method(kto, "KL"),
    "NPO": Method(npo),
    "NPO+RT": Method(npo, "RT"),
    "NPO+KL": Method(npo, "KL"),
    "SimNPO": Method(simnpo),
    "SimNPO+RT": Method(simnpo, "RT"),
}

# {alpha: {family: (learning rate, beta)}}; GA and IDK have no beta
SETTINGS = {
    1: {
        "ga": (5e-4, None),
        "idk": (5e-4, None),
        "npo": (5e-3, 1.0),
        "simnpo": (5e-3, 1.0),
        "kto": (5e-3, 1.0),
        "dpo": (5e-3, 0.1),
    },
    0: {
        "ga": (1e-4, None),
        "idk": (1e-4, None),
        "npo": (5e-2, 10.0),
        "simnpo": (5e-2, 10.0),
        "kto": (5e-2, 10.0),
        "dpo": (5e-2, 5.0),
    },
}
