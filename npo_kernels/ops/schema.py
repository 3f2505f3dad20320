"""From the flat arguments of an operator to the task they describe, its backend and its plan."""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

from torch import Tensor

from npo_kernels.backends import torch as torch_backend
from npo_kernels.call.checks import check_values
from npo_kernels.core.execute import Task
from npo_kernels.core.layout import compact
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Plan, make_plan
from npo_kernels.core.vocab_parallel import Shard, clip


def backend_of(impl: str) -> ModuleType:
    """The module of a resolved impl. Triton is imported here and only here."""
    if impl == "torch":
        return torch_backend
    from npo_kernels.backends import triton as triton_backend

    return triton_backend


def shard_of(group: str | None, sizes: Sequence[int]) -> Shard | None:
    """The arguments of an operator as what they stand for; no group: the whole head is here."""
    return None if group is None else Shard(group, tuple(sizes))


def task_of(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (T,) int64
    offsets: Tensor,  # (B+1,) int64
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    num_rows: int | None,
    workspace_bytes: int,
    group: str | None,
    sizes: Sequence[int],
    impl: str,
    *needs: bool,
    upstream_later: bool = False,
) -> Task:
    """The call that the arguments of an operator describe, its values checked and its rows compacted."""
    shard = shard_of(group, sizes)
    vocab_size = weight.shape[0] if shard is None else shard.vocab_size
    check_values(targets, offsets, vocab_size, ignore_index, num_rows)
    rows = compact(targets, offsets, vocab_size, ignore_index, num_rows)
    if shard is not None:
        rows = shard.localize(rows)
    return Task(hidden, Head(weight, bias, logit_scale, softcap), rows, *needs, backend_of(impl), shard, upstream_later)


def plan_of(task: Task, limit: int, gradient_in_forward: bool, separable: bool = True) -> Plan:
    """`make_plan` with the sizes of a task; the ranks of a shared head agree on the plan of the largest part."""
    vocab_size = task.head.weight.shape[0]
    plan = make_plan(
        num_rows=task.rows.index.shape[0],
        host_starts=task.rows.host_starts,
        hidden_size=task.hidden.shape[1],
        vocab_size=vocab_size if task.shard is None else max(task.shard.sizes),
        weight_itemsize=task.head.weight.itemsize,
        slab_itemsize=task.backend.slab_dtype(task.hidden).itemsize,
        block_v=task.backend.block_v(task.hidden),
        need_hidden=task.need_hidden,
        need_head=task.need_head,
        gradient_in_forward=gradient_in_forward,
        limit=limit,
        separable=separable,
    )
    return plan if task.shard is None else replace(plan, slices=clip(plan.slices, vocab_size))
