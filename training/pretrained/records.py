"""The small records of the study, which are committed, made of the folders of its runs, which are not.

    config.json     size, model, device, versions
    models.json     {name: measure}, of the models that unlearning is between
    choice.json     what was tried on the forget set that is not reported, and what was chosen
    runs/*.json     a run each: its settings, a measure at every checkpoint, attacks, answers

A measure is {"summary": TOFU's numbers, "rows": {name: one of each forget row}}.
"""

from collections.abc import Mapping
from typing import Any

from training.benchmarks.tofu import TOFU
from training.benchmarks.tofu.log import PERTURBED, EvalLog
from training.metrics import log_truth_ratio, probability

DIGITS = 6  # significant ones
NUM_ANSWERS = {"forget": 6, "retain": 4}


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
    return rounded({"summary": benchmark.summarize(log, retrained), "rows": rows})


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
