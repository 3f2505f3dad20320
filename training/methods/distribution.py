"""DiPO: a preference between two next-token distributions, made of the model's own by its highest logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from npo_kernels.core.formulas import ratio_loss
from npo_kernels.core.matmul import matmul, project
from npo_kernels.core.plan import default_workspace
from training.methods.base import Sizes, register_family
from training.methods.rows import Batch, Head
from training.methods.settings import Settings
from training.require import require

HELD = 3  # float32 tensors of the size of a chunk's logits that are there at a time


def dipo(batch: Batch, settings: Settings) -> Tensor:
    """Distribution preference: (2/beta) mean_s softplus(-beta (D_memory,s - D_forget,s)).

    q_memory and q_forget are the model's own distribution, without a gradient, with its `top_k` highest logits raised
    and lowered by `shift`, and D_s = sum_t KL(q_t || p_t) over the answer. The distribution that forgets is preferred.

    Reconstructed. Stated by the source (arXiv 2510.04773): distributions that enhance memory and promote forgetting, by
    raising or lowering the highest logits of the model itself; a Bradley-Terry model of the difference of sequence KLs.
    Filled in: a constant shift of the top K logits, and the constant 2/beta of NPO.

    With P the mass of the top K and Z = 1 + (e^a - 1) P for a = +-shift,

        KL(q || p) = a e^a P / Z - log Z,     gradient = -(Z - 1) / Z  grad log P,

    so that log P is all that has to be known of a position.
    """
    rows = batch.rows("forget")
    hidden = require(rows.hidden, "hidden states")
    log_mass = log_top_mass(hidden, require(rows.head, "the head"), settings.top_k)
    preference = _kl(log_mass, settings.shift) - _kl(log_mass, -settings.shift)
    sums = preference.new_zeros(len(rows.num_tokens)).index_add(0, require(rows.sequence, "tokens"), preference)
    return batch.sequence_mean(ratio_loss(-sums, settings.beta))


def check(settings: Settings, sizes: Sizes) -> str:
    if settings.top_k < sizes.vocab_size:
        return ""
    return f"--top_k: expected less than the vocabulary of {sizes.vocab_size}, got {settings.top_k}"


def _kl(log_mass: Tensor, shift: float) -> Tensor:
    """(T,) KL(q || p) for the top K logits shifted by `shift` in q, which has no gradient."""
    mass, factor = log_mass.detach().exp(), torch.tensor(shift).exp().to(log_mass.device)
    gained = torch.expm1(torch.tensor(shift)).to(mass) * mass  # Z - 1
    value = shift * factor * mass / (1 + gained) - torch.log1p(gained)
    return value - gained / (1 + gained) * (log_mass - log_mass.detach())  # the second term is 0, with the gradient


def log_top_mass(hidden: Tensor, head: Head, top_k: int) -> Tensor:
    """(T,) log of the probability of the `top_k` most likely tokens, differentiable; which they are is not.

    Replaces::

        logp = (hidden @ weight.T + bias).float().log_softmax(-1)       # with logit_scale and softcap
        logp.topk(top_k).values.logsumexp(-1)

    Logits are there for as many rows at a time as the workspace holds (`npo_kernels.core.plan`), in the backward once
    more: 4 products in all.
    """
    if not 0 < top_k < head.weight.shape[0]:
        raise ValueError(f"top_k: expected 1 to {head.weight.shape[0] - 1}, below the vocabulary, got {top_k}")
    weight, bias = head.weight, head.bias
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LogTopMass.apply(hidden, weight, bias, head.logit_scale, head.softcap, top_k)


class _LogTopMass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, top_k: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.settings = scale, softcap, top_k
        found = [_rows(part, weight, bias, scale, softcap, top_k).log_mass for part in _chunks(hidden, weight)]
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        scale, softcap, top_k = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros(bias.shape, device=bias.device) if bias is not None else None
        first = 0
        for part in _chunks(hidden, weight):
            rows = slice(first, first := first + len(part))
            found = _rows(part, weight, bias, scale, softcap, top_k)
            # d log P / d z_v = p_v (1 - P) / P among the top K, -p_v elsewhere
            share = found.inside * found.rest / found.inside.sum(1, keepdim=True)
            grad = found.outside.neg_().scatter_(1, found.top, share)
            grad *= scale * upstream[rows, None]
            if softcap is not None:
                grad *= found.logits.div_(softcap).square_().neg_().add_(1)
            operand = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = matmul(operand, weight).to(hidden.dtype)
            if grad_weight is not None:
                matmul(operand.t(), part, out=grad_weight)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunks(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    rows = default_workspace(hidden.device) // (4 * HELD * len(weight))
    return hidden.split(max(1, rows)) if len(hidden) else ()


class _Rows(NamedTuple):
    """Of n rows. 1 - P is a sum, which keeps its digits where P is nearly 1; so does log P."""

    log_mass: Tensor  # (n,)
    logits: Tensor  # (n, V)
    outside: Tensor  # (n, V) probabilities, 0 among the top K
    inside: Tensor  # (n, K) those of the top K
    top: Tensor  # (n, K) int64
    rest: Tensor  # (n, 1) 1 - P


def _rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, top_k: int
) -> _Rows:
    z = torch.empty(len(hidden), len(weight), device=hidden.device)
    project(hidden.contiguous(), weight, z)
    if bias is not None:
        z += bias
    z *= scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    high, top = z.topk(top_k)
    total = z.logsumexp(1, keepdim=True)
    probability = (z - total).exp_()
    inside = probability.gather(1, top)
    outside = probability.scatter_(1, top, 0.0)
    rest = outside.sum(1, keepdim=True)
    log_mass = torch.where(rest < 0.5, torch.log1p(-rest), high.logsumexp(1, keepdim=True) - total)
    return _Rows(log_mass.squeeze(1), z, outside, inside, top, rest)


register_family(
    "dipo",
    "DiPO",
    formula="(2/beta) mean_s softplus(-beta sum_t (KL(q_memory || p) - KL(q_forget || p)))",
    paper="arXiv 2510.04773",
    loss=dipo,
    colour="#661100",
    reads="hidden",
    products=4,
    check=check,
    reconstructed=True,
)
