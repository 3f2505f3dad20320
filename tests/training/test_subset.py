"""A subset of TOFU keeps its structure: all forget rows, and evaluation rows of the kept authors."""

import json

import pytest

from training.benchmarks.tofu.data import load_refusals, load_rows
from training.benchmarks.tofu.eval_sets import load_eval_sets
from training.commands import authors, subset


@pytest.fixture
def source(tmp_path):
    authors.main(authors.AuthorsOptions(out=tmp_path / "data", authors=20, seed=0))
    return str(tmp_path / "data")


def test_fewer_authors_to_keep_in_files_of_the_same_form(source, tmp_path):
    out = tmp_path / "part"
    subset.main(subset.SubsetOptions(source, forget_percent=10, retain_authors=3, out=out))
    forget, retain, full = (load_rows(out, name) for name in ("forget10", "retain90", "full"))
    assert forget == load_rows(source, "forget10") and retain == load_rows(source, "retain90")[:60]
    assert full == retain + forget
    kept = {row["question"] for row in retain}
    sets = load_eval_sets(out, 10, 0)
    assert {row.question for row in sets["retain"]} <= kept
    assert len(sets["forget"]) == len(forget) and sets["ra"] == load_eval_sets(source, 10, 0)["ra"]
    assert load_refusals(out) == load_refusals(source)
    assert all(json.loads(line) for path in out.glob("*.json") for line in path.read_text().splitlines())


def test_more_authors_than_there_are(source, tmp_path):
    with pytest.raises(ValueError, match="--retain_authors: expected 1 to 18, got 19"):
        subset.main(subset.SubsetOptions(source, forget_percent=10, retain_authors=19, out=tmp_path / "part"))
