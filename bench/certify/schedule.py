"""The stages in their order, and the share of the budget for each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module

from bench.certify.unit import Context, Unit
from bench.tables import markdown

# Shown by `--plan`: a first run in a quarter of an hour on a machine, and a second in the rest of it.
BUDGETS = (420.0, 300.0)
# For starting Python, importing, and writing the report.
RESERVE = 20.0


@dataclass(frozen=True)
class Stage:
    """`share` and `least` are seconds: the time on an H100, and the least time that is worth a start. A budget is
    divided in proportion to the shares."""

    name: str
    what: str
    share: float
    least: float

    def units(self, context: Context) -> list[Unit]:
        """The units of bench/certify/stages/NAME.py."""
        return import_module(f"bench.certify.stages.{self.name}").units(context)


STAGES = (
    Stage("environment", "versions, driver, clocks, power; the ceilings of a product and of a copy", 8, 3),
    Stage("compile", "every specialisation of a kernel that the stages below launch, compiled on all cores", 80, 10),
    Stage("checks", "every kernel and mode against float64, and what only a GPU shows", 60, 15),
    Stage("head", "the loss at shape R in each candidate kernel, beside plain PyTorch; peaks; growth", 45, 15),
    Stage("peers", "the same beside every peer that imports, in turns", 100, 25),
    Stage("tofu", "batches of TOFU at three heads", 100, 10),
    Stage("tune", "tiles near those in force, and persistent KL and row moments, at the same hidden sizes", 42, 15),
    Stage("roofline", "time, rate and gaps of every launch; host syncs", 12, 5),
    Stage("step", "NPO and retain steps of whole models against logits and a live reference", 60, 15),
    Stage("suite", "tests/gpu, the longest last", 100, 15),
    Stage("sanitizer", "a test of each mode under compute-sanitizer, where it is installed", 40, 15),
)


def chosen(only: Iterable[str], skip: Iterable[str]) -> list[Stage]:
    """The chosen stages, in their order."""
    names = [stage.name for stage in STAGES]
    only, skip = list(only), set(skip)
    unknown = [name for name in (*only, *skip) if name not in names]
    if unknown:
        raise ValueError(f"no stage is called {unknown[0]!r}; there are {', '.join(names)}")
    return [stage for stage in STAGES if (not only or stage.name in only) and stage.name not in skip]


def allotment(stages: Sequence[Stage], seconds: float) -> dict[str, float]:
    """Seconds of each stage: the budget divided in proportion to the shares."""
    shares = sum(stage.share for stage in stages)
    return {stage.name: seconds * stage.share / shares for stage in stages}


def plan(stages: Sequence[Stage], budgets: Sequence[float], context: Context) -> str:
    """The seconds of each stage in each budget, and how many units start if all take the expected time."""
    rows = []
    for stage in stages:
        units, row = stage.units(context), [stage.name, stage.what]
        for budget in budgets:
            seconds = allotment(stages, budget - RESERVE)[stage.name]
            row += [f"{seconds:.0f} s", f"{_begun(units, seconds)} of {len(units)}"]
        rows.append(row)
    heading = ["stage", "what", *(text for budget in budgets for text in (f"of {budget:.0f} s", "units"))]
    total = ["", "", *(text for budget in budgets for text in (f"{budget - RESERVE:.0f} s", ""))]
    note = (
        f"{RESERVE:.0f} s of a budget are for the start and the report; what a stage does not use goes to later ones."
    )
    return markdown(heading, [*rows, total], "ll" + "r" * (2 * len(budgets))) + "\n\n" + note


def _begun(units: Iterable[Unit], seconds: float) -> int:
    begun = 0
    for unit in units:
        if unit.seconds + unit.reserve <= seconds:
            begun, seconds = begun + 1, seconds - unit.seconds
    return begun
