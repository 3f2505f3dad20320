"""Inputs of a case: random hidden states, head and labels of a given shape, the same for every provider."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """N scored tokens in B sequences of equal length."""

    name: str
    N: int
    H: int
    V: int
    B: int

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden (B, N/B + 1, H) and weight (V, H), both requiring grad; labels; ref_logps near the policy's."""
        generator = torch.Generator().manual_seed(0)
        length = self.N // self.B + 1  # the last position of a sequence is scored on nothing
        hidden = torch.randn(self.B, length, self.H, generator=generator)
        weight = torch.randn(self.V, self.H, generator=generator) / self.H**0.5
        labels = torch.randint(self.V, (self.B, length), generator=generator)
        ref_logps = torch.full((self.B,), -12.0 * (length - 1))
        hidden = hidden.to(device, dtype).requires_grad_()
        weight = weight.to(device, dtype).requires_grad_()
        return hidden, weight, labels.to(device), ref_logps.to(device)


CASES = {
    case.name: case
    for case in (
        Case("wide", N=4096, H=64, V=128256, B=32),  # a large vocabulary on a small model: logits are everything
        Case("wide-long", N=4096, H=64, V=128256, B=1),  # one sequence: no chunk of whole sequences fits
        Case("smollm2", N=1024, H=576, V=49152, B=16),
        Case("toy", N=96, H=32, V=1000, B=4),
    )
}
