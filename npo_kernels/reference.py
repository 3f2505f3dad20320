"""impl="reference": plain PyTorch that materialises the logits. It defines the correct result.

It runs in any floating dtype, including float64, and supports derivatives of any order. 16-bit logits are converted to
float32 before the log-softmax.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_kernels.core.lm_head import Head


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
    """(T,) log softmax(z)[target], with z from `logits`; 0 where target == ignore_index.

    The dtype is float64 for float64 input and float32 otherwise. A target outside [0, V) gives NaN.
    """
    scored = targets != ignore_index
    # mask before the product: a non-finite hidden state at an ignored position times 0 would make all gradients NaN
    x = torch.where(scored.unsqueeze(-1), hidden, 0.0)
    logps = torch.log_softmax(logits(x, Head(lm_head_weight, bias, logit_scale, softcap)), dim=-1)
    vocab_size = lm_head_weight.shape[0]
    valid = (targets >= 0) & (targets < vocab_size)
    picked = targets.clamp(0, vocab_size - 1).unsqueeze(-1)
    logps = logps.gather(-1, picked).squeeze(-1)
    return torch.where(scored, torch.where(valid, logps, torch.nan), 0.0)


def token_statistics(x: Tensor, head: Head, targets: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    """Statistics of the next-token distribution (`npo_kernels.statistics`), (T,) each; 0 where target == ignore_index.

    A target outside [0, V) gives NaN.
    """
    scored = targets != ignore_index
    # mask before the product: a non-finite hidden state at an ignored position times 0 would make all gradients NaN
    z = logits(torch.where(scored.unsqueeze(-1), x, 0.0), head)
    vocab_size = head.weight.shape[0]
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    finite = torch.where(p == 0, 0.0, log_p)  # 0 log 0 = 0
    entropy = -(p * finite).sum(-1)
    values = {
        "logp": log_p.gather(-1, targets.clamp(0, vocab_size - 1).unsqueeze(-1)).squeeze(-1),
        "entropy": entropy,
        "max_logit": z.max(-1).values,
        "mean_logit": z.mean(-1),
        "var_logp": (p * (finite + entropy.unsqueeze(-1)).square()).sum(-1),
    }
    valid = (targets >= 0) & (targets < vocab_size)
    found = {name: torch.where(scored, torch.where(valid, v, torch.nan), 0.0) for name, v in values.items()}
    return found | {"argmax": torch.where(scored, z.argmax(-1), ignore_index)}


def sum_by_sequence(token_logps: Tensor, offsets: Tensor) -> Tensor:
    """(B,) sums of the per-token values (T,) over the positions [offsets[s], offsets[s+1])."""
    positions = torch.arange(token_logps.shape[0], device=token_logps.device)
    sequence = torch.bucketize(positions, offsets[1:], right=True)
    sums = torch.zeros(offsets.shape[0] - 1, dtype=token_logps.dtype, device=token_logps.device)
    return sums.index_add(0, sequence, token_logps)


def linear_kl(
    x: Tensor,  # (N, H)
    head: Head,
    ref_x: Tensor,  # (N, H_ref)
    ref_head: Head,
    labels: Tensor | None = None,  # (N,) int64
    target_shift: float = 0.0,
    reverse: bool = False,
) -> Tensor:
    """(N,) KL(reference || model) of the next-token distributions, or KL(model || reference) if `reverse`.

    The reference's logit at the label is lowered by `target_shift`. The dtype is float64 for float64 input and float32
    otherwise. A label outside [0, V) gives NaN.
    """
    z, ref_z = logits(x, head), logits(ref_x, ref_head)
    if labels is not None:
        valid = ((labels >= 0) & (labels < z.shape[-1])).unsqueeze(-1)
        picked = labels.clamp(0, z.shape[-1] - 1).unsqueeze(-1)
        lowering = ref_z.new_full(picked.shape, -target_shift).masked_fill(~valid, torch.nan)
        ref_z = ref_z.scatter_add(-1, picked, lowering)
    logp, ref_logp = z.log_softmax(-1), ref_z.log_softmax(-1)
    p, q = (logp, ref_logp) if reverse else (ref_logp, logp)
    return (p.exp() * torch.where(p.isneginf(), 0.0, p - q)).sum(-1)  # 0 log 0 = 0


def logits(x: Tensor, head: Head) -> Tensor:
    """(N, V) softcap * tanh(logit_scale * (x W^T + b) / softcap); scale and softcap in float32 or float64."""
    z = F.linear(x, head.weight, head.bias)
    z = head.logit_scale * (z if z.dtype == torch.float64 else z.float())
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
