"""A MODEL, NOT A MEASUREMENT: the floor of each mode and the time predicted from counted work and measured ceilings.

For a shape and a GPU, in the mode and the cuts of `npo_kernels.core.plan`: every launch's operations and the bytes it
has to move, each byte counted once. The floor is the larger of all operations at the product ceiling and the bytes of
inputs and results at the copy ceiling; the prediction is the sum over the launches of the larger of both. The ceilings
are those that one GPU of the kind reached in a large product and in a copy, so a prediction is a lower bound that no
real run reaches.
"""

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from npo_kernels.core.plan import DEFAULT_WORKSPACE_MB, MIB, Plan, make_plan

HELP = "predicted times from counted work: a model"


@dataclass(frozen=True)
class Ceilings:
    """Measured: bfloat16 operations/s of an 8192^3 product (the lower end), bytes/s of a copy, read plus written."""

    operations: float
    bytes: float


CEILINGS = {"h200": Ceilings(770e12, 4.3e12)}
WANTED = {"full": (True, True), "frozen": (True, False), "logprobs": (False, False)}  # gradients of hidden, of the head
SPLIT = 1024  # columns of a partial sum, as the tiles of sm_90 have it


@dataclass(frozen=True)
class Launch:
    """One step of a mode: operations, and bytes read or written."""

    name: str
    operations: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.operations / ceilings.operations, self.bytes / ceilings.bytes)


def launches(plan: Plan, N: int, H: int, V: int, itemsize: int = 2) -> list[Launch]:
    """The launches of `npo_kernels.core.execute`. A slab has N V items; a product with the head is float32 (N, H)."""
    rows, head, slab, product = itemsize * N * H, itemsize * V * H, itemsize * N * V, 4 * N * H
    unit = 2 * N * H * V
    sums = 8 * N * -(-V // SPLIT)
    cuts = max(1, len(plan.chunks) if plan.mode == "slab" else len(plan.slices))
    # chunks of rows read the head again, slices of the vocabulary the rows
    again_rows, again_head = (rows, cuts * head) if plan.mode == "slab" else (cuts * rows, head)
    again_product = product if plan.mode == "slab" else (2 * cuts - 1) * product
    target = Launch("target logits", 0, 2 * rows)
    forward = Launch("projection, statistics", unit, rows + head + sums)
    stored = Launch("projection, exponentials", unit, again_rows + again_head + slab + sums)
    to_hidden = Launch("dHidden product", unit, slab + again_head + again_product)
    finish = Launch("dHidden epilogue", 0, product + 2 * rows)
    scale = Launch("scaled rows", 0, 2 * rows)
    accumulator = 8 * V * H * (cuts if plan.accumulate else 1)  # float32, written and read once a chunk
    to_head = Launch("dWeight product", unit, slab + again_rows + accumulator + head)
    if plan.mode == "no_grad":
        return [target, forward]
    if plan.mode == "frozen":
        return [target, stored, to_hidden, finish]
    if plan.mode == "slab":
        return [target, stored, to_hidden, finish, scale, to_head]
    return [target, forward, stored, to_hidden, finish, scale, to_head]


def floor(wanted: str, N: int, H: int, V: int, ceilings: Ceilings, itemsize: int = 2) -> float:
    """The least seconds of any exact algorithm at these ceilings: the products of the mode, inputs and results."""
    products = {"full": 3, "frozen": 2, "logprobs": 1}[wanted]
    need_hidden, need_head = WANTED[wanted]
    moved = itemsize * (N * H * (1 + need_hidden) + V * H * (1 + need_head))
    return max(products * 2 * N * H * V / ceilings.operations, moved / ceilings.bytes)


def plan_for(wanted: str, N: int, H: int, V: int, B: int, workspace_mb: float, itemsize: int = 2) -> Plan:
    need_hidden, need_head = WANTED[wanted]
    return make_plan(
        num_rows=N,
        host_starts=tuple(N * s // B for s in range(B + 1)),
        hidden_size=H,
        vocab_size=V,
        weight_itemsize=itemsize,
        slab_itemsize=itemsize,
        block_v=SPLIT,
        need_hidden=need_hidden,
        need_head=need_head,
        gradient_in_forward=True,
        limit=int(workspace_mb * MIB),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--N", type=int, default=8192, help="scored tokens")
    parser.add_argument("--H", type=int, default=4096, help="hidden size")
    parser.add_argument("--V", type=int, default=128256, help="vocabulary")
    parser.add_argument("--B", type=int, help="sequences; default: of 256 tokens")
    parser.add_argument("--gpu", choices=CEILINGS, default="h200")
    parser.add_argument("--workspace_mb", type=float, default=DEFAULT_WORKSPACE_MB["cuda"])


def main(args: argparse.Namespace) -> int:
    N, H, V, ceilings = args.N, args.H, args.V, CEILINGS[args.gpu]
    console = Console()
    console.print(
        f"MODEL, not a measurement: {args.gpu} at {ceilings.operations / 1e12:.0f} TFLOP/s and "
        f"{ceilings.bytes / 1e12:.1f} TB/s, bfloat16, N={N} H={H} V={V}, workspace {args.workspace_mb:g} MiB"
    )
    for wanted in WANTED:
        plan = plan_for(wanted, N, H, V, args.B or max(1, N // 256), args.workspace_mb)
        console.print(_table(wanted, plan, launches(plan, N, H, V), floor(wanted, N, H, V, ceilings), ceilings))
    return 0


def _table(wanted: str, plan: Plan, steps: list[Launch], lowest: float, ceilings: Ceilings) -> Table:
    total = sum(step.seconds(ceilings) for step in steps)
    table = Table(title=f"{wanted} -> {plan}", title_justify="left", show_footer=True)
    table.add_column("launch", footer=f"predicted; floor {1e3 * lowest:.2f} ms")
    table.add_column("TFLOP", justify="right", footer=f"{sum(s.operations for s in steps) / 1e12:.2f}")
    table.add_column("GB", justify="right", footer=f"{sum(s.bytes for s in steps) / 1e9:.2f}")
    table.add_column("ms", justify="right", footer=f"{1e3 * total:.2f}")
    table.add_column("bound by")
    for step in steps:
        by_products = step.operations / ceilings.operations >= step.bytes / ceilings.bytes
        table.add_row(
            step.name,
            f"{step.operations / 1e12:.2f}",
            f"{step.bytes / 1e9:.2f}",
            f"{1e3 * step.seconds(ceilings):.2f}",
            "products" if by_products else "bytes",
        )
    return table
