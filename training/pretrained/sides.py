"""Answers to the same questions side by side: before unlearning, retrained, and after each headline method."""

import textwrap
from collections.abc import Mapping, Sequence

from training.methods import METHODS
from training.pretrained.findings import NOT_MEASURED
from training.pretrained.outcomes import SCENARIOS, Outcomes
from training.pretrained.plan import HEADLINE, retrained_on
from training.reports import tables

SHOWN = 240  # characters of an answer in the report
Answers = dict[str, list[dict[str, str]]]


def side_by_side(outcomes: Outcomes, scenario: str) -> Answers:
    """{moment: answers}, of the questions that all moments have, in the order of the first."""
    found: dict[str, Sequence[Mapping[str, str]]] = {}
    for name, moment in (("full", "before (full model)"), (retrained_on(scenario), "never learned (retain model)")):
        found[moment] = outcomes.models.get(name, {}).get("answers") or []
    for method in HEADLINE:
        arm = outcomes.arm(scenario, method)
        if arm:
            found[METHODS[method].label] = arm.runs[0].record.get("answers") or []
    given = {moment: {row["question"]: dict(row) for row in rows} for moment, rows in found.items() if rows}
    if not any(moment in given for moment in (METHODS[method].label for method in HEADLINE)):
        return {}
    first, *others = given.values()
    questions = [question for question in first if all(question in other for other in others)]
    return {moment: [rows[question] for question in questions] for moment, rows in given.items()}


def page(outcomes: Outcomes) -> str:
    """answers.md: all questions of all scenarios."""
    sections = ["# Questions before and after unlearning", "Greedy answers at the end of unlearning, first seed."]
    for scenario in SCENARIOS:
        answers = side_by_side(outcomes, scenario)
        sections += [f"## {scenario}", tables.samples(answers) or NOT_MEASURED.capitalize() + "."]
    return "\n\n".join(sections) + "\n"


def excerpt(outcomes: Outcomes, count: int, link: str) -> list[str]:
    """A few of the questions, long answers cut, those to forget first and one to keep."""
    answers = side_by_side(outcomes, SCENARIOS[0])
    if not answers:
        return [f"{SCENARIOS[0]}: {NOT_MEASURED}."]
    rows = next(iter(answers.values()))
    forget, keep = ([i for i, row in enumerate(rows) if (row["set"] == "forget") == wanted] for wanted in (True, False))
    picked = sorted(forget[: count - 1 if keep else count] + keep[:1])
    short = {
        moment: [given[i] | {"generation": textwrap.shorten(given[i]["generation"], SHOWN)} for i in picked]
        for moment, given in answers.items()
    }
    return [f"All of them: [{link}]({link}).", tables.samples(short)]
