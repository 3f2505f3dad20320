"""What an unlearning run leaves for its readers: report.md, figure.png, and the card of the model."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt

from training.stages import renamed_when_done, write_text

CAVEAT = (
    "Unlearning is no guarantee. The figures say what the model answers to the questions that were asked; what it was "
    "made to forget may come back by fine-tuning, quantisation or other questions (`python -m training.attack`). Do "
    "not rely on it to remove personal or dangerous knowledge."
)
COLUMNS = {  # of the table: key of a history entry -> heading
    "step": "step",
    "epoch": "epoch",
    "train_loss": "loss",
    "forget_prob": "forget prob",
    "forget_rougeL": "forget ROUGE-L",
    "forget_tr": "forget TR",
    "retain_prob": "retain prob",
    "retain_rougeL": "retain ROUGE-L",
    "forget_repetition": "repetition",
    "model_utility_geometric": "utility",
    "forget_quality": "forget quality",
}
PANELS = {"forget_prob": "forget", "retain_prob": "retain", "ra_prob": "real authors", "wf_prob": "world facts"}
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")  # of the Okabe-Ito palette


def write_unlearning_report(folder: Path, metrics: dict[str, Any], settings: dict[str, Any]) -> None:
    title = f"{metrics['method']}: forget{metrics['forget_percent']:02d}, {settings['model']}"
    plot_history(metrics["history"], title, folder / "figure.png")
    sections = [
        f"# Unlearning forget{metrics['forget_percent']:02d} by {metrics['method']}",
        history_table(metrics["history"]),
        "Prob: probability of the answer; TR: truth ratio (geometric); utility: harmonic mean of nine components; "
        "forget quality: p-value of the KS test against a model that never saw the forget set.",
        "![Probability and utility](figure.png)",
        "## What was run",
        f"- {metrics['steps']} steps; rows: " + ", ".join(f"{n} {kind}" for kind, n in metrics["rows"].items()) + ".\n"
        f"{_at_step_zero(metrics['step_zero'])}"
        f"- Settings: {_settings(settings)}.",
        "## Greedy answers, before and after",
        samples_table(metrics["samples"]),
        CAVEAT,
    ]
    write_text(folder / "report.md", "\n\n".join(sections) + "\n")


def write_finetuning_report(folder: Path, metrics: dict[str, Any], settings: dict[str, Any]) -> None:
    """The loss over the epochs, in nats a token of the answers."""
    steps, losses = zip(*((h["step"], h["train_loss"]) for h in metrics["history"][1:]), strict=True)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axis.plot(steps, losses, color=COLOURS[1], marker="o", markersize=3.5)
    axis.set(xlabel="step", ylabel="loss, nats a token", ylim=(0, None))
    axis.grid(axis="y", color="#dddddd", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    with renamed_when_done(folder / "figure.png") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)
    sections = [
        f"# Fine-tuning {settings['model']} on {settings['split']}",
        history_table(metrics["history"][1:]),
        "![Loss](figure.png)",
        f"{metrics['rows']} rows, {metrics['steps']} steps. Settings: {_settings(settings)}.",
    ]
    write_text(folder / "report.md", "\n\n".join(sections) + "\n")


def _at_step_zero(zero: dict[str, float] | None) -> str:
    if zero is None:
        return "- The method takes no reference model.\n"
    return (
        f"- Before the first step: NPO loss {zero['loss']:.6f}, (2/beta) ln 2 = {zero['expected_loss']:.6f}, largest "
        f"log-ratio to the cached reference {zero['max_abs_log_ratio']:.1e}.\n"
    )


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None)


def history_table(history: list[dict[str, Any]]) -> str:
    shown = {key: heading for key, heading in COLUMNS.items() if any(entry.get(key) is not None for entry in history)}
    lines = [list(shown.values()), ["---:"] * len(shown)]
    lines += [[cell(entry.get(key)) for key in shown] for entry in history]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3g}"


def samples_table(samples: dict[str, list[dict[str, str]]]) -> str:
    """One paragraph a question: the truth, and what the model said at each moment."""
    moments = list(samples)
    paragraphs = []
    for rows in zip(*samples.values(), strict=True):
        lines = [f"**{rows[0]['set']}: {rows[0]['question']}**", "", f"- truth: {rows[0]['answer']}"]
        lines += [f"- {moment}: {_one_line(row['generation'])}" for moment, row in zip(moments, rows, strict=True)]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def plot_history(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Answer probabilities of the four sets over the steps; utility and forget quality beside them."""
    steps = [entry["step"] for entry in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    for (key, label), colour in zip(PANELS.items(), COLOURS, strict=True):
        left.plot(steps, [entry[key] for entry in history], label=label, color=colour, marker="o", markersize=3.5)
    left.set(xlabel="step", ylabel="answer probability", ylim=(-0.02, 1.02))
    right.plot(steps, [entry["model_utility_geometric"] for entry in history], label="model utility", color=COLOURS[1])
    if history[-1]["forget_quality"] is not None:
        right.plot(steps, [entry["forget_quality"] for entry in history], label="forget quality (p)", color=COLOURS[0])
    right.set(xlabel="step", ylim=(-0.02, 1.02))
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    with renamed_when_done(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)


def model_card(base: str, what: str, settings: dict[str, Any]) -> str:
    """README.md of a saved model."""
    chosen = "\n".join(f"- {name}: {value}" for name, value in settings.items() if value is not None)
    lines = [
        "---\ntags:\n- unlearning\n- tofu\n---",
        f"# {base}, {what}",
        "Made with npo_kernels (`python -m training.finetune`, `python -m training.unlearn`) on TOFU, fictitious "
        "authors (arXiv 2401.06121). For research on unlearning.",
        "## Limits",
        CAVEAT,
        "## Settings",
        chosen,
    ]
    return "\n\n".join(lines) + "\n"
