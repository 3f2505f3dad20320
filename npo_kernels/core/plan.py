"""Which mode a call runs in, and how its work is cut so that it fits the workspace.

| mode      | when                                          | products | beyond inputs and gradients           |
|-----------|-----------------------------------------------|----------|---------------------------------------|
| no_grad   | nothing requires grad                         | 1        | partial sums                          |
| frozen    | only `hidden` requires grad (LoRA)            | 2        | exponentials of N rows x a V slice,   |
|           |                                               |          | their float32 product with the head   |
| slab      | the loss is known per sequence (fused losses) | 3        | exponentials of a chunk of whole      |
|           | and a chunk of whole sequences fits           |          | sequences x V; float32 dWeight when   |
|           |                                               |          | there is more than one chunk          |
| recompute | all else: long sequences, a small workspace,  | 4        | exponentials of N rows x a V slice,   |
|           | a loss applied outside by autograd            |          | float32 dHidden                       |

What is counted is what a call holds at once beyond inputs, results and gradients: the gathered rows, the buffers of the
mode, and what the primitives of the backend allocate beside their results (`Scratch`). Not counted are vectors of the
positions of the batch, scored or not, and copies of inputs that autocast or a transposed weight make necessary. A
workspace that the caller gives is a bound: a call whose smallest plan needs more is refused. The default of a device is
a budget: a call that cannot keep it takes its smallest plan.

The cost is the number of matrix products of 2NHV operations. `npo_kernels.explain` says what a call would do;
with logging at DEBUG level for "npo_kernels" every call says what it picked and why.
"""

import logging
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

logger = logging.getLogger("npo_kernels")

MIB = 2**20
# Room for the fastest mode at the shapes in use: at H=4096, V=128256 one bfloat16 chunk of 8192 rows takes 2.1 GB, and
# so does the float32 accumulator of dWeight that more chunks need. On a CPU: 512 rows at V=128256, in any dtype.
DEFAULT_WORKSPACE_MB = {"cuda": 4608, "cpu": 352}
# Columns of dWeight that are float32 at a time where its dtype has 16 bits: so many, or a multiple.
GRAD_SLICE = 8192
# Elements of such a multiple on a GPU: 128 MiB, one GRAD_SLICE at H=4096. On a smaller head narrow slices would cost
# more in launches than in work.
GRAD_SLICE_ELEMENTS = GRAD_SLICE * 4096
# Columns of the narrowest vocabulary slice: products of fewer are slow on every device.
NARROWEST = 256
# Of each row: position, label and sequence in int64, statistics, coefficients, and their like while they are made.
VECTOR_BYTES = 160
# Of each row of dWeight that is kept in units (`gradients.HeadGradients`): its largest value, and what leads from it to
# the unit.
UNIT_VALUES = 6


class Scratch(NamedTuple):
    """Bytes that primitives allocate beside their results."""

    projecting: int = 0  # while logits or products are formed, whatever the number of rows
    finishing: int = 0  # while rows of a gradient are finished
    per_row: int = 0  # for each row of a slab
    sums: int = 0  # of the forward that stores nothing, for all rows


NO_SCRATCH = Scratch()


@dataclass(frozen=True)
class Plan:
    """What a call does. `chunks` are sequence ranges (slab), `slices` vocabulary ranges (all other modes)."""

    mode: str  # "no_grad" | "frozen" | "slab" | "recompute"
    chunks: tuple[tuple[int, int], ...]
    slices: tuple[tuple[int, int], ...]
    accumulate: bool  # dWeight is summed over chunks in float32
    workspace_bytes: int  # beyond inputs, results and gradients
    why: str
    blocks: str = ""  # how the backend cuts its kernels, in words
    grad_slices: int = 1  # slab: GRAD_SLICEs of dWeight that are finished at a time

    def __str__(self) -> str:
        cut = f"{len(self.chunks)} chunk(s)" if self.mode == "slab" else f"{len(self.slices)} vocabulary slice(s)"
        text = f"{self.mode}: {cut}, {self.workspace_bytes / MIB:.0f} MiB of workspace; {self.why}"
        return f"{text}; {self.blocks}" if self.blocks else text


def workspace_bytes(workspace_mb: float | None) -> int | None:
    """The caller's bound."""
    return None if workspace_mb is None else round(min(workspace_mb, 2**42) * MIB)


def default_workspace(device: torch.device) -> int:
    """Bytes that a call without a bound may take, if its smallest plan does not need more."""
    return DEFAULT_WORKSPACE_MB.get(device.type, 1024) * MIB


def grad_slices(hidden_size: int, device: torch.device) -> int:
    """GRAD_SLICEs of dWeight that a call finishes at a time if they fit. A CPU keeps to one, which is in its caches."""
    return 1 if device.type == "cpu" else max(1, GRAD_SLICE_ELEMENTS // (GRAD_SLICE * max(1, hidden_size)))


def make_plan(
    *,
    num_rows: int,
    host_starts: tuple[int, ...] | None,  # first row of each sequence, if known on the host
    hidden_size: int,
    vocab_size: int,
    weight_itemsize: int,
    slab_itemsize: int,
    block_v: int,  # partial sums are of so many columns
    need_hidden: bool,
    need_head: bool,
    bias_columns: int = 0,  # dBias is summed in a buffer so wide
    gradient_in_forward: bool,  # the gradient of the loss with respect to logps is known chunk by chunk
    separable: bool = True,  # ... from the chunk's own sequences alone
    limit: int,  # bytes
    bound: bool = False,  # refuse to exceed the limit
    held_bytes: int = 0,  # in any mode: rows that are copied out of the batch, buffers of the caller
    summed: bool = False,  # partial sums are taken of the vocabulary slices
    grad_slices: int = 1,  # GRAD_SLICEs of dWeight to finish at a time, if they fit
    scratch: Scratch = NO_SCRATCH,
    blocks: str = "",
) -> Plan:
    """Pick the cheapest mode that fits `limit`. Pure arithmetic on sizes.

    Raises:
        ValueError: `bound`, and no plan fits; the message says the smallest workspace that works.
    """
    N, H, V = max(1, num_rows), hidden_size, vocab_size  # no rows are planned like one
    everything = ((0, V),)
    held = held_bytes + N * VECTOR_BYTES + 4 * V * bias_columns
    forward = held + scratch.sums
    if not (need_hidden or need_head):
        if bound:
            check_bound(forward, limit)
        return _say(Plan("no_grad", (), everything, False, forward, "nothing requires grad", blocks))

    held += scratch.finishing
    # per row: rows scaled, the float32 product with the head, scratch; and in a slab the exponentials of all columns
    row_bytes = (H * need_head + bias_columns) * slab_itemsize + H * 4 * need_hidden + scratch.per_row
    slab_bytes = row_bytes + V * slab_itemsize
    # for each column, what is float32 for a while: the gradient, and its unit in the making
    grad_bytes = 4 * (H + bias_columns + UNIT_VALUES) if need_head and weight_itemsize < 4 else 0
    smallest = []

    if need_head and gradient_in_forward:
        most = min(grad_slices, -(-V // GRAD_SLICE))
        fitting = (limit - held - N * slab_bytes) // (grad_bytes * GRAD_SLICE) if grad_bytes else most
        several = max(1, min(most, fitting))
        used = held + N * slab_bytes + max(scratch.projecting, grad_bytes * min(V, several * GRAD_SLICE))
        if used <= limit:
            chunk = ((0, 0 if host_starts is None else len(host_starts) - 1),)
            return _say(Plan("slab", chunk, everything, False, used, "all rows fit at once", blocks, several))
        smallest.append(used)
        if host_starts is not None and separable:
            held_by_chunks = held + scratch.projecting + grad_bytes * V
            longest = max((b - a for a, b in pairwise(host_starts)), default=0)
            smallest.append(held_by_chunks + slab_bytes * longest)
            if smallest[-1] <= limit:
                capacity = (limit - held_by_chunks) // slab_bytes
                chunks = _pack(host_starts, capacity)
                used = held_by_chunks + slab_bytes * max(host_starts[b] - host_starts[a] for a, b in chunks)
                why = f"chunks of whole sequences of at most {capacity} rows fit"
                return _say(Plan("slab", chunks, everything, True, used, why, blocks, most))

    # vocabulary slices: all rows at once, as many columns as fit
    held += N * row_bytes
    column_bytes = N * slab_itemsize
    room = min((limit - held - scratch.projecting) // column_bytes, (limit - held) // (column_bytes + grad_bytes))
    # slices that partial sums are taken of begin where those do
    unit = block_v if room >= block_v or summed or not need_head else min(block_v, NARROWEST)
    width = max(1, room // unit) * unit
    slices = tuple((v, min(v + width, V)) for v in range(0, V, width))
    widest = min(width, V)
    used = max(forward, held + column_bytes * widest + max(scratch.projecting, grad_bytes * widest))
    if bound and used > limit:
        check_bound(min([*smallest, used]), limit)
    if not need_head:
        return _say(Plan("frozen", (), slices, False, used, "the head is frozen: its expectation is saved", blocks))
    if not gradient_in_forward:
        why = "the gradient of the loss is known in the backward only"
    elif host_starts is None:
        why = "num_rows was passed, so sequence lengths stay on the device, and not all rows fit"
    else:
        why = "the longest sequence does not fit a slab" if separable else "the loss needs all sequences at once"
    return _say(Plan("recompute", (), slices, False, used, why, blocks))


def check_bound(smallest: int, limit: int) -> None:
    """Refuse a workspace that not even the smallest plan fits."""
    if smallest > limit:
        decimals = 3 if smallest >= MIB else 6
        enough = math.ceil(smallest / MIB * 10**decimals) / 10**decimals
        raise ValueError(
            f"workspace_mb: {limit / MIB:g} MiB are too few for this call; the smallest that works is "
            f"{enough:.{decimals}f}. Pass that or more, leave workspace_mb out, or make the batch smaller"
        )


def _pack(host_starts: tuple[int, ...], capacity: int) -> tuple[tuple[int, int], ...]:
    """Consecutive sequences, as many as fit in `capacity` rows, chunk by chunk."""
    chunks, first = [], 0
    last = len(host_starts) - 1
    for s in range(1, last + 1):
        if host_starts[s] - host_starts[first] > capacity:
            chunks.append((first, s - 1))
            first = s - 1
    chunks.append((first, last))
    return tuple(chunks)


def _say(plan: Plan) -> Plan:
    logger.debug("%s", plan)
    return plan
