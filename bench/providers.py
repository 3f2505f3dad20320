"""What is compared: functions from (hidden, weight, labels, ref_logps) to the NPO loss, all doing the same work."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_kernels import fused_npo_loss

BETA = 0.1


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, workspace_mb: float | None) -> Tensor:
    """What a training loop does without this library: logits, float32 log-softmax, gather, sum, log-sigmoid."""
    logits = F.linear(hidden, weight)[:, :-1].float()
    targets = labels[:, 1:]
    logps = torch.log_softmax(logits, dim=-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logps = (logps * (targets != -100)).sum(-1)
    return (-2.0 / BETA) * F.logsigmoid(-BETA * (logps - ref_logps)).mean()


def _fused(impl: str) -> Callable[..., Tensor]:
    def run(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, workspace_mb: float | None) -> Tensor:
        return fused_npo_loss(
            hidden, weight, labels, ref_logps=ref_logps, beta=BETA, impl=impl, workspace_mb=workspace_mb
        )

    return run


PROVIDERS = {"plain": plain, "npo_kernels/torch": _fused("torch"), "npo_kernels/triton": _fused("triton")}
