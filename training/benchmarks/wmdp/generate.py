"""A seeded generator of small, harmless corpora and questions in the files of WMDP and MMLU.

Made-up plants stand for bio and made-up protocols for cyber; other worlds (animals and cities, machines and cities) are
what is retained, and what the questions in MMLU's files ask about. `worlds.toml` has them. A document states what there
is to know of one thing; the holdout corpora have documents about things that no other file names.

A corpus has each of its questions as well, with the letter, in the prompt of the evaluation. A model from nothing would
otherwise answer by chance whatever it has read: that a letter is asked for, and which choice it stands for, is what
large models have from their pre-training. So accuracy on the demo is that of answers known by heart, each with the same
choices in one order, and the letters are part of what the forget corpora let a method unlearn.
"""

import json
import random
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.benchmarks.wmdp.questions import LETTERS, Question

WORLDS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("worlds.toml").read_text(encoding="utf-8"))
FORGET = {"bio": "plants", "cyber": "protocols"}
RETAIN = {"bio": "animals", "cyber": "machines"}
SHARED = "cities"  # every second one in each of the retain corpora, all of them in wikitext
THINGS = 4  # of a world; a holdout corpus has half as many


class Thing(NamedTuple):
    document: str
    questions: list[Question]  # one for each fact

    @property
    def texts(self) -> list[str]:
        """The document, and the questions with their letters."""
        return [self.document, *(f"{q.prompt()} {LETTERS[q.answer]}" for q in self.questions)]


def generate_files(things: int = THINGS, seed: int = 0) -> dict[str, str]:
    """{relative path: text}: what `--data_dir` reads; the same seed gives the same files.

    `things`: of each world, with four questions each. ValueError where a world has not as many names.
    """
    forgotten = {topic: generate_things(name, things, seed, held_out=-(-things // 2)) for topic, name in FORGET.items()}
    kept = {name: generate_things(name, things, seed)[0] for name in (*RETAIN.values(), SHARED)}
    files: dict[str, Iterable[Any]] = {}
    for i, (topic, (forget, held_out)) in enumerate(forgotten.items()):
        retain = kept[RETAIN[topic]] + kept[SHARED][i :: len(forgotten)]
        corpora = {"forget": forget, "retain": retain, "holdout": held_out}
        files |= {f"wmdp-corpora/{topic}-{kind}-corpus.jsonl": _texts(some) for kind, some in corpora.items()}
        files[f"wmdp-{topic}.jsonl"] = _questions(forget)
    files["wikitext.jsonl"] = _texts(kept[SHARED])
    for name, some in kept.items():
        files[f"mmlu/{WORLDS[name]['subject'].replace(' ', '_')}.jsonl"] = _questions(some)
    return {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}


def generate_things(world: str, number: int, seed: int, held_out: int = 0) -> tuple[list[Thing], list[Thing]]:
    """So many things of a world, and so many others, no two of one name. Answers of either are at A to D as often."""
    rng, known = random.Random(f"{world} {seed}"), WORLDS[world]
    names = [first + last for first in known["first"] for last in known["last"]]
    if not 0 < number + held_out <= len(names):
        raise ValueError(
            f"things: expected 1 to {len(names)}, as many as {world} have names, got {number} and {held_out} held out"
        )
    drawn = rng.sample(names, number + held_out)
    first, second = (_things(some, known, rng) for some in (drawn[:number], drawn[number:]))
    return first, second


def _things(names: Sequence[str], known: dict[str, Any], rng: random.Random) -> list[Thing]:
    answers = [place for _ in names for place in rng.sample(range(len(LETTERS)), len(LETTERS))]
    of_facts = [answers[i * len(names) : (i + 1) * len(names)] for i in range(len(known["facts"]))]
    return [_thing(name, known, of_thing, rng) for name, *of_thing in zip(names, *of_facts, strict=True)]


def _thing(name: str, known: dict[str, Any], answers: Sequence[int], rng: random.Random) -> Thing:
    statements, questions = [], []
    for fact, answer in zip(known["facts"], answers, strict=True):
        choices = tuple(rng.sample(fact["values"], len(LETTERS)))
        statement = rng.choice(fact["statements"]).format(name=name, value=choices[answer])
        statements.append(statement[0].upper() + statement[1:])
        questions.append(Question(known["subject"], fact["question"].format(name=name), choices, answer))
    return Thing(" ".join(statements), questions)


def _texts(things: Sequence[Thing]) -> list[dict[str, str]]:
    return [{"text": text} for thing in things for text in thing.texts]


def _questions(things: Sequence[Thing]) -> list[dict[str, Any]]:
    return [{k: v for k, v in q._asdict().items() if k != "subject"} for thing in things for q in thing.questions]
