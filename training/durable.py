"""Forgetting that survives rounding: any method's loss at rounded weights (DurableUn-SAF, arXiv 2605.02196).

A model that has forgotten in bfloat16 may remember after its weights are rounded to 4 bits, because unlearning changed
them by less than half a rounding step. Sharpness-aware forgetting trains the worst rounded model nearby instead,

    L_SAF(w) = max_{|e| <= rho} L(Q(w + e))  ~  L(Q(w + rho g / |g|)),    g = dL/dw at w,

to first order, as SAM (arXiv 2010.01412) does it, with Q the rounding of the linear layers (`training.quantization`).
Q is flat nearly everywhere, so it has the gradient of the identity (straight-through, arXiv 1308.3432): dL/dw at the
rounded weights is applied to w.

Reconstructed from the paper's abstract, which names the ingredients: straight-through gradients through INT4 rounding,
and sharpness. Its exact objective, its radius and its schedule may differ. The paper's models have adapters, in whose
space it rounds; here adapters are perturbed and not rounded, and Q rounds the weights that they sit on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from training.quantization import linear_weights, quantize_, restored


class SharpnessAware:
    """Moves the weights to where the gradient of a step is computed."""

    def __init__(self, model: PreTrainedModel, format: str, rho: float):
        self.model, self.format, self.rho = model, format, rho
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.written = written(model)

    @contextmanager
    def rounded(self, backward: Callable[[], object]) -> Iterator[None]:
        """The model is at Q(w + rho g / |g|) inside, without gradients, and at w, bit for bit, after.

        `backward` adds g, that of the whole step, to the gradients; it is not called with rho 0. Where processes
        average their gradients, all of them move to the same weights.
        """
        with restored(self.written):
            if self.rho:
                backward()
                self._climb()
            quantize_(self.model, self.format)
            yield

    @torch.no_grad()
    def _climb(self) -> None:
        """w + rho g / |g|, with the norm over all trained parameters; the gradients are cleared."""
        norm = get_total_norm([p.grad for p in self.trained if p.grad is not None])
        scale = self.rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        for p in self.trained:
            if p.grad is not None:
                p.add_(p.grad * scale)
                p.grad = None


def written(model: PreTrainedModel) -> list[Tensor]:
    """The tensors that a step moves and restores, and so copies: the trained parameters and the linear layers."""
    weights = [*(p for p in model.parameters() if p.requires_grad), *linear_weights(model)]
    return list({id(weight): weight for weight in weights}.values())
