"""Read the output of one decoder layer during a forward; the layers above are skipped if nothing needs them."""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.require import require


class LayerTap:
    """Keeps the output of decoder layer `layer` from the last forward, until `read` returns it.

    Args:
        model: a causal language model, or one with adapters.
        layer: its number, from 0. None: 7 as in the RMU papers, or the last layer of a smaller model.
        alone: the layers above are not run, in training mode ("training") or ever ("always"). Only for forwards whose
            results come from the layer alone; models that look at `config.num_hidden_layers` in their forward, as
            nearly all of transformers' do, save the time, others run as they would.
    """

    def __init__(self, model: PreTrainedModel, layer: int | None, alone: str | None = None):
        self.inner: Any = getattr(model, "get_base_model", lambda: model)()
        self.config = self.inner.config.get_text_config()
        layers = decoder_layers(self.inner, self.config.num_hidden_layers)
        self.layer = min(7, len(layers) - 1) if layer is None else layer
        if not 0 <= self.layer < len(layers):
            raise ValueError(f"layer: the model has decoder layers 0 to {len(layers) - 1}, got {layer}")
        self.below = layers[: self.layer + 1]
        self._output: Tensor | None = None
        self._handles = [layers[self.layer].register_forward_hook(self._keep)]
        if alone is not None:
            always = alone == "always"
            decoder = self.inner.base_model

            def cut(module: nn.Module, args: Any) -> None:
                if always or module.training:
                    self.config.num_hidden_layers = self.layer + 1

            def restore(module: nn.Module, args: Any, output: Any) -> None:
                self.config.num_hidden_layers = len(layers)

            self._handles += [
                decoder.register_forward_pre_hook(cut),
                decoder.register_forward_hook(restore, always_call=True),
            ]

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = output[0] if isinstance(output, tuple) else output

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerTap":
        """For a copied model: drop the last output, which may hold an autograd graph."""
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy({k: v for k, v in vars(self).items() if k != "_output"}, memo), _output=None)
        return copied

    def remove(self) -> None:
        """Remove the tap from the model. Parameters frozen by `freeze_above` stay frozen."""
        for handle in self._handles:
            handle.remove()

    def read(self) -> Tensor:
        """The (B, S, H) output of the last forward. It can be read once."""
        output, self._output = require(self._output, "a forward of the model"), None
        return output

    def freeze_above(self) -> None:
        """Freeze what this output does not depend on: the layers above, the final norm, an untied head.

        Architectures name and place these differently, so a forward of two tokens tells. What is in the layers up to
        this one is kept in any case: experts may not have been chosen. ValueError where nothing is left to train.
        """
        trained = [p for p in self.inner.parameters() if p.requires_grad]
        kept = {id(p) for p in self.below.parameters()}
        tokens = torch.tensor([[0, 1]], device=self.inner.device)
        with torch.random.fork_rng(), torch.enable_grad():
            self.inner.base_model(tokens, use_cache=False)
        output = self.read().sum()
        unused: list[Tensor | None] = [None] * len(trained)
        gradients = torch.autograd.grad(output, trained, allow_unused=True) if output.requires_grad else unused
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None or id(parameter) in kept)
        if not any(p.requires_grad for p in trained):
            raise ValueError(
                f"nothing is trained: expected --train_only to match parameters of layers 0 to {self.layer}, which the "
                "output of the steered layer depends on; choose them, or a higher --layer"
            )


def decoder_layers(model: nn.Module, number: int) -> nn.ModuleList:
    """ValueError if the model has no list of that many layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {number} decoder layers")


def train_only(model: torch.nn.Module, pattern: str) -> None:
    """Freeze every parameter whose full name does not match. ValueError if none matches."""
    matching = re.compile(pattern)
    chosen = [name for name, p in model.named_parameters() if p.requires_grad and matching.fullmatch(name)]
    if not chosen:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        raise ValueError(f"--train_only {pattern}: no parameter has such a name; there are {', '.join(names[:4])}, ...")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
