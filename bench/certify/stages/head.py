"""The target table's shape R: ours in each kernel, plain PyTorch, and one product, in turns; with their peaks.

No peer runs here, so none can make it fail; `peers` measures everything again beside the peers that can be imported.
"""

from collections.abc import Sequence
from functools import partial

from bench.cases import MODES, Batch, Case, R, head_case
from bench.certify.unit import Context, Unit
from bench.measure import WHOLE, time_batch
from bench.memory import peak_of
from bench.records import Record
from bench.suites.scaling import in_one_process
from bench.targets import OURS, SMALL

PLAIN = {"full": ("plain/eager",), "frozen": ("plain/eager",), "logprobs": ("plain/eager", "plain/product")}
SECONDS = {"full": 9, "frozen": 6, "logprobs": 5}  # for all turns of a mode, if there is that much time
LEAST = 5  # for starting, and one turn each


def units(context: Context) -> list[Unit]:
    return [
        Unit("peaks", peaks, 4),  # the shortest first, the longest last
        Unit("growth over V", partial(growth, "V"), 5),
        *(Unit(f"{mode}, in turns", partial(in_turns, mode), LEAST) for mode in MODES),
        Unit("growth over N", partial(growth, "N"), 12),
    ]


def in_turns(mode: str, context: Context) -> str:
    return turns(context, mode, (*ours(context), *PLAIN[mode]), SECONDS[mode])


def ours(context: Context) -> list[str]:
    """The current kernel, the other one, and the small workspace."""
    from npo_kernels.backends.triton.launch import tile_for

    other = "simple" if tile_for(batch_of(context, "full").hidden).loop else "persistent"
    return [OURS, f"{OURS}/{other}", SMALL]


def turns(context: Context, mode: str, names: Sequence[str], seconds: float) -> str:
    """Measures milliseconds and TFLOP/s of some providers; returns the milliseconds as text."""
    options = context.options("head", providers=tuple(names), seconds=min(seconds, context.left - LEAST / 2))
    case = shape(context)
    return said(context.emit(time_batch(options, case, batch_of(context, mode))), WHOLE[mode])


def peaks(context: Context) -> str:
    """MiB beyond the inputs, gradients included."""
    found = [context.emit([peak(context, name)])[0] for name in (*ours(context), "plain/eager")]
    return said(found, "fwd_bwd", "peak_mb", "MiB")


def growth(axis: str, context: Context) -> str:
    """Exponents of time and memory of the current kernel; over V also of plain PyTorch, which fits into memory
    there."""
    provider = "npo_kernels/torch" if context.toy else OURS  # interpreted kernels would take a minute
    providers = (provider, "plain/eager") if axis == "V" else (provider,)
    options = context.options("scaling", providers=providers, reps=1 if context.toy else 5, seconds=2)
    found = context.emit(in_one_process(options, axis))
    mine = [r for r in found if r["provider"] == provider and r["metric"].startswith("exponent_")]
    fitted = {r["metric"].removeprefix("exponent_"): r["value"] for r in mine}
    if "ms" not in fitted:
        raise RuntimeError(next((r["error"] for r in found if r["error"]), "fewer than three sizes were measured"))
    return ", ".join(f"exponent of {metric} {value:.3f}" for metric, value in fitted.items())


def peak(context: Context, name: str) -> Record:
    options = context.options("memory")
    return peak_of(options, shape(context), name, batch_of(context, "full"))


def shape(context: Context) -> Case:
    return head_case("toy", 16, length=8) if context.toy else R


def batch_of(context: Context, mode: str) -> Batch:
    """Made once per process: all modes use the same tensors."""
    if "batch" not in context.kept:
        context.kept["batch"] = shape(context).batch(context.options("head").torch_dtype, context.device)
    return context.kept["batch"].for_mode(mode)


def said(records: Sequence[Record], what: str, metric: str = "ms", unit: str = "ms", needed: str = OURS) -> str:
    """The line of the report: the values, and the providers without one. Raises if the required one has none."""
    found = {r["provider"]: r for r in records if (r["metric"], r["what"]) == (metric, what)}
    text = [f"{name} {r['value']:.4g} {unit}" for name, r in found.items() if r["status"] == "ok"]
    text += [f"{name} {r['status']}" for name, r in found.items() if r["status"] not in ("ok", "missing")]
    mine = found.get(needed)
    if mine is None or mine["status"] not in ("ok", "unsupported"):
        raise RuntimeError(f"{needed}: {'no value' if mine is None else mine['error']}; " + ", ".join(text))
    return ", ".join(text)
