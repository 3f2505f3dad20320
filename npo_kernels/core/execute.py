"""The modes of `npo_kernels.core.plan`, as loops over the primitives of a backend (`npo_kernels.core.backend`).

A mode computes the log-probabilities of N rows and, once the gradient of the loss with respect to them is known,
dHidden, dWeight and dBias. The only object of size V that it holds is a slab of anchored exponentials
E_iv = exp(z_iv - a_i), v != y_i. The slab does not contain any loss weight: the weight of a row is a factor of the
O(NH) operands,

    dHidden_i = target_coef_i W[y_i] - row_coef_i (E W)_i        dWeight = scatter(target_coef_i x_i) - E^T (row_coef X)

so a loss that is known only after the whole sequence needs no second pass over the vocabulary
(`softmax_stats.gradient_coefficients`).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from npo_kernels.core.backend import Backend
from npo_kernels.core.gradients import Gradients, HeadGradients
from npo_kernels.core.matmul import matmul
from npo_kernels.core.plan import GRAD_SLICE, Plan
from npo_kernels.core.softmax_stats import Statistics, concatenate
from npo_kernels.core.task import Task
from npo_kernels.core.vocab_parallel import at_anchor


def target_logits(task: Task, x: Tensor, target: Tensor) -> Tensor:
    """(n,) target logits, which anchor the exponentials."""
    z = task.backend.target_logits(x, task.head, target)
    return z if task.shard is None else task.shard.sum_owned(z, target)


def row_statistics(task: Task, x: Tensor, parts: Tensor, anchor: Tensor, z: Tensor) -> Statistics:
    """Statistics of the rows from the partial sums of their exponentials at `anchor`."""
    if task.shard is None:
        return task.backend.row_statistics(parts, anchor, z)
    stats = task.backend.row_statistics(*task.shard.gather(parts, anchor, task.backend.block_v(x)), z)
    return at_anchor(stats, anchor)


def slab_buffers(backend: Backend, x: Tensor, slices: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (begin, end, slab to write) for each slice. All slabs share one tensor: on a CPU a new one for each slice
    would cause a page fault for every page.
    """
    buffer = backend.empty_slab(x, slices[0])  # none is wider
    for begin, end in slices:
        yield begin, end, buffer[:, : end - begin]


# weigh(statistics of some rows, their slice, first, last) -> (row_coef, target_coef); the rows are those of the
# sequences [first, last)
Weigh = Callable[[Statistics, slice, int, int], tuple[Tensor, Tensor]]


def value_and_gradients(task: Task, plan: Plan, weigh: Weigh) -> tuple[Statistics, Gradients]:
    """Forward and gradients of a loss in the mode of the plan; `weigh` gives the coefficients of its gradient."""
    x = task.gather()
    if plan.mode == "slab":
        return slab_gradients(task, plan, x, weigh)
    everything = (slice(0, x.shape[0]), 0, task.rows.starts.shape[0] - 1)
    if plan.mode == "frozen":
        stats, product = expectation(task, plan, x)
        return stats, expectation_backward(task, product, weigh(stats, *everything))
    stats = log_probabilities(task, x)
    coefs = weigh(stats, *everything)
    if plan.mode == "no_grad":
        return stats, Gradients(None, None, None)
    return stats, recompute_backward(task, plan, x, stats, coefs)


def log_probabilities(task: Task, x: Tensor) -> Statistics:
    """A forward that keeps nothing of size V. One product."""
    target = task.rows.target
    z = target_logits(task, x, target)
    return row_statistics(task, x, *task.backend.partial_sums(x, task.head, target, z), z)


def expectation(task: Task, plan: Plan, x: Tensor) -> tuple[Statistics, Tensor]:
    """Forward of the frozen mode: (statistics, E W (N, H) in float32), all that its backward needs. Two products."""
    target = task.rows.target
    z = target_logits(task, x, target)
    # with a target logit of -inf, a slice whose logits are all -inf would give exp(-inf - -inf) = NaN; a slice of the
    # whole vocabulary has finite logits too
    anchor = z if len(plan.slices) == 1 else z.clamp(min=torch.finfo(torch.float32).min)
    sums, product = [], None
    for begin, end, buffer in slab_buffers(task.backend, x, plan.slices):
        slab, part, raised = task.backend.exp_logits(x, task.head, target, anchor, (begin, end), out=buffer)
        if product is not None:  # rescale the product of earlier slices where this slice raised the anchor
            product *= torch.where(raised > anchor, torch.exp(anchor - raised), 1.0).unsqueeze(1)
        anchor = raised
        sums.append(part)
        product = matmul(slab, task.head.weight[begin:end], out=product)
    del buffer, slab
    assert product is not None  # a plan has at least one slice
    parts = sums[0]
    if len(sums) > 1:  # sum again at the final anchor, so that logp is bitwise independent of the slices
        parts = torch.cat(sums)
        task.backend.resum(x, task.head, target, anchor, anchor > z, parts)
    return row_statistics(task, x, parts, anchor, z), product


def expectation_backward(task: Task, product: Tensor, coefs: tuple[Tensor, Tensor]) -> Gradients:
    """Backward of the frozen mode: O(NH)."""
    grad = task.hidden.new_zeros(task.hidden.shape, dtype=task.wide_dtype)
    finish_hidden_grad(task, product, coefs, task.rows.target, task.rows.index, grad)
    return Gradients(grad, None, None)


def finish_hidden_grad(
    task: Task, product: Tensor, coefs: tuple[Tensor, Tensor], target: Tensor, index: Tensor, out: Tensor
) -> None:
    """out[index_i] = target_coef_i W[target_i] - row_coef_i (E W)_i, summed over the ranks and rounded once."""
    row_coef, target_coef = coefs
    if task.shard is None:
        task.backend.finish_hidden_grad(product, row_coef, target_coef, task.head, target, index, out)
        return
    partial = torch.zeros_like(product)
    slots = torch.arange(product.shape[0], device=product.device)
    task.backend.finish_hidden_grad(product, row_coef, target_coef, task.head, target, slots, partial)
    task.shard.sum(partial)
    out.index_add_(0, index, partial.to(out.dtype))  # padding rows add 0


def recompute_backward(task: Task, plan: Plan, x: Tensor, stats: Statistics, coefs: tuple[Tensor, Tensor]) -> Gradients:
    """Gradients from the statistics; recomputes the exponentials one vocabulary slice at a time. Three products."""

    def slab_of(columns: tuple[int, int], out: Tensor) -> Tensor:
        return task.backend.exp_logits_at(x, task.head, task.rows.target, stats.anchor, columns, out=out)

    return gradients_of_slabs(task, plan, x, coefs, slab_of)


def gradients_of_slabs(
    task: Task,
    plan: Plan,
    x: Tensor,
    coefs: tuple[Tensor, Tensor],
    slab_of: Callable[[tuple[int, int], Tensor], Tensor],
    peaks: tuple[Tensor, Tensor] | None = None,  # (coefficient, column), (n,) each, of an additional term per row
) -> Gradients:
    """Gradients from slabs computed one vocabulary slice at a time. Two products in addition to those of the slabs."""
    product = None
    head_grads = HeadGradients(task, accumulate=False)
    head_grads.take_rows(x, *coefs, task.rows.target, peaks)
    for begin, end, buffer in slab_buffers(task.backend, x, plan.slices):
        slab = slab_of((begin, end), buffer)
        if task.needs.hidden:
            product = matmul(slab, task.head.weight[begin:end], out=product)
        head_grads.add(slab, begin, end)
    del buffer, slab
    hidden_grad = None
    if product is not None:
        if peaks is not None:
            row_coef, target_coef = coefs
            slots, sums = torch.arange(x.shape[0], device=x.device), torch.zeros_like(product)
            task.backend.finish_hidden_grad(product, row_coef, peaks[0], task.head, peaks[1], slots, sums)
            product, coefs = sums, (torch.full_like(row_coef, -1.0), target_coef)
        hidden_grad = expectation_backward(task, product, coefs).hidden
    return Gradients(hidden_grad, *head_grads.result())


def slab_gradients(task: Task, plan: Plan, x: Tensor, weigh: Weigh) -> tuple[Statistics, Gradients]:
    """Forward and gradients in one sweep over chunks of whole sequences. Three products."""
    rows, backend, head = task.rows, task.backend, task.head
    hidden_grad = task.hidden.new_zeros(task.hidden.shape, dtype=task.wide_dtype) if task.needs.hidden else None
    head_grads = HeadGradients(task, plan.accumulate)
    chunk_stats, everything = [], (0, head.weight.shape[0])
    if rows.host_starts is None:
        chunks = [(0, rows.starts.shape[0] - 1, slice(0, x.shape[0]))]
    else:
        chunks = [(a, b, slice(rows.host_starts[a], rows.host_starts[b])) for a, b in plan.chunks]
    buffer = backend.empty_slab(max((x[chunk] for _, _, chunk in chunks), key=len), everything)  # as in `slab_buffers`
    for first, last, chunk in chunks:
        some, target = x[chunk], rows.target[chunk]
        z = target_logits(task, some, target)
        slab, parts, anchor = backend.exp_logits(some, head, target, z, everything, out=buffer[: len(some)])
        stats = row_statistics(task, some, parts, anchor, z)
        chunk_stats.append(stats)
        row_coef, target_coef = weigh(stats, chunk, first, last)
        if hidden_grad is not None:
            product = matmul(slab, head.weight)
            finish_hidden_grad(task, product, (row_coef, target_coef), target, rows.index[chunk], hidden_grad)
            del product
        head_grads.take_rows(some, row_coef, target_coef, target)
        width = GRAD_SLICE * plan.grad_slices
        for begin in range(0, head.weight.shape[0], width):
            end = min(begin + width, head.weight.shape[0])
            head_grads.add(slab[:, begin:end], begin, end)
    del buffer, slab  # free them before a float32 gradient is rounded
    return concatenate(chunk_stats), Gradients(hidden_grad, *head_grads.result())
