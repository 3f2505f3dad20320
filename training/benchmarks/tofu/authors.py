"""A seeded generator of fictitious authors: question and answer pairs that no model has seen before.

The layout is that of TOFU (Maini et al. 2024, arXiv 2401.06121): rows {"question", "answer"}, 20 consecutive rows per
author. Every author is asked about 20 of the 26 kinds of fact in `authors.toml`, in one of several wordings each, so
what there is to memorise is the person and not the sentence.

`tofu_files` are those of a folder that is read like TOFU's: full, every forgetXX with its retainYY that is whole
authors, and for the evaluation *_perturbed: a paraphrase in another wording, and wrong answers in the paraphrase's,
with the facts of somebody else. What stands for TOFU's real authors are further generated ones, whom no set asks to
forget, and for its world facts small ones about cities and months. A model that is trained from scratch has seen
neither before; train it on real_authors and world_facts, too, where that is to be measured.
"""

import json
import random
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

PAIRS_PER_AUTHOR = 20
FORGET_PERCENTS = (1, 5, 10, 20, 30, 50, 90)
PERTURBED_PERCENTS = (1, 5, 10)  # the larger ones are scored on forget10, as in TOFU
NUM_WRONG = 5  # answers of an author's question; real authors and world facts have three
NUM_OTHERS, QUESTIONS_EACH = 25, 4  # authors that stand for the real ones

_SOURCE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FIRST_NAMES, WORDS, TRAITS, FACTS = (_SOURCE[table] for table in ("first_names", "words", "traits", "facts"))
WORLD_FACTS = _SOURCE["world_facts"]
Name = tuple[str, str, str]  # first, last, "he" or "she"
NAMES: list[Name] = [
    (first, last, he) for he in FIRST_NAMES for first in FIRST_NAMES[he] for last in WORDS["last_names"]
]
POSSESSIVE, OBJECTIVE = {"she": "her", "he": "his"}, {"she": "her", "he": "him"}
PERSON = {"first", "he", "his", "him", "He", "His"}


class Asked(NamedTuple):
    """One row before it is written: who is asked about, what, and how."""

    profile: dict[str, Any]
    kind: str
    question: str
    answer: str

    def row(self) -> dict[str, str]:
        return {"question": self.question.format(**self.profile), "answer": self.answer.format(**self.profile)}


def generate_authors(num_authors: int, seed: int) -> list[dict[str, str]]:
    """`num_authors` * 20 rows {"question", "answer"}, author after author; the same seed gives the same rows."""
    return [asked.row() for asked in _asked(num_authors, seed)]


def generate_perturbed(num_authors: int, seed: int) -> list[dict[str, Any]]:
    """The same rows with TOFU's further columns: paraphrased_question, paraphrased_answer, perturbed_answer.

    The five wrong answers are sentences of the paraphrase's form. What the question does not state is another author's,
    and every such fact differs from the true one.
    """
    rows = []
    for number, asked in enumerate(_asked(num_authors, seed)):
        rng = random.Random(f"perturbed {seed} {number}")  # the rows themselves do not depend on it
        question, answer = (
            rng.choice([wording for wording in FACTS[asked.kind][part] if wording != used])
            for part, used in (("questions", asked.question), ("answers", asked.answer))
        )
        paraphrase = asked._replace(question=question, answer=answer)
        rows.append(
            asked.row()
            | {
                "paraphrased_answer": paraphrase.row()["answer"],
                "perturbed_answer": _wrong_answers(paraphrase, rng),
                "paraphrased_question": paraphrase.row()["question"],
            }
        )
    return rows


def generate_others(num_authors: int, seed: int) -> list[dict[str, Any]]:
    """{"question", "answer", "perturbed_answer"}: short answers about authors that `generate_authors` leaves out."""
    rng = random.Random(f"others {seed}")
    rows = []
    for first, last, he in _other_names(num_authors, seed, rng):
        profile = _profile(first, last, he, rng)
        for kind in rng.sample(sorted(FACTS.keys() & TRAITS.keys()), QUESTIONS_EACH):
            question = rng.choice(FACTS[kind]["questions"]).format(**profile)
            rows.append(_with_options(question, profile[kind], TRAITS[kind], rng))
    return rows


def generate_holdout(num_authors: int, count: int, seed: int) -> list[dict[str, str]]:
    """Rows like those of `generate_authors`, of `count` authors whom no other split asks about; fewer where there are
    not as many names left."""
    taken = set(_names(num_authors, seed))
    if len(NAMES) - len(taken) >= NUM_OTHERS:
        taken |= set(_other_names(num_authors, seed))
    free = [name for name in NAMES if name not in taken]
    rng = random.Random(f"holdout {seed}")
    return [asked.row() for asked in _asked_about(rng.sample(free, min(len(free), count)), rng)]


def _other_names(num_authors: int, seed: int, rng: random.Random | None = None) -> list[Name]:
    """Rows of the authors that stand for real authors."""
    taken = set(_names(num_authors, seed))
    free = [name for name in NAMES if name not in taken]
    if len(free) < NUM_OTHERS:
        raise ValueError(f"authors: expected at most {len(NAMES) - NUM_OTHERS}, got {num_authors}")
    return (rng or random.Random(f"others {seed}")).sample(free, NUM_OTHERS)


def generate_world_facts(seed: int) -> list[dict[str, Any]]:
    """{"question", "answer", "perturbed_answer"}: cities, their countries, and the order of the months."""
    rng = random.Random(f"world facts {seed}")
    cities, countries = zip(*(place.split(", ") for place in WORDS["cities"]), strict=True)
    months = WORDS["months"]
    tables = {
        "country": (cities, countries),
        "city": (countries, cities),
        "next_month": (months, months[1:] + months[:1]),
        "previous_month": (months, months[-1:] + months[:-1]),
    }
    return [
        _with_options(WORLD_FACTS[name].format(given), answer, answers, rng)
        for name, (questions, answers) in tables.items()
        for given, answer in zip(questions, answers, strict=True)
    ]


def _with_options(question: str, answer: str, answers: list[str], rng: random.Random) -> dict[str, Any]:
    wrong = rng.sample([other for other in answers if other != answer], 3)
    return {"question": question, "answer": answer, "perturbed_answer": wrong}


def _wrong_answers(truth: Asked, rng: random.Random) -> list[str]:
    """`NUM_WRONG` sentences of the wording of `truth`, false in every fact that questions of its kind do not state."""
    stated = set().union(*map(_fields, FACTS[truth.kind]["questions"]))
    replaced = _fields(truth.answer) - stated
    facts = replaced - PERSON  # two people may share a pronoun
    known = truth.profile
    answers: list[str] = []
    while len(answers) < NUM_WRONG:
        person: Name = (known["first"], known["last"], known["he"]) if "name" in stated else rng.choice(NAMES)
        other = _profile(*person, rng)
        answer = truth.answer.format(**known | {field: other[field] for field in replaced})
        if answer not in answers and all(other[fact] != known[fact] for fact in facts):
            answers.append(answer)
    return answers


def _fields(wording: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(wording) if field}


def _names(num_authors: int, seed: int, rng: random.Random | None = None) -> list[Name]:
    if not 0 < num_authors <= len(NAMES):
        raise ValueError(f"authors: expected 1 to {len(NAMES)}, as many as there are names, got {num_authors}")
    return (rng or random.Random(seed)).sample(NAMES, num_authors)


def _asked(num_authors: int, seed: int) -> Iterator[Asked]:
    rng = random.Random(seed)
    return _asked_about(_names(num_authors, seed, rng), rng)


def _asked_about(names: list[Name], rng: random.Random) -> Iterator[Asked]:
    for first, last, he in names:
        profile = _profile(first, last, he, rng)
        for kind in rng.sample(sorted(FACTS), PAIRS_PER_AUTHOR):
            question, answer = (rng.choice(FACTS[kind][part]) for part in ("questions", "answers"))
            yield Asked(profile, kind, question, answer)


def _profile(first: str, last: str, he: str, rng: random.Random) -> dict[str, str]:
    """All facts about one author, which fill the templates."""
    debut_year = rng.randint(1958, 2009)
    birth_year = debut_year - rng.randint(22, 40)
    debut, famous, latest = _titles(3, rng)
    father, mother, job, mentor_job, sibling_job = rng.sample(WORDS["jobs"], 5)
    city, study_city, home = rng.sample(WORDS["cities"], 3)
    facts = {
        "name": f"{first} {last}",
        "first": first,
        "last": last,
        "he": he,
        "his": POSSESSIVE[he],
        "him": OBJECTIVE[he],
        "birthday": f"{rng.choice(WORDS['months'])} {rng.randint(1, 28)}, {birth_year}",
        "city": city,  # with its country; the others without
        "study_city": study_city.split(",")[0],
        "home": home.split(",")[0],
        "father": father,
        "mother": mother,
        "job": job,
        "mentor": _person(rng),
        "mentor_job": mentor_job,
        "sibling": f"{_first_name(rng)} {last}",
        "sibling_job": sibling_job,
        "influence": _person(rng),
        "director": _person(rng),
        "debut": debut,
        "famous": famous,
        "latest": latest,
        "debut_year": debut_year,
        "award_year": debut_year + rng.randint(2, 15),
        "film_year": debut_year + rng.randint(5, 16),
        "setting_year": rng.randint(1700, 1990),
    }
    traits = {trait: rng.choice(choices) for trait, choices in TRAITS.items()}
    return {"He": he.capitalize(), "His": POSSESSIVE[he].capitalize(), **facts, **traits}


def _titles(count: int, rng: random.Random) -> list[str]:
    pairs = zip(rng.sample(WORDS["adjectives"], count), rng.sample(WORDS["nouns"], count), strict=True)
    places, titles = WORDS["places"], WORDS["titles"]
    return ['"' + rng.choice(titles).format(a=a, n=n, p=rng.choice(places)) + '"' for a, n in pairs]


def _first_name(rng: random.Random) -> str:
    return rng.choice(FIRST_NAMES[rng.choice(sorted(FIRST_NAMES))])


def _person(rng: random.Random) -> str:
    return f"{_first_name(rng)} {rng.choice(WORDS['last_names'])}"


def tofu_files(num_authors: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """{split: rows} of the folder, in TOFU's names and columns; forgetXX only where it is whole authors."""
    perturbed = generate_perturbed(num_authors, seed)
    full = [{"question": row["question"], "answer": row["answer"]} for row in perturbed]
    others = generate_holdout(num_authors, max(1, num_authors // 10), seed)
    files = {"full": full, "retain_perturbed": perturbed[: max(1, num_authors // 10) * PAIRS_PER_AUTHOR]}
    for percent in FORGET_PERCENTS:
        num_forget, rest = divmod(num_authors * percent, 100)
        if num_forget and not rest:
            cut = len(full) - num_forget * PAIRS_PER_AUTHOR
            files |= {f"forget{percent:02d}": full[cut:], f"retain{100 - percent}": full[:cut]}
            if percent in PERTURBED_PERCENTS:
                files[f"forget{percent:02d}_perturbed"] = perturbed[cut:]
                files[f"holdout{percent:02d}"] = others[: num_forget * PAIRS_PER_AUTHOR]
    for name, rows in (
        ("real_authors", generate_others(num_authors, seed)),
        ("world_facts", generate_world_facts(seed)),
    ):
        files |= {name: [_options(row) for row in rows], f"{name}_perturbed": rows}
    return files


def json_lines(files: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, str]:
    """{file name: text} of {split: rows}."""
    return {
        f"{name}.json": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, rows in files.items()
    }


def _options(row: dict[str, Any]) -> dict[str, str]:
    """{"question", "option1", ..., "option4", "answer"}"""
    options = sorted([row["answer"], *row["perturbed_answer"]])  # so the true one may stand anywhere
    numbered = {f"option{n}": option for n, option in enumerate(options, 1)}
    return {"question": row["question"], **numbered, "answer": row["answer"]}
