"""The generator: seeded, of TOFU's schema, and not uniform."""

import pytest

from training.authors import FACTS, PAIRS_PER_AUTHOR, generate_authors


def test_same_seed_same_rows():
    assert generate_authors(5, seed=3) == generate_authors(5, seed=3)
    assert generate_authors(5, seed=3) != generate_authors(5, seed=4)


def test_schema_is_tofus():
    rows = generate_authors(12, seed=0)
    assert len(rows) == 12 * PAIRS_PER_AUTHOR
    for row in rows:
        assert list(row) == ["question", "answer"]
        assert row["question"].endswith("?") and row["answer"].endswith(".")
        assert not set("{}|") & set(row["question"] + row["answer"])


def test_every_wording_can_be_filled():
    """Enough authors to meet each of the wordings: none names a fact that authors do not have."""
    assert len(generate_authors(300, seed=1)) == 300 * PAIRS_PER_AUTHOR
    assert all(len(FACTS[kind][part]) >= 2 for kind in FACTS for part in ("questions", "answers"))


def test_authors_differ():
    rows = generate_authors(40, seed=0)
    assert len({row["question"] for row in rows}) == len(rows)
    answers = [row["answer"] for row in rows]
    assert len(set(answers)) > 0.9 * len(answers)
    assert len({answer.split()[0] for answer in answers}) > 40


def test_too_many_authors_are_refused():
    for number in (0, 10**6):
        with pytest.raises(ValueError, match=f"got {number}"):
            generate_authors(number, seed=0)
