"""Gradients as results of operators, and those that are formed before the upstream gradient is known."""

from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.backends.choose import backend_of
from npo_kernels.core.gradients import Gradients
from npo_kernels.core.lm_head import Head
from npo_kernels.core.task import Needs
from npo_kernels.ops.schema import operator


class GradientTensors(NamedTuple):
    """Of hidden, weight and bias; an empty tensor where one is not wanted, for operators return tensors only."""

    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)

    def wanted(self, needs: Needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return (
            self.hidden if needs.hidden else None,
            self.weight if needs.weight else None,
            self.bias if needs.bias else None,
        )


def all_tensors(grads: Gradients, hidden: Tensor, head: Head) -> GradientTensors:
    """The gradients that were formed, an empty tensor in place of each that was not."""
    return GradientTensors(
        hidden.new_empty(0) if grads.hidden is None else grads.hidden,
        head.weight.new_empty(0) if grads.weight is None else grads.weight,
        head.weight.new_empty(0) if grads.bias is None else grads.bias,
    )


def fake_gradients(hidden: Tensor, head: Head, needs: Needs) -> GradientTensors:
    """`all_tensors` without values."""
    weight = head.weight
    return GradientTensors(
        hidden.new_empty(hidden.shape) if needs.hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape) if needs.weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0]) if needs.bias else weight.new_empty(0),
    )


class Kept(NamedTuple):
    """Gradients of a scalar loss, kept until its upstream gradient is known; empty where not wanted.

    See `Task.upstream_later`: float16 alone has units, and dHidden and dBias in float32.
    """

    grads: GradientTensors
    unit: Tensor  # (V,) float32: what each row of dWeight is to be multiplied by


def kept(grads: Gradients, hidden: Tensor, head: Head) -> Kept:
    """`all_tensors` and the unit of dWeight, an empty tensor where it has none."""
    unit = hidden.new_empty(0, dtype=torch.float32) if grads.unit is None else grads.unit
    return Kept(all_tensors(grads, hidden, head), unit)


def fake_kept(hidden: Tensor, head: Head, needs: Needs) -> Kept:
    """`kept` without values."""
    half = hidden.dtype == torch.float16
    wide = torch.float32 if half else hidden.dtype
    fake = fake_gradients(hidden, head, needs)
    grads = GradientTensors(
        fake.hidden.to(wide) if needs.hidden else fake.hidden,
        fake.weight,
        fake.bias.to(wide) if needs.bias else fake.bias,
    )
    rows = head.weight.shape[0] if half and needs.weight else 0
    return Kept(grads, hidden.new_empty(rows, dtype=torch.float32))


class SavedGradients(NamedTuple):
    """What the backward of a loss with gradients formed in the forward needs."""

    kept: Kept
    needs: Needs
    dtype: torch.dtype  # of the inputs
    impl: str  # "torch" | "triton"

    def times(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, weight and bias, in the dtype of the inputs; None where not wanted."""
        hidden, weight, bias = self.kept.grads.wanted(self.needs)
        if self._may_be_given_away(upstream):  # detached: they hang on the graph as outputs of the forward
            return (
                None if hidden is None else hidden.detach(),
                None if weight is None else weight.detach(),
                None if bias is None else bias.detach(),
            )
        return scale_gradients(ScaleCall(self, upstream)).wanted(self.needs)

    def _may_be_given_away(self, upstream: Tensor) -> bool:
        """Whether the gradients are the results as they are: multiplied by exactly 1, and nobody walks the graph again.

        Asked on a CPU alone, where to read a number is free; a copy of dWeight costs a tenth of the whole loss there.
        Results of an operator must not be its inputs, so this is asked outside of `scale_gradients`, of real tensors.
        """
        keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
        return (
            self.impl == "torch"
            and upstream.device.type == "cpu"
            and self.dtype != torch.float16
            and type(upstream) is Tensor
            and not torch._C._functorch.is_batchedtensor(upstream)
            and not torch._C._functorch.is_legacy_batchedtensor(upstream)  # is_grads_batched=True
            and not torch.compiler.is_compiling()
            and not keeps_graph()
            and upstream.item() == 1.0
        )


class ScaleCall(NamedTuple):
    """Arguments of `scale_gradients`."""

    saved: SavedGradients
    upstream: Tensor  # ()


@operator("scale_gradients")
def scale_gradients(call: ScaleCall) -> GradientTensors:
    """`Backend.scale_gradient` of each gradient that is wanted; never in place, for the graph may be kept.

    One operator for all of them: on a small head the host needs longer for an operator than the GPU for its kernel.
    """
    (grads, unit), needs, dtype, impl = call.saved
    backend, empty = backend_of(impl), grads.hidden.new_empty
    of_rows = unit if unit.numel() else None
    return GradientTensors(
        backend.scale_gradient(grads.hidden, None, call.upstream, dtype) if needs.hidden else empty(0, dtype=dtype),
        backend.scale_gradient(grads.weight, of_rows, call.upstream, dtype) if needs.weight else empty(0, dtype=dtype),
        backend.scale_gradient(grads.bias, None, call.upstream, dtype) if needs.bias else empty(0, dtype=dtype),
    )


@scale_gradients.register_fake
def _(call: ScaleCall) -> GradientTensors:
    grads, dtype = call.saved.kept.grads, call.saved.dtype
    return GradientTensors(*(grad.new_empty(grad.shape, dtype=dtype) for grad in grads))


scale_gradients.refuse_second_derivative()
