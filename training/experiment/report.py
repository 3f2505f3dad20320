"""report.md of an experiment: tables over seeds, the paper's claims against the numbers, answers side by side."""

from typing import Any, NamedTuple

import numpy as np

from training.experiment.figures import over_seeds, runs_of
from training.methods import METHODS
from training.unlearning_report import CAVEAT, cell, samples_table

GOOD_QUALITY = 0.05  # a p-value above it: not told apart from the retrained model
KEPT = 0.8  # share of the utility before unlearning that counts as kept
LOST = 0.5
LARGEST_CLAIMED = 30  # % to forget: for more, the paper claims it of larger retain weights only
SHOWN = {  # columns of the table
    "forget_quality": "forget quality",
    "model_utility_geometric": "utility",
    "forget_prob": "forget prob",
    "forget_rougeL": "forget ROUGE-L",
    "retain_prob": "retain prob",
    "retain_rougeL": "retain ROUGE-L",
    "forget_repetition": "repetition, forget",
}
SIDE_BY_SIDE = ("before", "GA", "NPO", "GA+RT", "NPO+RT")

Histories = dict[str, list[list[dict]]]


class Claim(NamedTuple):
    """A statement of arXiv 2404.05868, section 5, as a comparison of medians over seeds."""

    text: str
    measured: str
    holds: bool


def end(histories: Histories, method: str, key: str) -> float:
    return float(np.median(over_seeds(histories[method], key)[:, -1]))


def best_quality_while_kept(histories: Histories, method: str, kept: float) -> float:
    """The best median forget quality at an evaluation after the start whose median utility is at least `kept`."""
    quality, utility = (
        np.median(over_seeds(histories[method], key), axis=0)[1:]
        for key in ("forget_quality", "model_utility_geometric")
    )
    return float(np.max(quality, initial=0.0, where=utility >= kept))


def claims(metrics: dict[str, Any], percent: int) -> list[Claim]:
    """Those whose methods were run."""
    histories, start = runs_of(metrics, percent), metrics["start"][str(percent)]["model_utility_geometric"]

    def values(key: str, *methods: str) -> str:
        return ", ".join(f"{METHODS[m].label} {end(histories, m, key):.3g}" for m in methods)

    found = []
    if "ga" in histories:
        utility = end(histories, "ga", "model_utility_geometric")
        measured = f"utility {start:.3g} -> {utility:.3g}"
        found.append(Claim("GA collapses: it loses the utility of the model", measured, utility < LOST * start))
    if {"ga", "npo"} <= histories.keys():
        for key, text, unit in (
            ("model_utility_geometric", "NPO keeps more than GA", "utility at the end"),
            ("retain_rougeL", "NPO still answers what was to be kept where GA no longer does", "ROUGE-L, retain"),
        ):
            holds = end(histories, "npo", key) > end(histories, "ga", key)
            found.append(Claim(text, f"{values(key, 'ga', 'npo')} ({unit})", holds))
    if "npo_rt" in histories and percent <= LARGEST_CLAIMED:
        quality, utility = (end(histories, "npo_rt", k) for k in ("forget_quality", "model_utility_geometric"))
        found.append(
            Claim(
                f"NPO+RT ends with a forget quality above {GOOD_QUALITY} and keeps the utility",
                f"forget quality {quality:.3g}, utility {start:.3g} -> {utility:.3g}",
                quality > GOOD_QUALITY and utility >= KEPT * start,
            )
        )
        best = {m: best_quality_while_kept(histories, m, KEPT * start) for m in histories}
        if len(best) > 1:
            found.append(
                Claim(
                    f"NPO+RT alone reaches a forget quality above {GOOD_QUALITY} with {KEPT:.0%} of the utility kept",
                    ", ".join(f"{METHODS[m].label} {q:.3g}" for m, q in best.items()),
                    [m for m, q in best.items() if q > GOOD_QUALITY] == ["npo_rt"],
                )
            )
    return found


def markdown(metrics: dict[str, Any], config: dict[str, Any], percents: list[int]) -> str:
    settings = {k: v for k, v in config["settings"].items() if v is not None}
    sections = ["# TOFU unlearning: methods, forget sets, seeds"]
    for percent in percents:
        histories = runs_of(metrics, percent)
        seeds = len(next(iter(histories.values())))
        sections += [
            f"## forget{percent:02d}",
            f"![Forget quality against utility](trade_off_forget{percent:02d}.png)",
            f"![Over the epochs](epochs_forget{percent:02d}.png)",
            f"At the end of unlearning, medians over {seeds} seeds [smallest, largest]; in the last column the best "
            f"forget quality among the epochs that keep {KEPT:.0%} of the utility. Forget quality is a p-value: of two "
            "models that cannot be told apart it is any number; a small one says that they can.",
            _table(metrics, percent, histories),
            "What the NPO paper says, against these numbers:",
            _verdicts(claims(metrics, percent)),
            f"### Greedy answers, forget{percent:02d}, seed {metrics['runs'][0]['seed']}",
            samples_table({k: v for k, v in metrics["samples"][str(percent)].items() if k in SIDE_BY_SIDE}),
        ]
    sections += [
        "## What was run",
        "- Rows learned: " + ", ".join(f"{split} {n}" for split, n in metrics["rows"].items()) + " (with those about "
        "the world, where these are learned too).\n"
        "- Settings: " + ", ".join(f"{k} {v}" for k, v in settings.items()) + ".\n"
        f"- {config['device']}; " + ", ".join(f"{k} {v}" for k, v in config["versions"].items()) + ".",
        CAVEAT,
    ]
    return "\n\n".join(sections) + "\n"


def _table(metrics: dict[str, Any], percent: int, histories: Histories) -> str:
    start = metrics["start"][str(percent)]
    lines = [["model", *SHOWN.values(), f"best quality at {KEPT:.0%}"], ["---", *["---:"] * (len(SHOWN) + 1)]]
    for name, one in (("fine-tuned", start), ("retrained", metrics["retrained"][str(percent)])):
        lines.append([name, *(cell(one.get(key)) for key in SHOWN), ""])
    for method, runs in histories.items():
        last = {key: over_seeds(runs, key)[:, -1] for key in SHOWN}
        best = best_quality_while_kept(histories, method, KEPT * start["model_utility_geometric"])
        lines.append(
            [METHODS[method].label, *(_spread(values) for values in last.values()), cell(best) if best else "-"]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: np.ndarray) -> str:
    middle = f"{np.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} [{values.min():.2g}, {values.max():.2g}]"


def _verdicts(found: list[Claim]) -> str:
    lines = ["| | claim | measured |", "| --- | --- | --- |"]
    lines += [f"| {'agrees' if c.holds else '**does not agree**'} | {c.text} | {c.measured} |" for c in found]
    return "\n".join(lines)
