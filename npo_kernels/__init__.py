"""npo_kernels: losses for language-model unlearning, computed from last hidden states without full-vocabulary logits.

    from npo_kernels import fused_npo_loss
    loss = fused_npo_loss(hidden, model.lm_head.weight, labels, ref_logps=ref_logps, beta=0.1)

`fused_npo_loss` and `fused_simnpo_loss` are the losses of the papers. `fused_logprob_loss` takes any loss of sequence
log-probabilities, and `fused_token_loss` any loss of token log-probabilities. `sequence_logprobs` and `token_logprobs`
are the primitives, and compute the cached `ref_logps`. `fused_linear_kl` is the KL retain term. `token_statistics`
returns the entropy and other statistics of the predictions. `explain` returns the mode and the memory that a call would
use.
"""

from npo_kernels.core.value_checks import set_debug
from npo_kernels.explain import explain
from npo_kernels.linear_kl import fused_linear_kl
from npo_kernels.logprobs import sequence_logprobs, token_logprobs
from npo_kernels.losses import LossStats, fused_npo_loss, fused_simnpo_loss
from npo_kernels.statistics import token_statistics
from npo_kernels.user_losses import LogprobStats, TokenStats, fused_logprob_loss, fused_token_loss

__version__ = "0.1.0"

__all__ = [
    "LogprobStats",
    "LossStats",
    "TokenStats",
    "explain",
    "fused_linear_kl",
    "fused_logprob_loss",
    "fused_npo_loss",
    "fused_simnpo_loss",
    "fused_token_loss",
    "sequence_logprobs",
    "set_debug",
    "token_logprobs",
    "token_statistics",
]
