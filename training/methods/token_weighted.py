"""Methods that weigh each token: WGA, SatImp, CE-U, token-level NPO and CATNIP.

All have the gradient of mean c_t log p_t with a factor c_t of each token, so none needs more than its log-probability:

    WGA     c = p^beta                               SatImp  c = p^beta (1 - p)^beta2
    CE-U    c = p / (1 - p)                          TNPO    c = 2 sigmoid(beta (log p - log p_ref))
    CATNIP  c = 2 sigmoid(beta (log p - log(1 - p))) / |y|, over sequences

1 - p is computed as -expm1(log p), which stays accurate when p is near 1.
"""

import torch
from torch import Tensor

from npo_kernels.core.formulas import ratio_loss
from training.methods.base import Sizes, register_family
from training.methods.rows import Batch, Rows, within_sequences
from training.methods.settings import Settings
from training.require import require

LEAST = 1e-37  # lower bound on 1 - p, so that p / (1 - p) does not overflow


def wga(batch: Batch, settings: Settings) -> Tensor:
    """Weighted gradient ascent: mean_t sg[p_t^beta] log p_t.

    For beta -> 0 it is gradient ascent. Source: arXiv 2502.19301.
    """
    logps = _token_logps(batch.rows("forget"))
    return batch.token_mean((settings.beta * logps.detach()).exp() * logps)


def satimp(batch: Batch, settings: Settings) -> Tensor:
    """Saturation and importance: mean_t sg[p_t^beta (1 - p_t)^beta2] log p_t.

    beta2 = 0 is WGA. The published settings are beta 5, beta2 1, with a forget weight of 0.1 beside a retain term.
    Source: arXiv 2505.11953.
    """
    logps = _token_logps(batch.rows("forget"))
    weight = (settings.beta * logps.detach()).exp() * _miss(logps.detach()) ** settings.beta2
    return batch.token_mean(weight * logps)


def ceu(batch: Batch, settings: Settings) -> Tensor:
    """Cross-entropy unlearning: mean_t CE(q_t, p_t) with q = sg[softmax of the logits with -inf at the label].

    With E the entropy of p, CE = (E + p_y log p_y) / (1 - p_y). Its gradient, p - q, is p_y / (1 - p_y) times that of
    log p_y. The first `skip_tokens` tokens of an answer are left out, as the paper does; where none is left the loss is
    0 (published code: NaN). Source: arXiv 2503.01224.
    """
    rows = batch.rows("forget")
    logps, entropy = _token_logps(rows), rows.statistics["entropy"].detach()
    counted = rows.place >= settings.skip_tokens
    p, miss = logps.detach().exp(), _miss(logps.detach()).clamp(min=LEAST)
    value = (entropy + p * logps.detach()) / miss
    change = p / miss * (logps - logps.detach())  # 0, with the gradient
    total = counted.sum() if batch.num_counted is None else torch.as_tensor(batch.num_counted)
    return (value + change).where(counted, 0.0).sum() / total.clamp(min=1e-9)


def check_ceu(settings: Settings, sizes: Sizes) -> str:
    if settings.skip_tokens < sizes.longest_answer:
        return ""
    return f"--skip_tokens {settings.skip_tokens} leaves no token of the forget set: expected fewer"


def tnpo(batch: Batch, settings: Settings) -> Tensor:
    """NPO of single tokens: (2/beta) mean_t softplus(beta (log p_t - log p_ref,t)).

    Source: arXiv 2502.19301, where it is the token-wise form of NPO.
    """
    rows = batch.rows("forget")
    ratio = _token_logps(rows) - require(rows.ref_token_logps, "reference log-probabilities of tokens")
    return batch.token_mean(ratio_loss(ratio, settings.beta))


def catnip(batch: Batch, settings: Settings) -> Tensor:
    """NPO against the reverse policy: mean_s (1/|y_s|) sum_t (2/beta) softplus(beta (log p_t - sg[log(1 - p_t)])).

    Reconstructed. Stated by the source (arXiv 2602.02824): the reference is 1 - p, tokens are averaged instead of
    summed, no retain data. Filled in: the constant 2/beta of NPO, and that no gradient passes through the reference, as
    in NPO. So at beta = 1 a token weighs 2p, "in proportion to the model's confidence". With a gradient through
    1 - p it would be twice CE-U's at beta = 1.
    """
    rows = batch.rows("forget")
    logps = _token_logps(rows)
    ratio = logps - _miss(logps.detach()).clamp(min=LEAST).log()
    return batch.sequence_mean(within_sequences(ratio_loss(ratio, settings.beta), rows))


def _token_logps(rows: Rows) -> Tensor:
    return require(rows.token_logps, "log-probabilities of tokens")


def _miss(logps: Tensor) -> Tensor:
    """1 - p."""
    return -torch.expm1(logps)


register_family(
    "wga",
    "WGA",
    formula="mean_tok sg[p^beta] log p",
    paper="arXiv 2502.19301",
    loss=wga,
    colour="#332288",
    reads="token",
    defaults={"beta": 1.0},
    aliases={"_rt": ("WGA",)},
)
register_family(
    "satimp",
    "SatImp",
    formula="mean_tok sg[p^beta (1 - p)^beta2] log p",
    paper="arXiv 2505.11953",
    loss=satimp,
    colour="#117733",
    reads="token",
    defaults={"beta": 5.0, "beta2": 1.0},
    rt={"forget_weight": 0.1},
    aliases={"_rt": ("SatImp",)},
)
register_family(
    "ceu",
    "CE-U",
    formula="mean_tok CE(sg[p without its label], p)",
    paper="arXiv 2503.01224",
    loss=ceu,
    colour="#882255",
    reads="statistics",
    statistics=("entropy",),
    check=check_ceu,
    aliases={"": ("CEU",)},
)
register_family(
    "tnpo",
    "TNPO",
    formula="(2/beta) mean_tok softplus(beta r_tok)",
    paper="arXiv 2502.19301",
    loss=tnpo,
    colour="#56B4E9",
    reads="token",
    reference=True,
)
register_family(
    "catnip",
    "CATNIP",
    formula="(2/beta) mean_s (1/|y_s|) sum_t softplus(beta (log p - sg[log(1 - p)]))",
    paper="arXiv 2602.02824",
    loss=catnip,
    colour="#AA4499",
    reads="token",
    reconstructed=True,
    defaults={"beta": 1.0},
)
