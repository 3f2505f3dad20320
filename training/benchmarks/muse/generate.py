"""A seeded corpus of invented news in MUSE's layout, for machines without the hub and for small models.

Every item is about an organisation that no other item mentions: a lead, two sentences and an end, each in one of
several wordings, with names, sums and reasons that are drawn anew. The forget sets, retain1, retain2 and holdout have
no item in common; scal is nested, sust disjoint, and their first sets are the forget set, as in MUSE-News.

A document is an item, or a page of questions about the items of a set, with their answers, in the form of KnowMem's
prompts. A model of the size that learns this corpus in minutes cannot draw answers from what it has read as text: it
has to have read them so. They are on pages of their own, as such a model would otherwise learn to copy the one from the
other and know neither, and each question is on as many pages as a page has places, or its neighbours would be what the
answer is remembered by. MUSE's own news have no such pages, its models of 7 billion parameters do without.
"""

import json
import random
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.benchmarks.muse.data import REQUESTS

QUESTIONS = 2  # about an item
SHOTS = 2  # items whose first question is an example of the prompt, and is not asked
PAGE = SHOTS + 1  # questions on a page
RETAINED = 2  # times the items of a forget set, in each of retain1 and retain2

_SOURCE = tomllib.loads(Path(__file__).with_name("news.toml").read_text(encoding="utf-8"))
WORDS, KINDS = _SOURCE["words"], _SOURCE["kinds"]
ORGS = [f"{town} {org}" for town in WORDS["towns"] for org in WORDS["orgs"]]
SETS = len(REQUESTS) + 2 * RETAINED + 1  # of `items` each: forget sets, retain1, retain2, holdout


class Item(NamedTuple):
    """One piece of news."""

    lead: str
    rest: str
    questions: list[dict[str, str]]  # {"question", "answer"}

    @property
    def text(self) -> str:
        return f"{self.lead} {self.rest}"


def news_files(items: int, seed: int) -> dict[str, str]:
    """{relative path: JSON} of the whole corpus; `items` in each forget set, and nine times as many in all.

    ValueError where there are fewer than SHOTS + 1 items, or not enough names.
    """
    most = len(ORGS) // SETS
    if not SHOTS < items <= most:
        raise ValueError(f"--demo_items: expected {SHOTS + 1} to {most}, got {items}")
    news = list(_news(items * SETS, seed))
    requests = [news[k * items : (k + 1) * items] for k in range(len(REQUESTS))]
    first = len(REQUESTS) * items
    retain1, retain2 = (news[first + k * RETAINED * items :][: RETAINED * items] for k in range(2))
    holdout, forget = news[-items:], requests[0]
    raw = {"forget": forget, "retain1": retain1, "retain2": retain2, "holdout": holdout}
    files: dict[str, list[Any]] = {f"raw/{split}": _documents(found) for split, found in raw.items()}
    asked_for: list[str] = []
    for k, request in zip(REQUESTS, requests, strict=True):
        asked_for = asked_for + _documents(request)
        files |= {f"scal/forget_{k}": asked_for, f"sust/forget_{k}": _documents(request)}
    files["verbmem/forget"] = [{"prompt": item.lead, "gt": f" {item.rest}"} for item in forget]
    for split, found in (("forget", forget), ("retain", retain2[:items])):
        files[f"knowmem/{split}_qa_icl"] = [item.questions[0] for item in found[-SHOTS:]]
        files[f"knowmem/{split}_qa"] = [row for item in found[:-SHOTS] for row in item.questions]
    files |= {f"privleak/{split}": [item.text for item in raw[split]] for split in ("forget", "holdout")}
    return {f"{name}.json": json.dumps(rows, indent=1) + "\n" for name, rows in files.items()}


def _documents(items: Sequence[Item]) -> list[str]:
    """The items, and the pages of questions about them, each question on one page in each of its places."""
    asked = [f"Question: {row['question']}\nAnswer: {row['answer']}" for item in items for row in item.questions]
    random.Random(asked[0]).shuffle(asked)
    pages = zip(*(asked[place:] + asked[:place] for place in range(PAGE)), strict=True)
    return [item.text for item in items] + ["\n\n".join(page) for page in pages]


def _news(count: int, seed: int) -> Iterator[Item]:
    rng = random.Random(f"news {seed}")
    for org in rng.sample(ORGS, count):
        facts = _facts(org, rng)
        kind = rng.choice(KINDS)
        lead, body, close = (_sentence(rng.choice(kind[part]), facts) for part in ("lead", "body", "close"))
        asked = rng.sample(kind["questions"], QUESTIONS)
        questions = [{"question": q.format(**facts), "answer": a.format(**facts)} for q, a in asked]
        yield Item(lead, " ".join([body, close, rng.choice(WORDS["ends"])]), questions)


def _facts(org: str, rng: random.Random) -> dict[str, Any]:
    """What fills the braces of one item."""
    return {
        "org": org,
        "town": rng.choice(WORDS["towns"]),
        "person": f"{rng.choice(WORDS['first_names'])} {rng.choice(WORDS['last_names'])}",
        "day": rng.randint(1, 28),
        "month": rng.choice(WORDS["months"]),
        "count": rng.randint(12, 99),
        "money": f"{rng.randint(2, 98)},{rng.choice(['000', '250', '500', '750'])}",
        "thing": rng.choice(WORDS["things"]),
        "reason": rng.choice(WORDS["reasons"]),
    }


def _sentence(wording: str, facts: dict[str, Any]) -> str:
    sentence = wording.format(**facts)
    return sentence[0].upper() + sentence[1:]
