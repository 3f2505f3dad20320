"""Selects the mode of a call and splits its work so that it fits the workspace.

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

The workspace is the peak memory of a call beyond inputs, results and gradients: the gathered rows, the buffers of the
mode, and what the primitives of the backend allocate beyond their results (`Scratch`). It does not include vectors over
the positions of the batch, or copies of inputs that autocast or a transposed weight require. A workspace passed by the
caller is a bound: if even the smallest plan needs more, the call raises. The default of a device is a budget: if it is
too small, the call uses its smallest plan.

The cost of a mode is its number of matrix products of 2NHV operations. `npo_kernels.explain` shows the plan of a call.
With logging at DEBUG level for "npo_kernels", every call logs its plan and the reason.
"""

import logging
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

logger = logging.getLogger("npo_kernels")

MIB = 2**20
# Enough for the fastest mode at common shapes: at H=4096, V=128256 one bfloat16 chunk of 8192 rows takes 2.1 GB, and so
# does the float32 accumulator of dWeight that several chunks need. On a CPU: 512 rows at V=128256, in any dtype.
DEFAULT_WORKSPACE_MB = {"cuda": 4608, "cpu": 352}
# If dWeight has 16 bits, it is accumulated in float32 for a slice of this many columns at a time, or a multiple of it.
GRAD_SLICE = 8192
# Elements of such a slice on a GPU: 128 MiB, one GRAD_SLICE at H=4096. On a smaller head, narrow slices would spend
# more time on launches than on work.
GRAD_SLICE_ELEMENTS = GRAD_SLICE * 4096
# Columns of the narrowest vocabulary slice: narrower products are slow on every device.
NARROWEST = 256
# Bytes per row: position, label and sequence in int64, statistics, coefficients, and temporaries of these.
VECTOR_BYTES = 160
# Float32 values per row of dWeight with a unit (`gradients.HeadGradients`): its largest value, and the temporaries from
# which the unit is computed.
UNIT_VALUES = 6


class Scratch(NamedTuple):
    """Bytes that the primitives of a backend allocate beyond their results."""

    projecting: int = 0  # while logits or products are computed, for any number of rows
    finishing: int = 0  # while rows of a gradient are finished
    per_row: int = 0  # per row of a slab
    sums: int = 0  # in a forward without a slab, for all rows


NO_SCRATCH = Scratch()


@dataclass(frozen=True)
class Plan:
    """The plan of a call. `chunks` are ranges of sequences (slab), `slices` ranges of the vocabulary (other modes)."""

    mode: str  # "no_grad" | "frozen" | "slab" | "recompute"
    chunks: tuple[tuple[int, int], ...]
    slices: tuple[tuple[int, int], ...]
    accumulate: bool  # dWeight is summed over chunks in float32
    workspace_bytes: int  # beyond inputs, results and gradients
    why: str
    blocks: str = ""  # `Backend.describe`: kernels and tiles
    grad_slices: int = 1  # slab: number of GRAD_SLICEs of dWeight that are finished at a time

    def __str__(self) -> str:
        cut = f"{len(self.chunks)} chunk(s)" if self.mode == "slab" else f"{len(self.slices)} vocabulary slice(s)"
        text = f"{self.mode}: {cut}, {self.workspace_bytes / MIB:.0f} MiB of workspace; {self.why}"
        return f"{text}; {self.blocks}" if self.blocks else text


def workspace_bytes(workspace_mb: float | None) -> int | None:
    """The caller's bound in bytes."""
    return None if workspace_mb is None else round(min(workspace_mb, 2**42) * MIB)


def default_workspace(device: torch.device) -> int:
    """Bytes that a call without a bound may use, unless its smallest plan needs more."""
    return DEFAULT_WORKSPACE_MB.get(device.type, 1024) * MIB


def grad_slices(hidden_size: int, device: torch.device) -> int:
    """GRAD_SLICEs of dWeight that a call finishes at a time if they fit. One on a CPU, so that it stays in cache."""
    return 1 if device.type == "cpu" else max(1, GRAD_SLICE_ELEMENTS // (GRAD_SLICE * max(1, hidden_size)))


def make_plan(
    *,
    num_rows: int,
    host_starts: tuple[int, ...] | None,  # first row of each sequence, if known to the host
    hidden_size: int,
    vocab_size: int,
    weight_itemsize: int,
    slab_itemsize: int,
    block_v: int,  # columns of a partial sum
    need_hidden: bool,
    need_head: bool,
    bias_columns: int = 0,  # width of the buffer in which dBias is summed
    gradient_in_forward: bool,  # the gradient of the loss with respect to logps is known in the forward
    separable: bool = True,  # ... and depends for each chunk on its own sequences only
    limit: int,  # bytes
    bound: bool = False,  # raise instead of exceeding the limit
    held_bytes: int = 0,  # needed in any mode: copies of rows, buffers of the caller
    summed: bool = False,  # the vocabulary slices are summed, so they must start at multiples of block_v
    grad_slices: int = 1,  # GRAD_SLICEs of dWeight to finish at a time, if they fit
    scratch: Scratch = NO_SCRATCH,
    blocks: str = "",
) -> Plan:
    """Pick the cheapest mode that fits `limit`, from sizes only.

    Raises:
        ValueError: `bound` is set and no plan fits; the message gives the smallest workspace that works.
    """
    N, H, V = max(1, num_rows), hidden_size, vocab_size  # 0 rows are planned as 1
    everything = ((0, V),)
    held = held_bytes + N * VECTOR_BYTES + 4 * V * bias_columns
    forward = held + scratch.sums
    if not (need_hidden or need_head):
        if bound:
            check_bound(forward, limit)
        return _log(Plan("no_grad", (), everything, False, forward, "nothing requires grad", blocks))

    held += scratch.finishing
    # per row: the scaled row, the float32 product with the head, scratch; in a slab also all its exponentials
    row_bytes = (H * need_head + bias_columns) * slab_itemsize + H * 4 * need_hidden + scratch.per_row
    slab_bytes = row_bytes + V * slab_itemsize
    # per column: temporary float32 values of the gradient and its unit
    grad_bytes = 4 * (H + bias_columns + UNIT_VALUES) if need_head and weight_itemsize < 4 else 0
    smallest = []

    if need_head and gradient_in_forward:
        most = min(grad_slices, -(-V // GRAD_SLICE))
        fitting = (limit - held - N * slab_bytes) // (grad_bytes * GRAD_SLICE) if grad_bytes else most
        several = max(1, min(most, fitting))
        used = held + N * slab_bytes + max(scratch.projecting, grad_bytes * min(V, several * GRAD_SLICE))
        if used <= limit:
            chunk = ((0, 0 if host_starts is None else len(host_starts) - 1),)
            return _log(Plan("slab", chunk, everything, False, used, "all rows fit at once", blocks, several))
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
                return _log(Plan("slab", chunks, everything, True, used, why, blocks, most))

    # vocabulary slices: all rows at once, as many columns as fit
    held += N * row_bytes
    column_bytes = N * slab_itemsize
    room = min((limit - held - scratch.projecting) // column_bytes, (limit - held) // (column_bytes + grad_bytes))
    # slices that are summed must start at multiples of block_v
    unit = block_v if room >= block_v or summed or not need_head else min(block_v, NARROWEST)
    width = max(1, room // unit) * unit
    slices = tuple((v, min(v + width, V)) for v in range(0, V, width))
    widest = min(width, V)
    used = max(forward, held + column_bytes * widest + max(scratch.projecting, grad_bytes * widest))
    if bound and used > limit:
        check_bound(min([*smallest, used]), limit)
    if not need_head:
        return _log(Plan("frozen", (), slices, False, used, "the head is frozen: its expectation is saved", blocks))
    if not gradient_in_forward:
        why = "the gradient of the loss is known in the backward only"
    elif host_starts is None:
        why = "num_rows was passed, so sequence lengths stay on the device, and not all rows fit"
    else:
        why = "the longest sequence does not fit a slab" if separable else "the loss needs all sequences at once"
    return _log(Plan("recompute", (), slices, False, used, why, blocks))


def check_bound(smallest: int, limit: int) -> None:
    """Raise if even the smallest plan exceeds the limit."""
    if smallest > limit:
        decimals = 3 if smallest >= MIB else 6
        enough = math.ceil(smallest / MIB * 10**decimals) / 10**decimals
        raise ValueError(
            f"workspace_mb: {limit / MIB:g} MiB is too small for this call; the smallest that works is "
            f"{enough:.{decimals}f}. Pass that or more, leave workspace_mb out, or make the batch smaller"
        )


def _pack(host_starts: tuple[int, ...], capacity: int) -> tuple[tuple[int, int], ...]:
    """Chunks of consecutive sequences, each with as many as fit in `capacity` rows."""
    chunks, first = [], 0
    last = len(host_starts) - 1
    for s in range(1, last + 1):
        if host_starts[s] - host_starts[first] > capacity:
            chunks.append((first, s - 1))
            first = s - 1
    chunks.append((first, last))
    return tuple(chunks)


def _log(plan: Plan) -> Plan:
    logger.debug("%s", plan)
    return plan
