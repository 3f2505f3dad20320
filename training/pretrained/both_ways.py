"""Run one method on one model with the fused losses and in plain PyTorch: compare gradients, time steps.

What a process of `training.pretrained.costs` runs; both functions leave a model behind that has moved.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training import distributed
from training.config import Precision, TrainConfig
from training.data import Example, Row
from training.loading import load_tokenizer
from training.memory import peak_gib
from training.methods import method_named
from training.model import autocast, autocast_dtype, load_model, pick_device
from training.pretrained.plain import PlainModel, PlainSteps
from training.scoring import Scores, score
from training.steps import Batches, Plan, Step, scored_tokens
from training.templates import Format
from training.trainer import Job, Metrics, Trainer
from training.unlearning import Frozen, UnlearningSteps, cached_per_token, kept_head

Way = Literal["fused", "plain"]

MOVED = 0.02  # weights that are compared, away from the reference's by so many of their standard deviations
# How far losses and gradients may be apart, relative to their size, by what the arithmetic is cast to. Over a large
# vocabulary a plain float32 log-softmax is itself further from float64 than the fused one.
TOLERANCE = {None: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Task:
    """The arguments of a process."""

    folder: str  # of the model
    method: str
    rows: Mapping[str, Sequence[Row]]  # by kind, as many of each; "forget" is always there
    template: str
    device: str
    precision: Precision
    threads: int
    warmup: int
    timed: int


class Workbench:
    """A model with its rows as token ids, in this process."""

    def __init__(self, task: Task):
        torch.set_num_threads(task.threads)
        self.task, self.method, self.device = task, method_named(task.method), pick_device(task.device)
        distributed.start(self.device.type)
        format = Format(load_tokenizer(task.folder), task.template)
        self.rows: dict[str, list[Example]] = {kind: format.encode(some) for kind, some in task.rows.items()}
        self.batches = Batches(format.pad_token_id, self.device, packing=False)
        count = len(self.rows["forget"])
        self.config = TrainConfig(1, batch_size=count, warmup_epochs=0.0, packing="off", precision=task.precision)
        self.plan = Plan([Step(*[list(range(count))] * 3)] * (task.warmup + task.timed), [])
        self.model = load_model(task.folder, self.device, precision=task.precision)

    @cached_property
    def frozen(self) -> PreTrainedModel:
        """A second model, as `training.unlearn` holds it: on a GPU in bfloat16."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return load_model(self.task.folder, self.device, dtype=dtype, precision=self.task.precision).eval()

    def fused(self) -> tuple[nn.Module, UnlearningSteps]:
        """(what the trainer calls, its steps), with what is cached of the model as it is now."""
        live = self.frozen if self.method.retain == "kl" else None
        settings = self.method.settings()
        per_token = cached_per_token(self.method, settings)
        kinds = self.method.rows if self.method.reference or self.method.teacher else ()
        scores: dict[str, Scores] = {
            kind: score(self.model, self.rows[kind], self.batches.pad_id, per_token=per_token) for kind in kinds
        }
        frozen = Frozen(scores, live, kept_head(self.model) if per_token == "hidden" else None)
        return self.model, UnlearningSteps(
            self.method, settings, self.plan, self.rows, frozen, self.config, self.batches
        )

    def plain(self) -> tuple[nn.Module, PlainSteps]:
        """The same on logits."""
        live = self.frozen if self.method.retain == "kl" or self.method.reference or self.method.teacher else None
        settings = self.method.settings()
        return PlainModel(self.model), PlainSteps(self.method, settings, self.plan, self.rows, self.batches, live)


def checked(task: Task) -> dict[str, Any]:
    """{"loss", "gradient"}: how far the two ways are apart, relative to plain, at weights away from the reference's.

    ValueError where that is more than their rounding.
    """
    bench = Workbench(task)
    fused, plain = bench.fused(), bench.plain()
    move(bench.model)
    loss, gradient = of_step(*fused)
    expected, expected_gradient = of_step(*plain)
    found = {
        "loss": abs(loss - expected) / max(abs(expected), 1e-12),
        "gradient": apart(gradient, expected_gradient),
    }
    allowed = TOLERANCE[autocast_dtype(bench.model)]
    if not (found["loss"] <= allowed and found["gradient"] <= allowed):
        raise ValueError(
            f"{task.method}: the fused loss is {loss:.7g} and the plain one {expected:.7g}, and their gradients are "
            f"{found['gradient']:.1e} apart; expected at most {allowed:g}, relative to the plain ones, of either: "
            "they do not compute the same, and their times would say nothing"
        )
    return found


def timing(task: Task, way: Way) -> dict[str, Any]:
    """The steps of one way: an entry of "measured" in costs.json, without its names."""
    bench = Workbench(task)
    called, steps = bench.fused() if way == "fused" else bench.plain()
    trainer = Trainer(cast(PreTrainedModel, called), bench.config, len(steps))
    for model in (bench.model, vars(bench).get("frozen")):
        for p in () if model is None else model.parameters():
            p.detach().sum()  # the weights lie in their file, and not in memory, until they are read
    before, tokens, moments = new_peak(bench.device), 0, [perf_counter()]

    def after(metrics: Metrics) -> None:
        nonlocal tokens
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        tokens = metrics.num_tokens
        moments.append(perf_counter())

    trainer.train(steps, after_step=after)
    seconds = [end - start for start, end in pairwise(moments)][task.warmup :]
    used = {kind: some for kind, some in bench.rows.items() if kind in bench.method.needs}
    return {
        "vocab_size": bench.model.get_output_embeddings().weight.shape[0],
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "batch": {
            "forget_rows": len(bench.rows["forget"]),
            "retain_rows": len(used.get("retain", [])),
            "tokens": tokens,
            "scored_tokens": sum(scored_tokens(some, range(len(some))) for some in used.values()),
        },
        "tokens_per_second": tokens / statistics.median(seconds),
        "step_seconds": seconds,
        "peak_gib": peak_gib(bench.device),
        "before_gib": before,
    }


def move(model: nn.Module) -> None:
    """Weights by `MOVED` standard deviations, the same way each time: at the reference all log-ratios are 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.add_(MOVED * noise * p.std(correction=0))


def of_step(called: nn.Module, steps: Job) -> tuple[float, list[Tensor]]:
    """The loss of the first step and the gradients of all parameters."""
    model, parameters = cast(PreTrainedModel, called), list(called.parameters())
    total, gradients = 0.0, [torch.zeros_like(p) for p in parameters]
    with autocast(model):
        passes = steps.passes(called, 0)
    for inputs, objective, _ in passes:
        with autocast(model):
            loss = called(**inputs, fused_unlearning=objective).loss
        for kept, new in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
            kept += new
        total += loss.item()
    return total, gradients


def apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """||some - others|| / ||others||, of all tensors together."""
    difference = sum((a.double() - b.double()).square().sum().item() for a, b in zip(some, others, strict=True))
    return math.sqrt(difference / max(sum(b.double().square().sum().item() for b in others), 1e-300))


def new_peak(device: torch.device) -> float:
    """GiB in use now, after the peak is reset; if the system cannot reset it, the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return peak_gib(device)
