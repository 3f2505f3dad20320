"""Random legal calls of every public function: shapes, strides, dtypes, values, options and frozen parts.

Values and gradients are compared with plain code in float64 that is written here and shares nothing with the package.
What may be lost is what plain PyTorch in the same dtype loses, measured by the same code on rounded logits.
"""

import random
from functools import partial
from itertools import pairwise

import pytest
import torch

from npo_kernels import (
    fused_linear_kl,
    fused_logprob_loss,
    fused_npo_loss,
    fused_simnpo_loss,
    sequence_logprobs,
    token_logprobs,
)
from tests.support import CEILING, FLOOR, TINY

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")
CALLS = {"torch": 40, "triton": 12}  # of each function; the interpreter is slow

# ---------------------------------------------------------------------------------------------------------------------
# The oracle: float64, or the dtype of the call with float32 log-softmax
# ---------------------------------------------------------------------------------------------------------------------


def log_probabilities(call, hidden, weight, bias):
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * call.get("logit_scale", 1.0)
    if call.get("softcap") is not None:
        logits = call["softcap"] * torch.tanh(logits / call["softcap"])
    return logits - logits.logsumexp(-1, keepdim=True)


def token_values(call, hidden, weight, bias):
    """[(log-probabilities of the scored tokens, their positions)] of each sequence, and all of it flat."""
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), call["labels"].reshape(-1)
    logps = log_probabilities(call, hidden, weight, bias)
    if "cu_seqlens" in call:
        edges = call["cu_seqlens"].tolist()
    else:
        edges = list(range(0, labels.shape[0] + 1, max(1, call["labels"].shape[1])))
    flat, sequences = [logps.sum() * 0] * labels.shape[0], []
    for begin, end in pairwise(edges):
        ahead = 1 if call["shift"] else 0
        scored = [t for t in range(begin, end - ahead) if labels[t + ahead] != call["ignore_index"]]
        for t in scored:
            flat[t] = logps[t, labels[t + ahead]]
        sequences.append([flat[t] for t in scored])
    return torch.stack(flat), sequences


def sums(call, *tensors):
    flat, sequences = token_values(call, *tensors)
    counts = torch.tensor([len(s) for s in sequences])
    return torch.stack([sum(s, start=flat.sum() * 0) for s in sequences]), counts


def npo(call, *tensors):
    logps, counts = sums(call, *tensors)
    ratio = logps - call["ref_logps"].to(logps.dtype)
    return reduced(call, ratio, counts)


def simnpo(call, *tensors):
    logps, counts = sums(call, *tensors)
    return reduced(call, logps / counts.clamp(min=1) + call["gamma"], counts)


def reduced(call, ratio, counts):
    losses = torch.where(counts > 0, 2 / call["beta"] * torch.nn.functional.softplus(call["beta"] * ratio), 0.0)
    if call["reduction"] == "mean":
        return losses.sum() / max(1, int((counts > 0).sum()))
    return losses.sum() if call["reduction"] == "sum" else losses


def user_loss(logps, num_tokens):
    return (logps / (1 + num_tokens)).sum() - 0.3 * torch.logsumexp(-logps / 20, 0)


def any_loss(call, *tensors):
    return user_loss(*sums(call, *tensors))


def kl(call, hidden, weight, bias):
    logp = log_probabilities(call, hidden, weight, bias)
    constants = (call[name] for name in ("ref_hidden", "ref_lm_head_weight", "ref_bias"))
    ref = log_probabilities(call, *(None if t is None else t.to(hidden.dtype) for t in constants))
    lowered = call["target_shift"] * torch.nn.functional.one_hot(call["labels"].clamp(min=0), ref.shape[-1])
    ref = (ref - lowered).log_softmax(-1)
    p, q = (ref, logp) if call["direction"] == "forward" else (logp, ref)
    values = torch.where(call["mask"], (p.exp() * (p - q)).sum(-1), 0.0)
    if call["reduction"] == "mean":
        return values.sum() / call["mask"].sum().clamp(min=1)
    return values.sum() if call["reduction"] == "sum" else values


# name -> (function, the same in plain code)
FUNCTIONS = {
    "npo": (fused_npo_loss, npo),
    "simnpo": (fused_simnpo_loss, simnpo),
    "any loss": (partial(fused_logprob_loss, loss_fn=user_loss), any_loss),
    "sequences": (lambda *args, **kw: sequence_logprobs(*args, **kw)[0], lambda *args: sums(*args)[0]),
    "tokens": (token_logprobs, lambda call, *args: token_values(call, *args)[0].view(call["labels"].shape)),
    "kl": (fused_linear_kl, kl),
}

# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------


def contiguous(t):
    return t.contiguous()


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def every_other(t):
    return t.repeat_interleave(2, -1)[..., 1::2]


def of_wider_rows(t):
    return torch.cat((t, t, t), -1)[..., t.shape[-1] : 2 * t.shape[-1]]


def behind_an_offset(t):
    storage = torch.cat((t.new_zeros(3), t.reshape(-1)))
    return storage[3:].view(t.shape)


def expanded(t):
    """Stride 0: all rows, or all entries of a vector, are the first."""
    return t[:1].expand(t.shape) if t.shape[0] else t


def negated_view(t):
    """A view that is negated when it is read: of real tensors the imaginary part of a conjugate has it."""
    if t.dtype not in (torch.float32, torch.float64):
        return t
    return torch.complex(torch.zeros_like(t), -t).conj().imag


STRIDES = (contiguous, transposed, every_other, of_wider_rows, behind_an_offset, expanded, negated_view)


def laid_out(rng, t):
    return None if t is None else rng.choice(STRIDES)(t)


def draw(name, seed):
    """(hidden, weight, bias or None) and the other arguments of a call."""
    rng, g = random.Random(f"{name}{seed}"), torch.Generator().manual_seed(seed)
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    H, V = rng.choice((1, 2, 7, 16, 33)), rng.choice((1, 2, 9, 64, 65, 130, 201))
    B, S = rng.choice((1, 2, 5)), rng.choice((1, 2, 6, 19))
    spread, packed = rng.choice((0.1, 1.0, 3.0)), rng.random() < 0.5

    def normal(*shape, scale=1.0, dtype=dtype):
        return laid_out(rng, (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype))

    call = {"logit_scale": rng.choice((1.0, 1.0, 0.4, -1.3)), "softcap": rng.choice((None, None, 3.0, 30.0))}
    call["workspace_mb"] = rng.choice((None, TINY, 1.0 if name == "kl" else 0.2))
    shape = (B * S,) if packed else (B, S)
    hidden, weight = normal(*shape, H), normal(V, H, scale=spread / H**0.5)
    bias = normal(V, scale=0.5) if rng.random() < 0.5 else None
    if name == "kl":
        H_ref = rng.choice((H, 1, 24))
        call |= {"ref_hidden": normal(*shape, H_ref), "ref_lm_head_weight": normal(V, H_ref, scale=spread / H_ref**0.5)}
        call |= {"ref_bias": normal(V, scale=0.5) if rng.random() < 0.5 else None}
        call |= {"mask": laid_out(rng, torch.rand(shape, generator=g) < 0.7)}
        call |= {"reduction": rng.choice(("mean", "sum", "none"))}
        call |= {"direction": rng.choice(("forward", "reverse")), "target_shift": rng.choice((0.0, 3.0, -1.0))}
        call |= {"labels": laid_out(rng, torch.randint(0, V, shape, generator=g))}
        return (hidden, weight, bias), call
    ignore_index = rng.choice((-100, -1, 0))
    labels = torch.randint(0, V, shape, generator=g)
    labels[torch.rand(shape, generator=g) < 0.3] = ignore_index
    call |= {"labels": laid_out(rng, labels), "ignore_index": ignore_index, "shift": rng.random() < 0.7}
    if packed:
        edges = sorted(rng.choices(range(B * S + 1), k=B))  # some sequences are empty
        call["cu_seqlens"] = torch.tensor([0, *edges, B * S], dtype=torch.int32)
        B += 1
    if name == "npo":
        call |= {"ref_logps": normal(B, scale=10.0, dtype=torch.float32) - 3 * S}
        call["ref_logps"] = laid_out(rng, call["ref_logps"])
    if name == "simnpo":
        call |= {"gamma": rng.choice((0.0, 0.5, 4.0))}
    if name in ("npo", "simnpo"):
        call |= {"beta": rng.choice((0.01, 0.1, 1.0, 4.5)), "reduction": rng.choice(("mean", "sum", "none"))}
    return (hidden, weight, bias), call


def with_gradients(function, tensors, needs, upstream):
    """The value and the gradients of the tensors in `needs`, in the layout they came in."""
    leaves = [t if t is None else t.detach().requires_grad_(i in needs) for i, t in enumerate(tensors)]
    value = function(*leaves)
    wanted = [leaves[i] for i in needs]
    grads = torch.autograd.grad((value * upstream(value)).sum(), wanted, allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True))
    return [value.detach(), *zeros]


CASES = [(impl, name, seed) for impl, number in CALLS.items() for name in FUNCTIONS for seed in range(number)]


@pytest.mark.parametrize(("impl", "name", "seed"), CASES)
def test_values_and_gradients(impl, name, seed):
    (hidden, weight, bias), call = draw(name, seed)
    rng = random.Random(seed)
    possible = [0, 1] if bias is None else [0, 1, 2]
    needs = sorted(rng.sample(possible, rng.randint(1, len(possible))))
    function, plain = FUNCTIONS[name]
    noise = torch.Generator().manual_seed(seed)
    weights = 0.3 + torch.rand(4096, generator=noise, dtype=torch.float64)

    def upstream(value):
        return weights[: value.numel()].view(value.shape).to(value.dtype)

    def ours(x, w, b):
        keywords = {k: v for k, v in call.items() if k not in ("labels", "ref_hidden", "ref_lm_head_weight")}
        if name == "kl":
            others = call["ref_hidden"], call["ref_lm_head_weight"]
            return function(x, w, *others, labels=call["labels"], bias=b, impl=impl, **keywords)
        return function(x, w, call["labels"], bias=b, impl=impl, **keywords)

    got = with_gradients(ours, (hidden, weight, bias), needs, upstream)
    double = [None if t is None else t.double() for t in (hidden, weight, bias)]
    truth = with_gradients(partial(plain, call), double, needs, upstream)
    rounded = with_gradients(partial(plain, call), (hidden, weight, bias), needs, upstream)
    sizes = {"value": 1.0, 0: float(weight.double().norm()), 1: float(hidden.double().norm()), 2: 1.0}  # of their terms
    for part, value, theirs, exact in zip(("value", *needs), got, rounded, truth, strict=True):
        assert value.shape == exact.shape and value.isfinite().all()
        unit = 4 * max(FLOOR[torch.float32], CEILING[value.dtype])
        size = float(exact.norm())
        if size <= 1e-6 * sizes[part]:  # terms that cancel leave a rounding unit of their own
            size = sizes[part]
        allowed = 1.5 * float((theirs.double() - exact).norm()) + unit * size
        assert float((value.double() - exact).norm()) <= allowed, (part, size, str(call)[:300])
