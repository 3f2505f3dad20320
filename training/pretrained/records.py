"""The small records of the study, which are committed, made from its run folders, which are not.

    config.json     size, model, device, versions
    models.json     {name: measure}, of the models that unlearning is between
    logs/*.json     evaluation logs of these models, which later runs are compared with
    choice.json     what was tried on the forget set that is not reported, and what was chosen
    runs/*.json     a run each: its settings, a measure at every checkpoint, attacks, answers

A measure is {"summary": TOFU's numbers, "rows": {name: one of each forget row}, "utility_rows": {part of the utility:
one of each row of its set}}.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from training.benchmarks.tofu import TOFU
from training.benchmarks.tofu.log import PERTURBED, EvalLog
from training.benchmarks.tofu.summary import utility_rows
from training.metrics import log_truth_ratio, probability
from training.pretrained.plan import Plan, Tried

DIGITS = 6  # significant ones
NUM_ANSWERS = {"forget": 6, "retain": 4}


class Records:
    """What a folder of records had when it was first asked."""

    def __init__(self, folder: Path):
        self.folder = folder

    def check(self, plan: Plan, weights: str) -> None:
        """ValueError where the records are of another study: other rows, settings or weights of the base model."""
        config = self._read("config.json")
        if not config:
            return
        found = {name: config["size"].get(name) for name in plan.recipe()} | {"weights": config["model"]["sha256"]}
        expected = rounded(json.loads(json.dumps(plan.recipe()))) | {"weights": weights}
        others = [name for name, value in expected.items() if found[name] != value]
        if others:
            raise ValueError(
                f"--out: {self.folder} has records of a study with another {', '.join(others)}; choose another folder"
            )

    @cached_property
    def models(self) -> dict[str, Any]:
        return self._read("models.json") or {}

    @cached_property
    def choice(self) -> list[dict[str, Any]]:
        return self._read("choice.json") or []

    def run(self, name: str) -> dict[str, Any] | None:
        return self._read(f"runs/{name}.json")

    def log(self, model: str) -> Path:
        return self.folder / "logs" / f"{model}.json"

    def tried(self, tried: Tried) -> dict[str, Any] | None:
        """As `choice.outcome` gave it."""
        found = (entry for entry in self.choice if all(entry[k] == v for k, v in tried._asdict().items()))
        return next(({k: v for k, v in entry.items() if k != "chosen"} for entry in found), None)

    def has_tries(self, tries: Iterable[Tried]) -> bool:
        return all(self.tried(tried) for tried in tries)

    def has_model(self, name: str) -> bool:
        return name in self.models and self.log(name).exists()

    def has_attacks(self, of: str, attacks: Iterable[str]) -> bool:
        return {*attacks} <= (self.models.get(of) or self.run(of) or {}).get("attacks", {}).keys()

    def _read(self, name: str) -> Any:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def measure(benchmark: TOFU, log: EvalLog, retrained: EvalLog | None) -> dict[str, Any]:
    """Of one model: what reports show, and what the claims need of each forget row."""
    forget = log.sets["forget"]
    ratios = log_truth_ratio(forget.array("avg_paraphrased_loss"), forget.array(PERTURBED), "geometric")
    rows = {
        "log_truth_ratio": ratios.tolist(),
        "prob": probability(forget.array("avg_gt_loss")).tolist(),
        "rougeL": forget.array("rougeL_recall").tolist(),
        "num_tokens": forget.array("num_token_gt").astype(int).tolist(),
    }
    utility = {name: values.tolist() for name, values in utility_rows(log).items()}
    return rounded({"summary": benchmark.summarize(log, retrained), "rows": rows, "utility_rows": utility})


def answers(benchmark: TOFU, log: EvalLog) -> list[dict[str, str]]:
    """What the model says to ten fixed questions, spread over the forget and the retain rows."""
    found = []
    for name, count in NUM_ANSWERS.items():
        rows, said = benchmark.sets[name], log.sets[name].texts("generation") or []
        apart = max(1, len(rows) // count)
        for i in list(range(apart // 2, len(rows), apart))[:count]:
            row = {"set": name, "question": rows[i].question, "answer": rows[i].answer, "generation": said[i].strip()}
            found.append(row)
    return found


def rounded(value: Any) -> Any:
    """Floats of a JSON value to `DIGITS`: the records are for reading, and for the same report everywhere."""
    if isinstance(value, Mapping):
        return {key: rounded(some) for key, some in value.items()}
    if isinstance(value, list):
        return [rounded(some) for some in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
