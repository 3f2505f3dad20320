"""A seeded generator of fictitious authors: question and answer pairs nobody can have seen before.

The layout is that of TOFU (Maini et al. 2024, arXiv 2401.06121): rows {"question", "answer"}, 20 consecutive rows per
author. Every author is asked about 20 of the 26 kinds of fact in `authors.toml`, in one of several wordings each, so
what there is to memorise is the person and not the sentence.
"""

import random
import tomllib
from pathlib import Path

PAIRS_PER_AUTHOR = 20

_SOURCE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FIRST_NAMES, WORDS, TRAITS, FACTS = (_SOURCE[table] for table in ("first_names", "words", "traits", "facts"))
POSSESSIVE, OBJECTIVE = {"she": "her", "he": "his"}, {"she": "her", "he": "him"}


def generate_authors(num_authors: int, seed: int) -> list[dict[str, str]]:
    """`num_authors` * 20 rows {"question", "answer"}, author after author; the same seed gives the same rows."""
    rng = random.Random(seed)
    names = [(first, last, he) for he in FIRST_NAMES for first in FIRST_NAMES[he] for last in WORDS["last_names"]]
    if not 0 < num_authors <= len(names):
        raise ValueError(f"authors: expected 1 to {len(names)}, as many as there are names, got {num_authors}")
    rows = []
    for first, last, he in rng.sample(names, num_authors):
        profile = _profile(first, last, he, rng)
        for kind in rng.sample(sorted(FACTS), PAIRS_PER_AUTHOR):
            question, answer = (rng.choice(FACTS[kind][part]) for part in ("questions", "answers"))
            rows.append({"question": question.format(**profile), "answer": answer.format(**profile)})
    return rows


def _profile(first: str, last: str, he: str, rng: random.Random) -> dict[str, str]:
    """Everything there is to know about one author: what fills the braces of the wordings."""
    debut_year = rng.randint(1958, 2009)
    birth_year = debut_year - rng.randint(22, 40)
    debut, famous, latest = _titles(3, rng)
    father, mother, job, mentor_job, sibling_job = rng.sample(WORDS["jobs"], 5)
    city, study_city, home = rng.sample(WORDS["cities"], 3)
    facts = {
        "name": f"{first} {last}",
        "first": first,
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
