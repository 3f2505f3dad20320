"""What a run says: the table on the terminal, the paragraph under it, and report.md."""

from typing import Any

from rich.table import Table

from training.authors import PAIRS_PER_AUTHOR
from training.methods import METHODS

# Shares of the probability before unlearning that count as kept and as lost.
KEPT, LOST = 0.8, 0.2

History = list[dict[str, Any]]  # one entry an epoch, as `Run.measure` makes them


def result_table(histories: dict[str, History]) -> Table:
    table = Table(title="Answer probability")
    for heading in _headings(histories, "\n"):
        table.add_column(heading, justify="right")
    for row in _rows(histories):
        table.add_row(*row)
    return table


def what_to_see(histories: dict[str, History]) -> str:
    """One paragraph, derived from the numbers, whichever way they went."""
    before = next(iter(histories.values()))[0]
    forget0, retain0 = before["forget_probability"], before["retain_probability"]
    sentences = [
        f"Fine-tuned, the model gives the true answers a probability of {forget0:.2f} on the authors to forget and "
        f"{retain0:.2f} on the authors to keep."
    ]
    for method, history in histories.items():
        forget, retain = history[-1]["forget_probability"], history[-1]["retain_probability"]
        sentences.append(
            f"{METHODS[method].label} takes them to {forget:.2g} and {retain:.2g}: what was to be forgotten is "
            f"{_state(forget / forget0)}, what was to be kept is {_state(retain / retain0)}."
        )
    return " ".join(sentences)


def _state(share: float) -> str:
    return "kept" if share > KEPT else "lost" if share < LOST else "damaged"


def markdown(metrics: dict[str, Any], config: dict[str, Any], seconds: dict[str, float]) -> str:
    """report.md: the result, what was run, and examples."""
    histories, data = metrics["history"], metrics["data"]
    headings = _headings(histories, ", ")
    sections = [
        [f"# Unlearning {data['forget_authors']} of {data['authors']} authors ({data['name']})"],
        [what_to_see(histories)],
        ["![Answer probability per epoch](figure.png)"],
        [_line(headings), _line(["---:"] * len(headings)), *(_line(row) for row in _rows(histories))],
        [
            "Answer probability: exp(mean log-probability of the tokens of the true answer and its end), averaged",
            f"over the {data['forget_pairs']} pairs of the authors to forget, and over the {data['retain_eval_pairs']} "
            f"pairs of {data['retain_eval_pairs'] // PAIRS_PER_AUTHOR} authors to keep, a seeded sample of the",
            f"{data['authors'] - data['forget_authors']}. The authors to keep are those whose rows NPO+RT "
            "rehearses, so this is retention, not generalisation.",
        ],
        ["## What was run"],
        _facts(metrics, config, seconds),
        ["## The same questions, before and after (greedy answers)"],
        *([f"**{e['group']}: {e['question']}**", "", *_answers(e["answers"])] for e in metrics["examples"]),
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _facts(metrics: dict[str, Any], config: dict[str, Any], seconds: dict[str, float]) -> list[str]:
    data, s, zero = metrics["data"], config["settings"], metrics["step_zero"]
    return [
        f"- Data: {data['name']}: {data['pairs']} question and answer pairs, {data['tokens']} tokens, of which",
        f"  {data['scored_tokens']} are scored (answers and end tokens).",
        f"- Model: Llama, {metrics['parameters'] / 1e6:.1f} M parameters (width {s['hidden_size']}, {s['layers']} "
        f"layers, tied embeddings),",
        f"  byte-level BPE of {metrics['vocab_size']} entries trained on the text.",
        f"- Fine-tuning: {s['finetune_epochs']} epochs over all authors, batch {s['batch_size']}, AdamW, peak learning "
        f"rate {s['finetune_lr']:g};",
        f"  mean loss of the last epoch {metrics['finetune_loss']:.3f} nats a token.",
        f"- Unlearning: {s['epochs']} epochs over the forget set, batch {s['batch_size']}, AdamW, peak learning rate "
        f"{s['lr']:g} for every method,",
        f"  warm-up over the first epoch, linear decay to 0. NPO+RT: beta {s['beta']:g}, plus "
        f"{s['retain_weight']:g} times the mean NLL of as many retain",
        "  rows, drawn anew each epoch. GA, gradient ascent: minus the mean NLL of the forget rows alone.",
        f"- Before the first step: NPO loss {zero['loss']:.6f}, (2/beta) ln 2 = {zero['expected_loss']:.6f}, largest "
        f"log-ratio to the cached",
        f"  reference {zero['max_abs_log_ratio']:.1e}.",
        f"- Wall time, {config['device']}: " + ", ".join(f"{stage} {t:.0f} s" for stage, t in seconds.items()) + ".",
        "- Versions: " + ", ".join(f"{name} {v}" for name, v in config["versions"].items()) + f"; seed {s['seed']}.",
    ]


def _headings(histories: dict[str, History], separator: str) -> list[str]:
    return ["epoch", *(METHODS[m].label + separator + group for m in histories for group in ("forget", "keep"))]


def _rows(histories: dict[str, History]) -> list[list[str]]:
    """One row an epoch: its number, then (forget, keep) of every method."""
    keys = ("forget_probability", "retain_probability")
    epochs = zip(*histories.values(), strict=True)
    return [[str(entries[0]["epoch"])] + [f"{e[key]:.3f}" for e in entries for key in keys] for entries in epochs]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _answers(answers: dict[str, str]) -> list[str]:
    return [f"- {who}: {answer or '(nothing)'}" for who, answer in answers.items()]
