"""The scalars that providers compute, as functions of sequence log-probabilities: the oracle of the accuracy suite.

logps, num_tokens, ref_logps are (B,). `num_forget` sequences are the forget set and come first, the others are the
retain set. A provider that cannot express NPO computes one of the other objectives; its records name it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1


def npo(logps: Tensor, num_tokens: Tensor, ref_logps: Tensor, num_forget: int) -> Tensor:
    """mean_forget (2/beta) softplus(beta (logp - ref)), arXiv 2404.05868; plus the retain NLL per token, if any."""
    loss = (2 / BETA) * F.softplus(BETA * (logps[:num_forget] - ref_logps[:num_forget])).mean()
    if num_forget < logps.shape[0]:
        loss = loss - logps[num_forget:].sum() / num_tokens[num_forget:].sum()
    return loss


def ce(logps: Tensor, num_tokens: Tensor, ref_logps: Tensor, num_forget: int) -> Tensor:
    """-sum logp / number of tokens: one weight for all rows."""
    return -logps.sum() / num_tokens.sum()


def dpo(logps: Tensor, num_tokens: Tensor, ref_logps: Tensor, num_forget: int) -> Tensor:
    """-mean log sigmoid(beta (ratio of the first half - ratio of the second)), arXiv 2305.18290."""
    first, second = (logps - ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (first - second)).mean()


def kto(logps: Tensor, num_tokens: Tensor, ref_logps: Tensor, num_forget: int) -> Tensor:
    """mean (1 - sigmoid(+-beta ratio)), - for forget sequences, with a KL baseline of 0: arXiv 2402.01306."""
    sign = torch.ones_like(logps)
    sign[:num_forget] = -1
    return (1 - torch.sigmoid(BETA * sign * (logps - ref_logps))).mean()


OBJECTIVES = {"npo": npo, "ce": ce, "dpo": dpo, "kto": kto}
