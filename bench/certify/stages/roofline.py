"""One call of each mode at shape R under the profiler: time and rate of every kernel, launches, gaps, host syncs.

Rates are of counted work (`bench.roofline`): operations of the products, and of everything else the bytes that it has
to move at best once. They are compared with the ceilings that `environment` measured.
"""

from functools import partial

import torch

from bench.cases import MODES, Batch
from bench.certify.stages.head import batch_of, shape
from bench.certify.unit import Context, Unit
from bench.measure import WHOLE, described
from bench.objectives import BETA
from bench.providers import PROVIDERS, plan_of
from bench.records import record, summary
from bench.roofline import launches
from bench.targets import OURS, SMALL
from bench.timeline import Timeline, timeline
from npo_kernels import fused_npo_loss

# Whose launches are what `bench.roofline.launches` counts, by a part of their names. The products that are not ours
# are cuBLAS's, whose names change with every release: whatever is none of the others.
COUNTED = {
    "target_logit": ("target logits",),
    "exp_logits": ("projection, statistics", "projection, exponentials"),
    "finish_hidden_grad": ("dHidden epilogue",),
    "scale_rows": ("scaled rows",),
}
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma")


def units(context: Context) -> list[Unit]:
    found = [Unit(mode, partial(profiled, OURS, mode), 3) for mode in MODES]
    found.append(Unit("full, 256 MiB", partial(profiled, SMALL, "full"), 3))
    return found if context.toy else [*found, Unit("host syncs", no_sync, 2)]


def profiled(name: str, mode: str, context: Context) -> str:
    """Records every kernel; returns the number of launches and the idle time as text."""
    batch, options = batch_of(context, mode), context.options("roofline")
    found = timeline(lambda: PROVIDERS[name].step(batch), options.on_gpu)
    common = described(options, shape(context), name, mode) | {"what": WHOLE[mode], "plan": str(plan_of(name, batch))}
    work, products = counted(found, name, batch)

    def records():
        for metric, value in (("ms", found.total / 1e3), ("launches", len(found.spans)), ("idle_us", found.idle)):
            yield record(options.device, **common, metric=metric, tensor="the call", **summary([value]))
        for kernel, times in found.by_name().items():
            fields = common | {"tensor": short(kernel)}
            yield record(options.device, **fields, metric="ms", **summary([sum(times) / 1e3]))
            yield record(options.device, **fields, metric="launches", **summary([len(times)]))
            for metric, amount in work.get(kernel, {}).items():
                yield record(options.device, **fields, metric=metric, **summary([amount / sum(times)]))
        if products is not None:
            fields = common | {"tensor": "cuBLAS products, together", "metric": "tflops"}
            yield record(options.device, **fields, **summary([products]))

    context.emit(records())
    share = 100 * found.idle / found.total
    return f"{len(found.spans)} launches, {found.total / 1e3:.2f} ms, {share:.1f} % of it between launches"


def counted(found: Timeline, name: str, batch: Batch) -> tuple[dict[str, dict[str, float]], float | None]:
    """kernel -> work such that work / microseconds is a rate, "tflops" or "gb_s"; TFLOP/s of the vendor's products."""
    N, H, V = int(batch.num_tokens.sum()), batch.hidden.shape[-1], batch.weight.shape[0]
    plan = plan_of(name, batch)
    known = [] if plan is None else launches(plan, N, H, V, batch.hidden.itemsize)
    steps = {step.name: step for step in known}
    times, work = found.by_name(), {}
    for kernel in times:
        parts = next((parts for part, parts in COUNTED.items() if part in kernel), ())
        mine = [steps[part] for part in parts if part in steps]
        if mine:
            operations = sum(step.operations for step in mine)
            work[kernel] = (
                {"tflops": operations / 1e6} if operations else {"gb_s": sum(step.bytes for step in mine) / 1e3}
            )
    vendors = [sum(t) for kernel, t in times.items() if any(part in kernel.lower() for part in PRODUCTS)]
    operations = sum(step.operations for step in steps.values() if step.name.endswith("product"))
    return work, operations / 1e6 / sum(vendors) if vendors and operations else None


def short(kernel: str) -> str:
    """A name short enough for a table: templates of vendors' kernels take several lines."""
    return kernel if len(kernel) <= 48 else kernel[:45] + "..."


def no_sync(context: Context) -> str:
    """Forward and backward with the number of rows given: PyTorch raises if a call waits for the device."""
    batch = batch_of(context, "full")
    rows = int(batch.num_tokens.sum())

    def call():
        loss = fused_npo_loss(
            batch.hidden,
            batch.weight,
            batch.labels,
            ref_logps=batch.ref_logps,
            beta=BETA,
            shift=False,
            impl="triton",
            num_rows=rows,
        )
        torch.autograd.grad(loss, batch.leaves)

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none in forward and backward"
