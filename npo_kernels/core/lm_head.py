"""The lm-head with all that is applied to its logits: z = softcap * tanh(logit_scale * (x W^T + b) / softcap)."""

from dataclasses import dataclass, replace

from torch import Tensor

RULED_OUT = -1e30  # replaces a bias of -inf: it gives probability 0 as well, but finite differences of logits


@dataclass(frozen=True)
class Head:
    """Weight, optional bias, and the logit scale and softcap that some models apply, in this order."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    def columns(self, begin: int, end: int) -> "Head":
        """The head restricted to the vocabulary slice [begin, end), as views."""
        bias = None if self.bias is None else self.bias[begin:end]
        return Head(self.weight[begin:end], bias, self.logit_scale, self.softcap)

    def with_finite_bias(self) -> "Head":
        """The head with its bias clamped to finite values, for differences of logits: -inf minus -inf is NaN."""
        return self if self.bias is None else replace(self, bias=self.bias.float().clamp(min=RULED_OUT))
