"""From the `Call` of an operator to the `Task` that the modes run: values checked, rows compacted, backend chosen."""

from npo_kernels.backends.choose import backend_of
from npo_kernels.call.call import Call
from npo_kernels.core.layout import compact
from npo_kernels.core.task import Task
from npo_kernels.core.value_checks import check_values


def task_of(call: Call, upstream_later: bool = False) -> Task:
    """`upstream_later`: see `Task`."""
    execution, shard = call.execution, call.execution.shard
    vocab_size = call.head.weight.shape[0] if shard is None else shard.vocab_size
    check_values(call.targets, call.offsets, vocab_size, call.ignore_index, call.num_rows)
    rows = compact(call.targets, call.offsets, vocab_size, call.ignore_index, call.num_rows)
    if shard is not None:
        rows = shard.localize(rows)
    return Task(call.hidden, call.head, rows, execution.needs, backend_of(execution.impl), shard, upstream_later)
