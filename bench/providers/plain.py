"""PyTorch alone: what a training loop does without a library, compiled or not, and torch's own fused cross-entropy."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import IGNORED, Batch
from bench.providers.base import Provider, UnsupportedError, from_tokens, without_softcap


def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Logits in the dtype of the model, float32 log-softmax, gather; (B, S)."""
    logits = F.linear(hidden, weight).float()
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


def product(batch: Batch) -> Tensor:
    """The logits and nothing else: what log-probabilities alone are measured against."""
    hidden, weight, _ = batch.flat
    return hidden @ weight.t()


def linear_cross_entropy(batch: Batch, reduction: str) -> Tensor:
    """torch's chunked form, which `options` turn on; in plain form it is what `plain/eager` is."""
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
    from_tokens("plain/compile", "torch", compiled_tokens),
    Provider("plain/product", "torch", "product", True, None, product),
    Provider("torch/linear_ce", "torch", "ce", True, lambda batch: linear_cross_entropy(batch, "mean")),
    from_tokens("torch/linear_ce-none", "torch", chunked_tokens),
]
