"""Other plausible answers to the questions to forget. AltPO prefers them to the true ones (arXiv 2409.13474).

A file of JSON lines, one per question: {"question": ..., "alternates": [answer, ...]}. If the model generated them, the
first line is {"key": ...}, a hash of everything that they depend on, so one rename makes answers and key appear
together.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from training.data import Row
from training.generation import complete_all
from training.progress import OnRows, nothing
from training.store import write_text
from training.templates import Format

PROMPT = "Give another answer to this question, plausible and of the same form, but with other facts: {question}"


def make_alternates(
    model: PreTrainedModel,
    format: Format,
    rows: Sequence[Row],
    count: int,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    prompt: str = PROMPT,
    on_rows: OnRows = nothing,
) -> list[list[str]]:
    """Sample up to `count` different answers to each question from the model, excluding the true one.

    A question for which the model draws nothing else takes what another one was given, so that none is without.
    """
    found: list[list[str]] = [[] for _ in rows]
    questions = [prompt.replace("{question}", row["question"]) for row in rows]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(count):
            answers = complete_all(model, format, questions, max_new_tokens, on_rows=on_rows, temperature=temperature)
            for some, row, answer in zip(found, rows, answers, strict=True):
                if answer and answer != row["answer"] and answer not in some:
                    some.append(answer)
    everything = [answer for some in found for answer in some]
    if not everything:
        raise ValueError("the model draws nothing but the true answers; raise --temperature")
    return [some or [everything[i % len(everything)]] for i, some in enumerate(found)]


def write_alternates(path: Path, rows: Sequence[Row], alternates: Sequence[Sequence[str]], key: str) -> None:
    lines = [json.dumps({"key": key})] + [
        json.dumps({"question": row["question"], "alternates": list(some)}, ensure_ascii=False)
        for row, some in zip(rows, alternates, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")


def key_of(path: Path) -> str | None:
    """The key in the first line of the file; None for a file written by hand."""
    with path.open(encoding="utf-8") as file:
        try:
            first = json.loads(file.readline())
        except json.JSONDecodeError:
            return None
    return first.get("key") if isinstance(first, dict) else None


def read_alternates(path: Path, rows: Sequence[Row]) -> list[list[str]]:
    """The alternates of each row, found by its question. ValueError if a question is missing in the file."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # strings may hold other line ends
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if number == 1 and "key" in entry:
                continue
            question, answers = entry["question"], entry["alternates"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected {{question, alternates}}, got {error!r}") from None
        if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
            raise ValueError(
                f"{path}, line {number}: alternates: expected a list of answers with text, got {answers!r}"
            )
        found[question] = answers
    for row in rows:
        if not found.get(row["question"]):
            raise ValueError(f"{path}: expected alternates for every question, found none for {row['question']!r}")
    return [found[row["question"]] for row in rows]
