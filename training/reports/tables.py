"""Tables for all reports: Markdown in files, rich on a terminal. Escaping of text from models and data.

Text from a model or a data set may contain markup and terminal control codes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # but line ends and tabs


def cell(value: Any) -> str:
    """Three significant digits of a float, a dash for None."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[Any]], text: int = 1) -> str:
    """A Markdown table: the first `text` columns aligned left, the others right."""
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
    """The settings that have a value, in one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def samples(answers: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """{moment: the same questions} -> one paragraph a question: the truth, and what the model said at each moment."""
    paragraphs = []
    for rows in zip(*answers.values(), strict=True):
        lines = [f"**{rows[0]['set']}: {escaped(rows[0]['question'])}**", "", f"- truth: {escaped(rows[0]['answer'])}"]
        said = ((moment, escaped(row["generation"]) or "(nothing)") for moment, row in zip(answers, rows, strict=True))
        lines += [f"- {moment}: {text}" for moment, text in said]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def escaped(text: str) -> str:
    """Text on one line, escaped so that Markdown shows it literally: no tags, links, headings or columns."""
    return re.sub(r"([\\`*_\[\]<>&|~#])", r"\\\1", visible(" ".join(text.split())))


def visible(text: str) -> str:
    """Text with control codes written out, such as \\x1b, including those that reverse the text direction."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
