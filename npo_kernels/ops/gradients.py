"""Gradients as results of operators, including those computed before the upstream gradient is known."""

from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.backends.choose import backend_of
from npo_kernels.core.gradients import Gradients
from npo_kernels.core.lm_head import Head
from npo_kernels.core.task import Needs
from npo_kernels.ops.schema import operator, without_autocast


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
        """The gradients of hidden, weight and bias in the dtype of the inputs; None where not needed.

        The last backward over the graph writes them into the memory of the kept ones, so that there is no second copy
        of dWeight. An operator must not write its inputs, so this is done outside of `scale_gradients`.
        """
        if not (last_backward(upstream) and self._can_be_written()):
            return scale_gradients(ScaleCall(self, upstream)).wanted(self.needs)
        # detached, because as outputs of the forward they are part of the graph
        grads = GradientTensors(*(grad.detach() for grad in self.kept.grads))
        if not self._is_one(upstream):
            with without_autocast(upstream):
                grads = scaled(self._replace(kept=Kept(grads, self.kept.unit)), upstream, in_place=True)
        # if a hook raises now, the graph stays: autograd then refuses a further backward over what has been given away
        torch.autograd.graph.increment_version(self.kept.grads)
        return grads.wanted(self.needs)

    def _can_be_written(self) -> bool:
        """Not if a hook for saved tensors has put others in their place, which are expanded or of inference mode."""
        return all(grad.is_contiguous() and not grad.is_inference() for grad in self.kept.grads)

    def _is_one(self, upstream: Tensor) -> bool:
        """Whether the kept gradients are the results. Only on a CPU, where reading upstream is free."""
        on_cpu = self.impl == "torch" and upstream.device.type == "cpu"
        return on_cpu and self.dtype != torch.float16 and upstream.item() == 1.0


def last_backward(upstream: Tensor) -> bool:
    """Whether what the forward saved is read for the last time: the graph is not kept, by retain_graph or create_graph.

    False if this cannot be known: where tensors are not real (torch.compile, fakes) or stand for several
    (is_grads_batched, vmap), and in a CUDA graph, whose backward may be replayed alone.
    """
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return (
        not torch.compiler.is_compiling()
        and type(upstream) is Tensor
        and not torch._C._functorch.is_batchedtensor(upstream)
        and not torch._C._functorch.is_legacy_batchedtensor(upstream)  # is_grads_batched=True
        and not torch.is_grad_enabled()  # create_graph=True
        and not keeps_graph()
        and not (upstream.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class ScaleCall(NamedTuple):
    """Arguments of `scale_gradients`."""

    saved: SavedGradients
    upstream: Tensor  # ()


@operator("scale_gradients")
def scale_gradients(call: ScaleCall) -> GradientTensors:
    """The gradients that are needed, times upstream, in new tensors.

    One operator handles all of them: on a small head, an operator takes longer on the host than its kernel on the GPU.
    """
    return scaled(call.saved, call.upstream)


def scaled(saved: SavedGradients, upstream: Tensor, in_place: bool = False) -> GradientTensors:
    """`Backend.scale_gradient` of each gradient that is needed."""
    (grads, unit), needs, dtype, impl = saved
    backend, empty = backend_of(impl), grads.hidden.new_empty
    rest = upstream, dtype, in_place
    of_rows = unit if unit.numel() else None
    # dWeight last: in float16 the other two take new memory, and nothing may be written in place before that has worked
    hidden = backend.scale_gradient(grads.hidden, None, *rest) if needs.hidden else empty(0, dtype=dtype)
    bias = backend.scale_gradient(grads.bias, None, *rest) if needs.bias else empty(0, dtype=dtype)
    weight = backend.scale_gradient(grads.weight, of_rows, *rest) if needs.weight else empty(0, dtype=dtype)
    return GradientTensors(hidden, weight, bias)


@scale_gradients.register_fake
def _(call: ScaleCall) -> GradientTensors:
    grads, dtype = call.saved.kept.grads, call.saved.dtype
    return GradientTensors(*(grad.new_empty(grad.shape, dtype=dtype) for grad in grads))


scale_gradients.refuse_second_derivative()
