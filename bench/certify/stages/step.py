"""Forget and retain steps of whole models with random weights, against logits and a live reference model."""

from functools import partial

from bench.certify.stages.head import said
from bench.certify.unit import Context, Unit
from bench.suites import step

MODELS = ("llama-3.2-1b", "smollm2-135m")
SEARCH = 7.0  # seconds of a search for the largest batch
START = 5.0  # seconds for a new process, its model, and the step in which the time of the search runs out
REPS = 10


def units(context: Context) -> list[Unit]:
    models, names = (("toy",) if context.toy else MODELS), step.providers(context.options("step"))[:2]
    found: list[Unit] = []
    for model in models:
        found.append(Unit(f"{model}: steps", partial(steps, model, names), 8 if found else 12, 90))
        found += [Unit(f"{model}: largest batch, {n}", partial(largest, model, n), SEARCH + START) for n in names]
    return found


def steps(model: str, names: list[str], context: Context) -> str:
    options = context.options("step", reps=1 if context.toy else REPS)
    found = context.emit(step.steps(options, model, names))
    return said(found, "fwd_bwd", "tokens_per_s", "tokens/s", names[0])


def largest(model: str, name: str, context: Context) -> str:
    found = context.emit([step.largest_batch(context.options("step", seconds=SEARCH), model, name)])
    return said(found, "fwd_bwd", "max_batch", "forget sequences", name)
