"""Show the tokens of one row as the model receives them: id, text, position, and whether each is scored.

    python -m training.show_rows --data_dir path/to/tofu --split forget10 --row 3
    python -m training.show_rows --model DIR --data_dir locuslab/TOFU --template llama-3

Scored tokens, which losses and metrics are computed on, are green; the prompt is dim. Without --model or --tokenizer
the demo's tokenizer is trained on the rows. Without --data_dir the rows are generated authors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from training.benchmarks.tofu.authors import tofu_files
from training.benchmarks.tofu.data import load_rows
from training.commands.options import command_line
from training.data import IGNORE_INDEX, Example
from training.loading import load_tokenizer
from training.reports.tables import visible
from training.templates import Format
from training.tokenizer import train_tokenizer

PROG = "training.show_rows"
DEMO_AUTHORS, DEMO_VOCABULARY = 60, 4096
SCORED, PROMPT = "bold green", "dim"


@dataclass(frozen=True)
class ShowRowsOptions:
    """The row."""

    model: Annotated[Path | None, "folder or hub name of a model, whose tokenizer is used"] = None
    tokenizer: Annotated[Path | None, "folder or hub name of a tokenizer"] = None
    data_dir: Annotated[Path | None, "folder with TOFU's JSON lines, or the name of a data set on the hub"] = None
    split: Annotated[str, "full, forget10, retain90, world_facts_perturbed, ..."] = "forget10"
    row: Annotated[int, "number of the row, from 0"] = 0
    template: Annotated[
        str, "prompt template (training/templates.py); auto: chosen by the tokenizer's chat template"
    ] = "auto"


def main(options: ShowRowsOptions, console: Console | None = None) -> Example:
    """The example that was shown."""
    console = console or Console()
    rows = _rows(options)
    if not 0 <= options.row < len(rows):
        raise ValueError(f"--row: {options.split} has the rows 0 to {len(rows) - 1}, got {options.row}")
    format = Format(_tokenizer(options, rows), options.template)
    examples = format.encode(rows)
    example = examples[options.row]
    console.print(_text(format, example))
    console.print(_table(format, example))
    console.print(_counts(format, example, examples), highlight=False, soft_wrap=True)
    return example


def _rows(options: ShowRowsOptions) -> list[dict]:
    if options.data_dir is not None:
        return load_rows(options.data_dir, options.split)
    files = tofu_files(DEMO_AUTHORS, seed=0)
    if options.split not in files:
        raise ValueError(f"--split: generated authors have {', '.join(sorted(files))}, got {options.split}")
    return files[options.split]


def _tokenizer(options: ShowRowsOptions, rows: list[dict]) -> PreTrainedTokenizerBase:
    name = options.tokenizer or options.model
    return load_tokenizer(name) if name else train_tokenizer(rows, DEMO_VOCABULARY)


def _text(format: Format, example: Example) -> Text:
    """The whole text, coloured; decoded in two parts, as a character may be more than one token."""
    length = _prompt_length(example)
    prompt, answer = (visible(format.decode(ids)) for ids in (example.input_ids[:length], example.input_ids[length:]))
    return Text.assemble((prompt, PROMPT), (answer, SCORED))


def _table(format: Format, example: Example) -> Table:
    table = Table(box=None)
    for heading in ("position", "id"):
        table.add_column(heading, justify="right")
    table.add_column("token", no_wrap=True)
    table.add_column("scored")
    for position, (token, label) in enumerate(zip(*example, strict=True)):
        scored = label != IGNORE_INDEX
        cells = (str(position), str(token), repr(format.decode([token])), "yes" if scored else "")
        table.add_row(*(Text(cell, SCORED if scored else PROMPT) for cell in cells))
    return table


def _counts(format: Format, example: Example, examples: list[Example]) -> str:
    lengths = [len(e.input_ids) for e in examples]
    scored = [len(e.input_ids) - _prompt_length(e) for e in examples]
    stops = ", ".join(f"{i} {format.decode([i])!r}" for i in format.stop_ids)
    return (
        f"this row: {len(example.input_ids)} tokens, {len(example.input_ids) - _prompt_length(example)} scored\n"
        f"the split: {len(examples)} rows, {sum(lengths)} tokens, {sum(scored)} scored, the longest {max(lengths)}\n"
        f"template {format.template}, ends with {stops}, sha256 {format.hash()[:16]}"
    )


def _prompt_length(example: Example) -> int:
    return example.labels.count(IGNORE_INDEX)


if __name__ == "__main__":
    command_line(PROG, ShowRowsOptions, __doc__, main)
