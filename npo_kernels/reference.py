"""The oracle: plain, readable PyTorch that materialises the logits. It defines what "correct" means.

Runs in any floating dtype, float64 included, with autograd to any order. 16-bit logits go through a float32
log-softmax, as a careful training loop does it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(
    hidden: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    targets: Tensor,  # (T,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """(T,) log softmax(z)[target], 0 where target == ignore_index; z = softcap * tanh(scale * (x W^T + b) / softcap).

    The dtype is float64 for float64 input and float32 otherwise. A target outside [0, V) gives NaN.
    """
    scored = targets != ignore_index
    # before the product: 0 times a non-finite hidden state at an ignored position would be a NaN of all gradients
    logits = F.linear(torch.where(scored.unsqueeze(-1), hidden, 0.0), lm_head_weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    vocab_size = lm_head_weight.shape[0]
    valid = (targets >= 0) & (targets < vocab_size)
    picked = targets.clamp(0, vocab_size - 1).unsqueeze(-1)
    logps = torch.log_softmax(logits, dim=-1).gather(-1, picked).squeeze(-1)
    return torch.where(scored, torch.where(valid, logps, torch.nan), 0.0)


def sum_by_sequence(token_logps: Tensor, offsets: Tensor) -> Tensor:
    """(T,) per-token values -> (B,) sums over the position ranges offsets[s]:offsets[s+1]."""
    positions = torch.arange(token_logps.shape[0], device=token_logps.device)
    sequence = torch.bucketize(positions, offsets[1:], right=True)
    sums = torch.zeros(offsets.shape[0] - 1, dtype=token_logps.dtype, device=token_logps.device)
    return sums.index_add(0, sequence, token_logps)
