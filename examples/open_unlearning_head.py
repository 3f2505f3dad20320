"""The common parts of the fused trainers of `examples.open_unlearning`: a `compute_loss` without logits.

One forward covers forget and retain rows, and the losses are computed inside the head, where its weight is gathered
under any sharding. A reference costs one forward without logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.tiny import PAD
from npo_kernels import fused_linear_kl, fused_logprob_loss, sequence_logprobs
from npo_kernels.hf import add_fused_unlearning_head

Batch = dict[str, Tensor]
FILL = {"input_ids": PAD, "attention_mask": 0, "labels": -100}


@dataclass
class Rows:
    """A batch in the head of a model: the inputs of the losses."""

    batch: Batch
    hidden: Tensor  # (B, T, H), the last hidden states
    weight: Tensor  # (V, H)
    head: dict[str, Any]  # bias, logit_scale, softcap, and the options of fused calls
    activations: Any  # (B, T, D), the output of the layer that RMU steers; None in other trainers

    def __call__(self, function: Callable, labels: Tensor | None = None, **arguments) -> Any:
        """A function of `npo_kernels` on these rows."""
        labels = self.batch["labels"] if labels is None else labels
        return function(self.hidden, self.weight, labels, **self.head, **arguments)

    def kl(self, ref: "Rows", **arguments) -> Tensor:
        arguments |= {"ref_bias": ref.head["bias"], **self.head}
        return fused_linear_kl(self.hidden, self.weight, ref.hidden, ref.weight, **arguments)


class FusedLoss:
    """A `compute_loss` without logits: a subclass adds the forget term."""

    options: ClassVar[dict[str, Any]] = {}  # impl and workspace_mb of the fused calls
    published_rows: bool | str = False  # True: OpenUnlearning's values where they differ (UNDIAL, PDU, RMU)
    loss_is_scaled_for_ga = False  # a mean over the micro-batch, as in the trainers: the Trainer divides
    # attributes of the trainers
    gamma: float
    alpha: float
    retain_loss_type: str
    ref_model: nn.Module
    # the layer that RMU steers, in the model and in the reference
    model_module: nn.Module | None = None
    ref_module: nn.Module | None = None

    def __init__(self, *args, model, **kwargs):
        model = add_fused_unlearning_head(model)  # before ref_model is copied from it
        super().__init__(*args, **kwargs | {"model": model})
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batches = [self.forget_batch(inputs["forget"])]
        if self.uses_retain:
            batches.append(inputs["retain"])
        outputs = self.in_head(model, batches, self.loss, self.model_module)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    compute_unlearn_loss = compute_loss  # its name in some versions

    def compute_retain_loss(self, model, retain_inputs):
        return self.in_head(model, [retain_inputs], lambda _, rows: self.retain_loss(rows), self.model_module).loss

    def loss(self, together: Rows, forget: Rows, retain: Rows | None = None) -> Tensor:
        """The rows of each of the two parts, among all rows."""
        return self.total(self.forget_loss(forget), None if retain is None else self.retain_loss(retain))

    def total(self, forget: Tensor, retain: Tensor | None) -> Tensor:
        return self.gamma * forget if retain is None else self.gamma * forget + self.alpha * retain

    @property
    def uses_retain(self) -> bool:
        return self.alpha != 0

    def forget_batch(self, inputs) -> Batch:
        return inputs

    def forget_loss(self, rows: Rows) -> Tensor:
        raise NotImplementedError

    def retain_loss(self, rows: Rows) -> Tensor:
        if self.retain_loss_type == "NLL":
            return rows(fused_logprob_loss, loss_fn=mean_nll)
        if self.retain_loss_type == "KL":
            return self.in_reference(rows, rows.kl)
        raise NotImplementedError(f"retain_loss_type: expected NLL or KL, got {self.retain_loss_type}")

    def in_head(self, model: nn.Module, batches: list[Batch], loss: Callable, layer: nn.Module | None = None) -> Any:
        """The output of one forward over all batches, its loss `loss(all rows, those of each batch, ...)`."""
        together = stack(batches)
        sizes = [batch["labels"].shape for batch in batches]

        def parts(t: Tensor) -> list[Tensor]:
            rows = t.split([count for count, _ in sizes])
            return [t, *(part[:, :length] for part, (_, length) in zip(rows, sizes, strict=True))]

        def function(hidden, weight, labels, *, bias, logit_scale, softcap, **layout):
            head = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap, **self.options}
            seen = parts(outputs[0]) if outputs else [None] * (1 + len(batches))
            pieces = zip([together, *batches], parts(hidden), seen, strict=True)
            return loss(*(Rows(batch, part, weight, head, layer_part) for batch, part, layer_part in pieces))

        with outputs_of(layer) as outputs:
            return model(**together, fused_unlearning=function)

    def in_reference(self, rows: Rows, loss: Callable[[Rows], Tensor]) -> Tensor:
        """`loss` of the same rows in the head of the reference, where its weight is gathered."""
        wanted = torch.is_grad_enabled()

        def function(_, ref_rows):  # the reference needs no gradient, the loss does
            with torch.set_grad_enabled(wanted):
                return loss(ref_rows)

        with torch.no_grad():
            return self.in_head(self.ref_model, [rows.batch], function, self.ref_module).loss

    @torch.no_grad()
    def with_reference(self, batch: Batch) -> Batch:
        """The batch with `ref_logps` (B,), summed log-probabilities under the reference."""
        logps = self.ref_model(**stack([batch]), fused_unlearning=partial(sequence_logprobs, **self.options)).logps
        return batch | {"ref_logps": logps}


def stack(batches: list[Batch]) -> Batch:
    """One batch of the rows of several, padded on the right to the longest."""
    longest = max(batch["labels"].shape[1] for batch in batches)

    def padded(name: str, batch: Batch) -> Tensor:
        return F.pad(batch[name], (0, longest - batch[name].shape[1]), value=FILL[name])

    return {name: torch.cat([padded(name, batch) for batch in batches]) for name in FILL}


@contextmanager
def outputs_of(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """Records the output of a layer while active."""
    found: list[Tensor] = []
    if layer is None:
        yield found
        return

    def keep(module, inputs, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def mean_nll(logps: Tensor, num_tokens: Tensor) -> Tensor:
    return -logps.sum() / num_tokens.sum()
