"""What a call has to give, in plain code that shares nothing with the package: logits of the scored positions alone.

In float64 it is the truth, in float32 what plain PyTorch loses. `rounding` is done to the gradient of the logits: in 16
bits a training loop rounds it, even one that keeps its logits in float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.calls import Call
from tests.fuzz.tensors import scored

Rounding = Callable[[Tensor], Tensor]
Outputs = dict[str, Tensor]  # "value" is what is differentiated


def of_sequences(logps: Tensor, num_tokens: Tensor) -> Tensor:
    """The loss that `fused_logprob_loss` is given: no two sequences weigh the same, and it mixes them."""
    weights = torch.arange(logps.shape[0]) % 3 - 0.7
    return (weights * logps / (1 + num_tokens)).sum() + F.softplus(logps.sum() / 50)


def of_tokens(token_logps: Tensor, sequence: Tensor, num_tokens: Tensor) -> Tensor:
    """The loss that `fused_token_loss` is given: of tokens, sequences and lengths."""
    weights = 1 + torch.arange(token_logps.shape[0]) / 7
    sums = torch.zeros(num_tokens.shape, dtype=token_logps.dtype).index_add(0, sequence, token_logps)
    per_token = (weights * F.softplus(token_logps + sequence)).sum()
    return per_token + (sums / num_tokens.clamp(min=1)).sum() * 0.3


class _Rounded(torch.autograd.Function):
    """The identity, whose gradient is rounded."""

    @staticmethod
    def forward(ctx, t, rounding):
        ctx.rounding = rounding
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.rounding(grad), None


def expected(call: Call, t: dict[str, Tensor], rounding: Rounding | None = None) -> Outputs:
    """The outputs of a call whose tensors are `t`, in the dtype of its hidden states."""
    return FUNCTIONS[call.function](call, t, rounding)


def _logits(call: Call, t: dict[str, Tensor], rounding: Rounding | None = None, side: str = "") -> Tensor:
    """(N, V) of the scored positions."""
    hidden, weight, bias = (t.get(side + name) for name in ("hidden", "weight", "bias"))
    z = hidden.reshape(-1, hidden.shape[-1])[t["counted"]] @ weight.t()
    z = (z if bias is None else z + bias) * call.logit_scale
    if call.softcap is not None:
        capped = call.softcap * torch.tanh(z / call.softcap)
        if rounding is not None:  # the slope is 1 - tanh^2, so it is off by a unit of 1
            capped = capped + (z - z.detach()) * _units(call, z, rounding)
        z = capped
    return z if rounding is None else _Rounded.apply(z, rounding)


def _units(call: Call, like: Tensor, rounding: Rounding) -> Tensor:
    """Some rounding units of float32, of the sign and size that `rounding` draws."""
    wide = torch.float64 if call.dtype == "float64" else torch.float32
    unit = torch.finfo(call.working_dtype).eps / torch.finfo(wide).eps
    return (rounding(torch.ones_like(like)) - 1).detach() * 8 / unit


def _tokens(call: Call, t: dict[str, Tensor], rounding: Rounding | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probabilities (N,), sequence (N,), their sums (B,), num_tokens (B,)) of the scored tokens."""
    rows, B = scored(call, t["labels"]), len(call.lengths)
    labels, sequence = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (1, 2))
    z = _logits(call, t, rounding)
    tokens = _log_softmax_at(z, labels)
    if rounding is not None and call.working_dtype == torch.float16:  # whose smallest exponential is 2^-24
        tokens = tokens + ((z - z.detach()) * _units(call, z, rounding)).sum(1)
    member = sequence == torch.arange(B)[:, None]  # (B, N)
    logps = torch.where(member, tokens, 0.0).sum(1)
    if rounding is not None:  # a sum of many
        logps = logps * (1 + _units(call, logps, rounding))
    return tokens, sequence, logps, member.sum(1)


def _log_softmax_at(z: Tensor, labels: Tensor) -> Tensor:
    """(N,) log-probabilities of the labels; near 0 as well they have all their digits."""
    others = torch.arange(z.shape[1]) != labels[:, None]
    target = z.gather(1, labels[:, None])
    top = torch.maximum(target, z.detach().amax(1, keepdim=True))
    lead = torch.where(others, (z - target).clamp(max=0), -torch.inf)  # a label that is the largest
    certain = -lead.exp().sum(1).log1p()
    usual = (target - top)[:, 0] - (z - top).exp().sum(1).log()
    return torch.where((target >= z.detach()).all(1), certain, usual)


def _spread(call: Call, t: dict[str, Tensor], values: Tensor, empty: float = 0) -> Tensor:
    """(N,) values at their positions, `empty` elsewhere."""
    total = t["labels"].numel()
    return values.new_full((total,), empty).index_put((t["counted"],), values).view(call.shape)


def _ratio_loss(call: Call, t: dict[str, Tensor], logps: Tensor, ratio: Tensor, counts: Tensor) -> Outputs:
    weights = t["weights"].to(logps.dtype) if "weights" in t else torch.ones_like(logps)
    counted = (counts > 0) & (weights != 0)
    losses = -2 / call.beta * F.logsigmoid(-call.beta * torch.where(counted, ratio, 0.0))
    losses = torch.where(counted, torch.where(counted, weights, 0.0) * losses, 0.0)
    if call.reduction == "none":
        value = losses
    elif call.reduction == "sum":
        value = losses.sum()
    else:
        divisor = max(1, int((counts > 0).sum())) if call.normalizer is None else call.normalizer
        value = losses.sum() / (7 if isinstance(divisor, str) else divisor)
    stats = {"logps": logps, "num_tokens": counts}
    usual = ratio.isfinite()  # the log_ratio of a NaN reference is unspecified
    stats |= {"log_ratio": torch.where(usual, ratio, 0.0)}
    stats |= {"weight": torch.where(usual, 2 * torch.sigmoid(call.beta * ratio), 0.0), "usual": usual}
    return {"value": value, **{name: stat.detach() for name, stat in stats.items()}}


def _npo(call: Call, t: dict[str, Tensor], rounding: Rounding | None) -> Outputs:
    _, _, logps, counts = _tokens(call, t, rounding)
    return _ratio_loss(call, t, logps, logps - t["ref_logps"].to(logps.dtype), counts)


def _simnpo(call: Call, t: dict[str, Tensor], rounding: Rounding | None) -> Outputs:
    _, _, logps, counts = _tokens(call, t, rounding)
    return _ratio_loss(call, t, logps, logps / counts.clamp(min=1) + call.gamma, counts)


def _logprob(call: Call, t: dict[str, Tensor], rounding: Rounding | None) -> Outputs:
    _, _, logps, counts = _tokens(call, t, rounding)
    return {"value": of_sequences(logps, counts), "logps": logps.detach(), "num_tokens": counts}


def _token(call: Call, t: dict[str, Tensor], rounding: Rounding | None) -> Outputs:
    tokens, sequence, logps, counts = _tokens(call, t, rounding)
    stats = {"token_logps": tokens.detach(), "sequence": sequence, "logps": logps.detach(), "num_tokens": counts}
    return {"value": of_tokens(tokens, sequence, counts), **stats}


def _sequence_logprobs(call: Call, t: dict[str, Tensor], rounding: Rounding | None) -> Outputs:
    _, _, logps, counts = _tokens(call, t, rounding)
    return {"value": logps, "num_tokens": counts}


def _token_logprobs(call: Call, t: dict[str, Tensor], rounding: Rounding | None) -> Outputs:
    return {"value": _spread(call, t, _tokens(call, t, rounding)[0])}


def _statistics(call: Call, t: dict[str, Tensor], rounding: Rounding | None) -> Outputs:
    labels = torch.tensor([label for _, label, _ in scored(call, t["labels"])], dtype=torch.int64)
    z = _logits(call, t, rounding)
    log_p = z - z.logsumexp(1, keepdim=True)
    entropy = -(log_p.exp() * log_p).sum(1)
    largest, column = z.max(1)
    all_of_them = {
        "logp": _log_softmax_at(z, labels),
        "entropy": entropy,
        "max_logit": largest,
        "mean_logit": z.mean(1),
        "var_logp": (log_p.exp() * (log_p + entropy[:, None]).square()).sum(1),
    }
    wanted = [_spread(call, t, all_of_them[name]) for name in call.which if name != "argmax"]
    outputs = {"value": torch.stack(wanted) if wanted else z.new_zeros(0, *call.shape)}
    if "argmax" in call.which:
        outputs["argmax"] = _spread(call, t, column, call.ignore_index)
    # columns that are this near are the largest for anybody who rounds
    outputs["logits"] = z.detach()
    return outputs


def _kl(call: Call, t: dict[str, Tensor], rounding: Rounding | None) -> Outputs:
    z, ref = _logits(call, t, rounding), _logits(call, t, side="ref_")
    if call.target_shift:
        labels = t["labels"].reshape(-1)[t["counted"]]
        ref = ref - call.target_shift * F.one_hot(labels, call.V)
    p, q = ref.log_softmax(1), z.log_softmax(1)
    if call.reverse:
        p, q = q, p
    values = (p.exp() * (p - q)).sum(1)
    if rounding is not None:  # the gradient is a difference of probabilities, each off by a unit of its own
        sizes = torch.maximum(p, q).exp().detach()
        if call.reverse:  # times the difference of its logarithm and the KL
            sizes = sizes * (1 + values.detach()[:, None] + (p - q).detach().abs())
        values = values + ((z - z.detach()) * sizes * _units(call, z, rounding)).sum(1)
    if call.reduction == "none":
        return {"value": _spread(call, t, values)}
    return {"value": values.sum() / (max(1, values.shape[0]) if call.reduction == "mean" else 1)}


FUNCTIONS: dict[str, Callable[[Call, dict[str, Tensor], Rounding | None], Outputs]] = {
    "npo": _npo,
    "simnpo": _simnpo,
    "logprob": _logprob,
    "token": _token,
    "sequences": _sequence_logprobs,
    "tokens": _token_logprobs,
    "statistics": _statistics,
    "kl": _kl,
}
