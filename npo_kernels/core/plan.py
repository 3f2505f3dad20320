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

The cost is the number of matrix products of 2NHV operations. `npo_kernels.explain` says what a call would do;
with logging at DEBUG level for "npo_kernels" every call says what it picked and why.
"""

import logging
from dataclasses import dataclass
from itertools import pairwise

import torch

logger = logging.getLogger("npo_kernels")

MIB = 2**20
# Room for the fastest mode at the shapes in use: at H=4096, V=128256 one bfloat16 chunk of 8192 rows takes 2.1 GB, and
# so does the float32 accumulator of dWeight that more chunks need. A CPU gains nothing from slabs beyond its caches.
DEFAULT_WORKSPACE_MB = {"cuda": 4608, "cpu": 256}
# Columns of dWeight that are float32 at a time where its dtype has 16 bits.
GRAD_SLICE = 8192


@dataclass(frozen=True)
class Plan:
    """What a call does. `chunks` are sequence ranges (slab), `slices` vocabulary ranges (all other modes)."""

    mode: str  # "no_grad" | "frozen" | "slab" | "recompute"
    chunks: tuple[tuple[int, int], ...]
    slices: tuple[tuple[int, int], ...]
    accumulate: bool  # dWeight is summed over chunks in float32
    workspace_bytes: int  # beyond inputs and gradients
    why: str

    def __str__(self) -> str:
        cut = f"{len(self.chunks)} chunk(s)" if self.mode == "slab" else f"{len(self.slices)} vocabulary slice(s)"
        return f"{self.mode}: {cut}, {self.workspace_bytes / MIB:.0f} MiB of workspace; {self.why}"


def workspace_bytes(workspace_mb: float | None, device: torch.device) -> int:
    """The caller's limit, or the default of the device."""
    if workspace_mb is None:
        workspace_mb = DEFAULT_WORKSPACE_MB.get(device.type, 1024)
    return int(workspace_mb * MIB)


def make_plan(
    *,
    num_rows: int,
    host_starts: tuple[int, ...] | None,  # first row of each sequence, if known on the host
    hidden_size: int,
    vocab_size: int,
    weight_itemsize: int,
    slab_itemsize: int,
    block_v: int,  # slices begin at multiples of this
    need_hidden: bool,
    need_head: bool,
    gradient_in_forward: bool,  # the gradient of the loss with respect to logps is known chunk by chunk
    limit: int,  # bytes
    separable: bool = True,  # ... from the chunk's own sequences alone
) -> Plan:
    """Pick the cheapest mode that fits `limit`. Pure arithmetic on sizes."""
    N, H, V = max(1, num_rows), hidden_size, vocab_size  # no rows are planned like one
    everything = ((0, V),)
    if not (need_hidden or need_head):
        return _say(Plan("no_grad", (), everything, False, 0, "nothing requires grad"))

    # per row of a slab: exponentials, rows gathered and scaled, float32 product with the head
    row_bytes = V * slab_itemsize + H * (weight_itemsize + slab_itemsize * need_head + 4 * need_hidden)
    narrow = need_head and weight_itemsize < 4
    grad_slice = 4 * H * min(V, GRAD_SLICE) if narrow else 0

    if need_head and gradient_in_forward:
        if N * row_bytes + grad_slice <= limit:
            chunk = ((0, 0 if host_starts is None else len(host_starts) - 1),)
            return _say(Plan("slab", chunk, everything, False, N * row_bytes + grad_slice, "all rows fit at once"))
        if host_starts is not None and separable:
            accumulator = 4 * V * H if narrow else 0
            capacity = (limit - accumulator) // row_bytes
            longest = max((b - a for a, b in pairwise(host_starts)), default=0)
            if capacity >= longest:
                chunks = _pack(host_starts, capacity)
                used = accumulator + row_bytes * max(host_starts[b] - host_starts[a] for a, b in chunks)
                why = f"chunks of whole sequences of at most {capacity} rows fit"
                return _say(Plan("slab", chunks, everything, True, used, why))

    # vocabulary slices: all rows at once, as many columns as fit
    fixed = N * (row_bytes - V * slab_itemsize)
    column_bytes = N * slab_itemsize + (4 * H if narrow else 0)
    width = max(1, (limit - fixed) // (column_bytes * block_v)) * block_v
    slices = tuple((v, min(v + width, V)) for v in range(0, V, width))
    used = fixed + column_bytes * min(width, V)
    if not need_head:
        return _say(Plan("frozen", (), slices, False, used, "the head is frozen: its expectation is saved"))
    if not gradient_in_forward:
        why = "the gradient of the loss is known in the backward only"
    elif host_starts is None:
        why = "num_rows was passed, so sequence lengths stay on the device, and not all rows fit"
    else:
        why = "the longest sequence does not fit a slab" if separable else "the loss needs all sequences at once"
    return _say(Plan("recompute", (), slices, False, used, why))


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
