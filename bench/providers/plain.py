"""PyTorch alone: a training loop without a library, compiled or not, and torch's own fused cross-entropy."""

from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import IGNORED, Batch
from bench.providers.base import Provider, UnsupportedError, from_tokens, without_softcap
from npo_kernels.core import cpu


def token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits in the dtype of the model, log-softmax in `dtype` (transformers: float32), gather; (B, S)."""
    logits = F.linear(hidden, weight).to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = torch.log_softmax(logits, dim=-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * (labels != IGNORED)


@cache
def compiled():
    return torch.compile(token_logps)


def eager_tokens(batch: Batch) -> Tensor:
    return token_logps(batch.hidden, batch.weight, batch.labels, batch.softcap)


def compiled_tokens(batch: Batch) -> Tensor:
    return compiled()(batch.hidden, batch.weight, batch.labels, batch.softcap)


def rounded_tokens(batch: Batch) -> Tensor:
    """The log-softmax in the dtype of the logits: the second convention."""
    if batch.hidden.dtype == torch.float32:
        raise UnsupportedError("float32 has one log-softmax: plain/eager")
    return token_logps(batch.hidden, batch.weight, batch.labels, batch.softcap, batch.hidden.dtype)


class Products(Provider):
    """The products that every exact method needs: one for the logits and one for each gradient, nothing else.

    Computed in the arithmetic in which the device is fastest: an upper bound on the speed of any exact method.
    """

    def step(self, batch: Batch) -> object:
        with torch.no_grad():
            x, weight = (operands(t) for t in batch.flat[:2])
            logits = x @ weight.t()
            hidden_grad = logits @ weight if batch.hidden.requires_grad else None
            return hidden_grad, logits.t() @ x if batch.weight.requires_grad else None


_copies: dict[tuple[int, torch.Size], Tensor] = {}


def operands(t: Tensor) -> Tensor:
    """Float32 copies, made in the warm-up, if a CPU has no instructions for the dtype."""
    if t.device.type != "cpu" or t.dtype == torch.float32 or cpu.native(t):
        return t
    key = t.data_ptr(), t.shape
    return _copies[key] if key in _copies else _copies.setdefault(key, t.detach().float())


def product(batch: Batch) -> Tensor:
    """The logits and nothing else: the baseline for log-probabilities alone."""
    hidden, weight, _ = batch.flat
    return hidden @ weight.t()


def linear_cross_entropy(batch: Batch, reduction: str) -> Tensor:
    """torch's chunked form, enabled by `options`; without them it equals `plain/eager`."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnsupportedError(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 does)")
    without_softcap(batch, "F.linear_cross_entropy")
    hidden, weight, labels = batch.flat
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, reduction=reduction, ignore_index=IGNORED, options=options)


def chunked_tokens(batch: Batch) -> Tensor:
    return -linear_cross_entropy(batch, "none").view(batch.labels.shape)


PROVIDERS = [
    from_tokens("plain/eager", "torch", eager_tokens),
    replace(from_tokens("plain/compile", "torch", compiled_tokens), compiles=True),
    from_tokens("plain/rounded", "torch", rounded_tokens),
    Provider("plain/product", "torch", "product", True, None, product),
    Products("plain/products", "torch", "product", True, None),
    Provider("torch/linear_ce", "torch", "ce", True, lambda batch: linear_cross_entropy(batch, "mean")),
    from_tokens("torch/linear_ce-none", "torch", chunked_tokens),
]
