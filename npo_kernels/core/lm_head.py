"""The lm-head as the kernels see it: z = softcap * tanh(logit_scale * (x W^T + b) / softcap)."""

from dataclasses import dataclass, replace

from torch import Tensor

RULED_OUT = -1e30  # in place of -inf: the exponential of its distance to any other logit is 0, and it has differences


@dataclass(frozen=True)
class Head:
    """Weight, optional bias, and the two functions that some models apply to the logits, in this order."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    def columns(self, begin: int, end: int) -> "Head":
        """The head of the vocabulary slice [begin, end), as views."""
        bias = None if self.bias is None else self.bias[begin:end]
        return Head(self.weight[begin:end], bias, self.logit_scale, self.softcap)

    def with_finite_bias(self) -> "Head":
        """For differences of logits: tokens that a bias of -inf rules out in two heads would differ by NaN."""
        return self if self.bias is None else replace(self, bias=self.bias.float().clamp(min=RULED_OUT))
