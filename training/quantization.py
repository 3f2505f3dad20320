"""Round weights to few bits, as in served models. Needs no library or GPU; arithmetic stays in the weights' dtype.

`FORMATS` are functions (rows, columns) -> (rows, columns), each weight on the nearest level of its format. They round
every linear layer but the head, which quantisation libraries leave alone as well. Of a layer with adapters (LoRA) they
round the weights that the adapters sit on. Scales keep all of their bits: QLoRA's second rounding, of the scales, is
left out.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

BLOCK = 64  # weights that share a scale in nf4


def symmetric(weight: Tensor, bits: int) -> Tensor:
    """Rounded to 2^bits - 1 symmetric levels, s round(w / s) with s = max|row| / (2^(bits-1) - 1)."""
    levels = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / levels
    return scale * torch.round(weight / scale)


def nf4(weight: Tensor) -> Tensor:
    """s times the level of NormalFloat4 nearest to w / s, with s = max|block| of 64 weights of a row.

    The last block of a row has what is left. Source: QLoRA, arXiv 2305.14314, section 3.
    """
    levels = nf4_levels().to(weight)
    blocks = pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))  # (rows, blocks, 64); 0 is a level
    scale = blocks.abs().amax(dim=2, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return (scale * levels[nearest]).flatten(1)[:, : weight.shape[1]]


def nf4_levels() -> Tensor:
    """(16,) float64 from -1 to 1: quantiles of the normal distribution, 8 above 0 and 7 below it, divided by the last.

    They are evenly spaced in probability from 1/2 to 1 - (1/32 + 1/30) / 2, on either side of 0: the outermost levels
    of 16 and of 15 equal shares have half a share beyond them, and the mean of the two serves both sides.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    below, above = (torch.special.ndtri(torch.linspace(0.5, outermost, n + 1, dtype=torch.float64)[1:]) for n in (7, 8))
    return torch.cat([-below.flip(0), below.new_zeros(1), above]) / above[-1]


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": partial(symmetric, bits=8),
    "int4": partial(symmetric, bits=4),
    "nf4": nf4,
}


def formats_named(text: str) -> list[str]:
    """The formats in a list such as "int8,int4", without duplicates, in this order."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"--rounded: expected formats of {', '.join(FORMATS)}, got {name!r}")
    return names


def linear_weights(model: PreTrainedModel) -> list[Tensor]:
    """(outputs, inputs) of every linear layer but the head and the adapters, each once, as views of the parameters.

    A weight that embeddings share is theirs. GPT-2's Conv1D is a linear layer whose weight lies the other way.
    """
    kept = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    weights = {
        id(module.weight): module.weight.detach().t() if isinstance(module, Conv1D) else module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name
    }
    found = [weight for key, weight in weights.items() if key not in kept]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layers below its head: there is nothing to round")
    return found


@torch.no_grad()
def quantize_(model: PreTrainedModel, format: str) -> PreTrainedModel:
    """Round the weights of the model in place."""
    for weight in linear_weights(model):
        weight.copy_(FORMATS[format](weight))
    return model


@contextmanager
def rounded(model: PreTrainedModel, format: str) -> Iterator[PreTrainedModel]:
    """A context in which the model has rounded weights. They are restored bit for bit; only they are copied."""
    with restored(linear_weights(model)):
        yield quantize_(model, format)


@contextmanager
def restored(weights: Iterable[Tensor]) -> Iterator[None]:
    """A context after which these tensors have their old bits again, also after an exception."""
    kept = [(weight, weight.detach().clone()) for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)
