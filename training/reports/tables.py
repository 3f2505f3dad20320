"""The one table of all reports: Markdown in files, rich on a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table


def cell(value: Any) -> str:
    """Three significant digits of a float, a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[Any]], text: int = 1) -> str:
    """The first `text` columns to the left, the numbers behind them to the right."""
    aligned = ["---"] * text + ["---:"] * (len(headings) - text)
    lines = [headings, aligned, *([cell(value).replace("|", "\\|") for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def terminal(headings: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", caption: str = "") -> Table:
    table = Table(title=title or None, caption=caption or None)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(cell, row))
    return table


def settings_line(settings: Mapping[str, Any]) -> str:
    """Those that were given a value, in a sentence."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def samples(answers: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """{moment: the same questions} -> one paragraph a question: the truth, and what the model said at each moment."""
    paragraphs = []
    for rows in zip(*answers.values(), strict=True):
        lines = [f"**{rows[0]['set']}: {rows[0]['question']}**", "", f"- truth: {rows[0]['answer']}"]
        lines += [f"- {moment}: {_one_line(row['generation'])}" for moment, row in zip(answers, rows, strict=True)]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"
