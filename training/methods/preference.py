"""Methods on log-ratios or lengths: NPO, SimNPO, DPO, AltPO and KTO, through `npo_kernels.core.formulas`.

Sums over answer tokens and <eos>: logp_s of a sequence, r_s = logp_s - ref_s its log-ratio against the cached
reference. `mean_s` is the mean over the forget rows of the step. z = beta mean_s r_idk, over the whole step and
without a gradient.

`compat="npo-repo"` gives the numbers of the NPO paper's code where they differ from its text: DPO with 2/beta, KTO with
1 + and z not multiplied by beta, IDK+RT as one token mean over both kinds of rows, and, by `training.unlearn`, KL over
all positions and the same retain row and refusal for a forget row in every epoch. That code takes z over a micro-batch
and counts padding among the positions; here z is always the step's, and padding counts nowhere.
`compat="open-unlearning"` gives DPO its 2/beta as well (IdkDPO), and KL over all positions.
"""

import torch
from torch import Tensor

from npo_kernels.core.formulas import log_ratio, ratio_loss, ratio_weight
from training.methods.base import register_family, step_mean
from training.methods.rows import Batch
from training.methods.settings import Settings
from training.require import require


def npo(batch: Batch, settings: Settings) -> Tensor:
    return batch.sequence_mean(ratio_loss(batch.rows("forget").ratio, settings.beta))


def npo_weight(batch: Batch, settings: Settings) -> Tensor:
    """2 sigmoid(beta r_s): 1 at the reference, 0 of a row that is forgotten."""
    return ratio_weight(batch.rows("forget").ratio, settings.beta)


def simnpo(batch: Batch, settings: Settings) -> Tensor:
    return batch.sequence_mean(ratio_loss(_simnpo_ratio(batch, settings), settings.beta))


def simnpo_weight(batch: Batch, settings: Settings) -> Tensor:
    """2 sigmoid(beta (logp_s / |y_s| + gamma)); the gradient has 1 / |y_s| besides."""
    return ratio_weight(_simnpo_ratio(batch, settings), settings.beta)


def _simnpo_ratio(batch: Batch, settings: Settings) -> Tensor:
    forget = batch.rows("forget")
    offset = torch.full_like(forget.logps, -settings.gamma)
    return log_ratio(forget.logps, forget.num_tokens, offset, True)


def dpo(batch: Batch, settings: Settings) -> Tensor:
    factor = 0.5 if settings.compat == "paper" else 1.0
    return factor * batch.sequence_mean(ratio_loss(batch.rows("forget").ratio - batch.rows("idk").ratio, settings.beta))


def altpo(batch: Batch, settings: Settings) -> Tensor:
    """The alternate answer is preferred to the true one."""
    return batch.sequence_mean(ratio_loss(batch.rows("forget").ratio - batch.rows("alternate").ratio, settings.beta))


def kto(batch: Batch, settings: Settings) -> Tensor:
    beta = settings.beta
    z = torch.as_tensor(require(batch.idk_ratio, "the mean log-ratio of the IDK answers"))
    if settings.compat == "npo-repo":
        return step_mean(batch, 1.0) + batch.sequence_mean(ratio_loss(batch.rows("forget").ratio - z / beta, beta))
    return batch.sequence_mean(ratio_loss(batch.rows("forget").ratio - z, beta))


register_family(
    "npo",
    "NPO",
    formula="(2/beta) mean_s softplus(beta r_s)",
    paper="arXiv 2404.05868, eq. 3",
    loss=npo,
    row_weight=npo_weight,
    colour="#0072B2",
    reference=True,
    aliases={"_rt": ("NPO",)},
)
register_family(
    "simnpo",
    "SimNPO",
    formula="(2/beta) mean_s softplus(-beta (-logp_s / |y_s| - gamma))",
    paper="arXiv 2410.07163",
    loss=simnpo,
    row_weight=simnpo_weight,
    colour="#E69F00",
    defaults={"beta": 4.5},
    rt={"forget_weight": 0.125},
    aliases={"_rt": ("SimNPO",)},
)
register_family(
    "dpo",
    "DPO",
    formula="(1/beta) mean_s softplus(-beta (r_idk - r_s))",
    paper="arXiv 2404.05868",
    loss=dpo,
    colour="#CC79A7",
    rows=("forget", "idk"),
    reference=True,
    aliases={"_rt": ("IdkDPO",)},
)
register_family(
    "altpo",
    "AltPO",
    formula="(2/beta) mean_s softplus(-beta (r_alternate - r_s))",
    paper="arXiv 2409.13474",
    loss=altpo,
    colour="#000000",
    rows=("forget", "alternate"),
    reference=True,
    aliases={"_rt": ("AltPO",)},
)
register_family(
    "kto",
    "KTO",
    formula="(2/beta) mean_s softplus(beta r_s - z)",
    paper="arXiv 2404.05868",
    loss=kto,
    colour="#009E73",
    scored=("idk",),
    reference=True,
)
