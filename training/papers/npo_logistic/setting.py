"""Data and models of the logistic experiment: two Gaussian clouds with opposite labels, and random features.

With u = 1_d / sqrt(d), sigma the logistic function, d = 16:

    forget   x ~ N(+alpha 1_d, I),  P(y=1|x) = sigma( (x - mean).u + 1)     200 examples to learn from
    retain   x ~ N(-alpha 1_d, I),  P(y=1|x) = sigma(-(x - mean).u - 1)    1000
    model    P(y=1|x) = sigma(theta . relu(W x)),  W (128, d) ~ N(0, 1/d) fixed, theta learned, float64

The reference is trained on both, the retrained model on retain alone, by 20000 full-batch gradient steps from 0. Labels
that say "I don't know" are fair coins. Distances are measured on 1000 fresh points of each cloud. A sign of +1 stands
for y = 1 and -1 for y = 0, so that log p(y|x) = log sigma(sign s) for the logit s.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DIM, NUM_FEATURES = 16, 128
NUM_RETAIN, NUM_FORGET, NUM_EVAL = 1000, 200, 1000
PRETRAIN_STEPS, PRETRAIN_LR = 20_000, 0.05
CONVERGED = 1e-2  # norm of the gradient at the end of training


@dataclass(frozen=True)
class Setting:
    """The experiment of one seed. Features are relu(W x)."""

    forget: Tensor  # (200, 128)
    forget_signs: Tensor  # (200,)
    idk_signs: Tensor  # (200,)
    retain: Tensor  # (1000, 128)
    retain_signs: Tensor  # (1000,)
    forget_eval: Tensor  # (1000, 128)
    retain_eval: Tensor  # (1000, 128)
    reference: Tensor  # (128,) theta, trained on forget and retain
    retrained: Tensor  # (128,) theta, trained on retain alone

    def distances(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Forget and retain distance, E KL(retrained || theta) on fresh points of each cloud, in nats.

        `theta` (128, M) holds M models; (M,) each.
        """
        retrained = self.retrained.unsqueeze(1)
        clouds = (self.forget_eval, self.retain_eval)
        forget, retain = (bernoulli_kl(x @ retrained, x @ theta).mean(0) for x in clouds)
        return forget, retain


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(sigma(p) || sigma(q)) of logits, in nats, elementwise."""
    yes = torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q))
    return yes + torch.sigmoid(-p) * (F.logsigmoid(-p) - F.logsigmoid(-q))


def make_setting(alpha: float, seed: int, pretrain_steps: int = PRETRAIN_STEPS) -> Setting:
    """Draw and pre-train. `RuntimeError` if a model has not converged, as every distance would be off."""
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(DIM, NUM_FEATURES, dtype=torch.float64, generator=rng) / DIM**0.5

    def cloud(direction: int, n: int) -> tuple[Tensor, Tensor]:
        """(n, 128) features and (n,) signs around direction * alpha."""
        noise = torch.randn(n, DIM, dtype=torch.float64, generator=rng)
        likely = torch.sigmoid(noise.sum(1) / DIM**0.5 + 1.0)  # of the label that this cloud leans to
        signs = direction * (2 * torch.bernoulli(likely, generator=rng) - 1)
        return torch.relu((direction * alpha + noise) @ weights), signs

    retain, retain_signs = cloud(-1, NUM_RETAIN)
    forget, forget_signs = cloud(+1, NUM_FORGET)
    idk_signs = 2 * torch.bernoulli(torch.full_like(forget_signs, 0.5), generator=rng) - 1
    retain_eval, forget_eval = cloud(-1, NUM_EVAL)[0], cloud(+1, NUM_EVAL)[0]
    return Setting(
        forget,
        forget_signs,
        idk_signs,
        retain,
        retain_signs,
        forget_eval,
        retain_eval,
        reference=_pretrained(torch.cat([retain, forget]), torch.cat([retain_signs, forget_signs]), pretrain_steps),
        retrained=_pretrained(retain, retain_signs, pretrain_steps),
    )


def _pretrained(features: Tensor, signs: Tensor, steps: int) -> Tensor:
    """(128,) theta, by gradient descent on mean -log sigma(sign s); the gradient is written out, as it is one line."""
    signed = features * signs.unsqueeze(1)
    theta = gradient = torch.zeros(NUM_FEATURES, dtype=torch.float64)
    for _ in range(steps):
        gradient = -torch.mv(signed.T, torch.sigmoid(-torch.mv(signed, theta))) / len(signed)
        theta = theta - PRETRAIN_LR * gradient
    if gradient.norm() > CONVERGED:
        raise RuntimeError(
            f"pre-training: expected a gradient norm below {CONVERGED} after {steps} steps, got {gradient.norm():.3g}; "
            "take more"
        )
    return theta
