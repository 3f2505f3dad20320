"""Gradients as results of operators, including those computed before the upstream gradient is known."""

from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.backends.choose import backend_of
from npo_kernels.core.gradients import Gradients
from npo_kernels.core.lm_head import Head
from npo_kernels.core.task import Needs
from npo_kernels.ops.schema import operator


class GradientTensors(NamedTuple):
    """Gradients of hidden, weight and bias. One that is not needed is an empty tensor: operators cannot return None."""

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
    """The gradients as tensors, with an empty tensor for each None."""
    return GradientTensors(
        hidden.new_empty(0) if grads.hidden is None else grads.hidden,
        head.weight.new_empty(0) if grads.weight is None else grads.weight,
        head.weight.new_empty(0) if grads.bias is None else grads.bias,
    )


def fake_gradients(hidden: Tensor, head: Head, needs: Needs) -> GradientTensors:
    """The fake of `all_tensors`: shapes and dtypes only."""
    weight = head.weight
    return GradientTensors(
        hidden.new_empty(hidden.shape) if needs.hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape) if needs.weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0]) if needs.bias else weight.new_empty(0),
    )


class Kept(NamedTuple):
    """Gradients of a scalar loss, kept until its upstream gradient is known; empty where not needed.

    Only float16 has units, and dHidden and dBias in float32 (`Task.upstream_later`).
    """

    grads: GradientTensors
    unit: Tensor  # (V,) float32: factor of each row of dWeight


def kept(grads: Gradients, hidden: Tensor, head: Head) -> Kept:
    """`all_tensors` and the unit of dWeight, or an empty tensor if it has none."""
    unit = hidden.new_empty(0, dtype=torch.float32) if grads.unit is None else grads.unit
    return Kept(all_tensors(grads, hidden, head), unit)


def fake_kept(hidden: Tensor, head: Head, needs: Needs) -> Kept:
    """The fake of `kept`: shapes and dtypes only."""
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
    """State for the backward of a loss whose gradients were computed in the forward."""

    kept: Kept
    needs: Needs
    dtype: torch.dtype  # of the inputs
    impl: str  # "torch" | "triton"

    def times(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, weight and bias in the dtype of the inputs; None where not needed."""
        hidden, weight, bias = self.kept.grads.wanted(self.needs)
        if self._can_skip_copy(upstream):  # detached, because as outputs of the forward they are part of the graph
            return (
                None if hidden is None else hidden.detach(),
                None if weight is None else weight.detach(),
                None if bias is None else bias.detach(),
            )
        return scale_gradients(ScaleCall(self, upstream)).wanted(self.needs)

    def _can_skip_copy(self, upstream: Tensor) -> bool:
        """Whether the kept gradients can be returned without a copy: upstream is exactly 1 and the graph is not kept.

        Only on a CPU, where reading upstream is free and a copy of dWeight costs a tenth of the whole loss. An operator
        must not return its inputs, so this is decided outside of `scale_gradients`, for real tensors only.
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
    """`Backend.scale_gradient` of each gradient that is needed; never in place, because the graph may be kept.

    One operator handles all of them: on a small head, an operator takes longer on the host than its kernel on the GPU.
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
