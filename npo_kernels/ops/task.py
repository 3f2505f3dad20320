"""Build the `Task` that the modes run from the `Call` of an operator: check values, compact rows, pick the backend."""

from npo_kernels.backends.choose import backend_of
from npo_kernels.call.call import Call
from npo_kernels.core.task import Task
from npo_kernels.core.value_checks import check_values


def task_of(call: Call, upstream_later: bool = False) -> Task:
    """The `Task` of a call; for `upstream_later` see `Task`."""
    execution, shard = call.execution, call.execution.shard
    vocab_size = call.head.weight.shape[0] if shard is None else shard.vocab_size
    backend = backend_of(execution.impl)
    batch = call.labels, call.cu_seqlens, call.shift, vocab_size, call.ignore_index, call.num_rows
    check_values(*batch)
    rows = backend.compact(*batch)
    if shard is not None:
        rows = shard.localize(rows)
    return Task(call.hidden, call.head, rows, execution.needs, backend, shard, upstream_later)
