"""report.md: what passed, what failed and why, the targets, and the figures. Rewritten after every stage."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.certify.journal import BROKEN, MISSING, NOT_MEASURED, PASSED, Journal, Outcome
from bench.certify.schedule import Stage
from bench.records import Record, latest, read, write_text
from bench.report import case_table, failures, targets_table
from bench.tables import markdown


def write(out: Path, stages: list[Stage], journal: Journal) -> str:
    """Writes report.md into the folder; returns its text."""
    path = out / "records.jsonl"
    text = "\n\n".join(sections(out, stages, journal, latest(read(path)) if path.exists() else [])) + "\n"
    write_text(out / "report.md", text)
    return text


def sections(out: Path, stages: list[Stage], journal: Journal, records: list[Record]) -> Iterator[str]:
    outcomes = {stage.name: journal.outcomes(stage.name) for stage in stages}
    every = [outcome for found in outcomes.values() for outcome in found]
    yield "# " + title(out, records)
    yield summary_table(stages, outcomes)
    failed = [outcome for outcome in every if outcome.status in BROKEN]
    if failed:
        yield "## What failed"
        yield outcome_table(failed)
    yield from tests(journal)
    absent = [outcome for outcome in every if outcome.status in (MISSING, NOT_MEASURED)]
    if absent:
        yield "## What was not measured"
        yield outcome_table(absent)
    passed = [outcome for outcome in every if outcome.status == PASSED]
    if passed:
        yield "## What passed"
        yield outcome_table(passed)
    yield "## Targets"
    yield targets_table(records)
    yield "## Figures"
    for (suite, *_), rows in groupby(sorted(records, key=_case), key=_case):
        yield f"{suite}: " + case_table(list(rows))
    yield from failures(records)


def _case(r: Record) -> tuple[str, ...]:
    return tuple(str(r[name]) for name in ("suite", "case", "mode", "dtype", "l2"))


def title(out: Path, records: list[Record]) -> str:
    """What was certified, at which commit, with what."""
    path = out / "environment.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    first = records[0] if records else {}
    machine = first.get("device") or "an unknown machine"
    versions = [f"{name} {facts[name]}" for name in ("python", "torch", "triton", "transformers") if facts.get(name)]
    parts = [f"commit {first.get('commit', 'unknown')}", f"driver {facts.get('gpu driver') or 'none'}", *versions]
    dates = sorted(r["date"] for r in records)
    if dates:
        parts.append(f"{dates[0]} to {dates[-1][11:]}")
    return f"{machine}\n\n{', '.join(parts)}."


def summary_table(stages: list[Stage], outcomes: dict[str, list[Outcome]]) -> str:
    """A row for each stage: the number of its units by outcome."""
    rows = []
    for stage in stages:
        found = outcomes[stage.name]
        of = {status: sum(o.status == status for o in found) for status in (PASSED, *BROKEN, MISSING, NOT_MEASURED)}
        broken = ", ".join(f"{of[status]} {status}" for status in BROKEN if of[status])
        seconds = sum(o.seconds or 0 for o in found)
        absent = f"{of[NOT_MEASURED]}" if of[NOT_MEASURED] else ""
        if not found or all(o.status == NOT_MEASURED for o in found):
            absent = NOT_MEASURED
        rows.append([stage.name, stage.what, str(of[PASSED] or ""), broken, str(of[MISSING] or ""), absent,
                     f"{seconds:.0f} s"])  # fmt: skip
    return markdown(["stage", "what", PASSED, "failed", MISSING, NOT_MEASURED, "time"], rows, "llrlrrr")


def outcome_table(outcomes: Iterable[Outcome]) -> str:
    """A row for each unit, with its text."""
    rows = []
    for o in outcomes:
        seconds = "" if o.seconds is None else f"{o.seconds:.1f} s"
        rows.append([o.stage, o.unit, o.status, seconds, o.detail.replace("|", "\\|")])
    return markdown(["stage", "unit", "", "time", ""], rows, "lllrl")


def tests(journal: Journal) -> Iterator[str]:
    """The tests that pytest ran, and those that failed."""
    events = journal.events("test")
    if events:
        found = [event["outcome"] for event in events]
        yield f"Of {len(found)} tests " + ", ".join(f"{found.count(o)} {o}" for o in dict.fromkeys(found)) + "."
        failed = failed_tests(journal)
        if failed:
            yield "Failed:\n\n" + "\n".join(f"- `{name}`" for name in failed)


def failed_tests(journal: Journal) -> list[str]:
    return [event["name"] for event in journal.events("test") if event["outcome"] == "failed"]
