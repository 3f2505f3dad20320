"""The generator: seeded, of TOFU's schema, and not uniform; its folder is read like TOFU's."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from training.benchmarks.authors import load_split
from training.benchmarks.tofu.authors import (
    FACTS,
    NAMES,
    NUM_WRONG,
    PAIRS_PER_AUTHOR,
    generate_authors,
    generate_perturbed,
)
from training.benchmarks.tofu.data import load_refusals, load_rows
from training.benchmarks.tofu.eval_sets import load_eval_sets
from training.commands.authors import AuthorsOptions, main

TOFU = Path(os.environ.get("NPO_DATA_DIR", Path(__file__).parents[3] / "shared/data")) / "tofu"


def test_same_seed_same_rows():
    assert generate_authors(5, seed=3) == generate_authors(5, seed=3)
    assert generate_authors(5, seed=3) != generate_authors(5, seed=4)


def test_the_demos_rows_stay_what_they_are():
    """Its committed results are of these."""
    rows = json.dumps(generate_authors(60, seed=0)).encode()
    assert hashlib.sha256(rows).hexdigest() == "e8cee7294cfd08ee815a02c0f365f9160c5383ceb4afec80602efa606fbe1826"


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


@pytest.fixture(scope="module")
def perturbed():
    return generate_perturbed(30, seed=2)


def test_further_columns_leave_the_rows_alone(perturbed):
    assert [{"question": r["question"], "answer": r["answer"]} for r in perturbed] == generate_authors(30, seed=2)
    assert perturbed == generate_perturbed(30, seed=2)


def test_wrong_answers_are_wrong_and_of_the_paraphrases_form(perturbed):
    for row in perturbed:
        truth, wrong = row["paraphrased_answer"], row["perturbed_answer"]
        assert len({truth, row["answer"], *wrong}) == NUM_WRONG + 2
        assert row["paraphrased_question"] != row["question"]
        assert not set("{}|") & set("".join([truth, row["paraphrased_question"], *wrong]))
        wordings = (wording for kind in FACTS.values() for wording in kind["answers"])
        assert any(all(matches(wording, sentence) for sentence in (truth, *wrong)) for wording in wordings)


def matches(wording: str, sentence: str) -> bool:
    """Whether the fixed words of the wording are those of the sentence, in their order."""
    pieces = re.split(r"\{\w+\}", wording)
    return re.fullmatch(".+".join(map(re.escape, pieces)), sentence) is not None


def test_every_asked_fact_is_replaced(perturbed):
    """Award and year, job and name: half of a wrong answer must not be true."""
    kinds = {
        "identity": (r"^(?:The author|That) is ([\w ]+),", None),
        "award": (r"received the (.*) in (\d+)\.", None),
        "sibling": (r"sibling,? (\w+) .* a (.*)\.", None),
        "setting": (r"(?:in|place in) ([A-Z][\w ]+?)(?:,| around).* (\d{4})\.", r"set|setting"),
        "parents": (r"a ([a-z ]+) and a ([a-z ]+?)(?:,| gave)", None),
    }
    seen = dict.fromkeys(kinds, 0)
    for row in perturbed:
        for kind, (pattern, asked) in kinds.items():
            found = re.search(pattern, row["paraphrased_answer"])
            if found and (asked is None or re.search(asked, row["question"])):
                seen[kind] += 1
                for wrong in row["perturbed_answer"]:
                    others = re.search(pattern, wrong).groups()
                    assert all(a != b for a, b in zip(found.groups(), others, strict=True)), (found[0], wrong)
    assert all(seen.values()), seen


def test_what_the_question_states_stays(perturbed):
    titles = [(row, re.search('".*"', row["paraphrased_question"])) for row in perturbed]
    titles = [(row, title[0]) for row, title in titles if title and title[0] in row["paraphrased_answer"]]
    assert titles and all(title in wrong for row, title in titles for wrong in row["perturbed_answer"])
    names = {" ".join(r["answer"].split()[:2]) for r in perturbed if " was born in " in r["answer"]}
    assert names
    for row in perturbed:
        stated = [n for n in names if n in row["question"]]
        for name in stated:
            assert all((name in w) == (name in row["paraphrased_answer"]) for w in row["perturbed_answer"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("authors")
    main(AuthorsOptions(out=path, authors=20, seed=4))
    return path


def test_the_folder_is_read_like_tofus(folder):
    full = load_rows(folder, "full")
    assert full == generate_authors(20, seed=4)
    for percent in (5, 10, 20, 30, 50, 90):
        forget = load_rows(folder, f"forget{percent:02d}")
        assert load_rows(folder, f"retain{100 - percent}") + forget == full
        assert len(forget) == percent * len(full) // 100
    assert not (folder / "forget01.json").exists()  # a fifth of an author
    forget, retain = load_split(folder, 0, 10, seed=0)
    assert retain + forget == full
    assert load_refusals(folder) == load_refusals(folder / "nothing here") and len(set(load_refusals(folder))) == 100
    sets = load_eval_sets(folder, 10, rows=0)
    assert {name: len(rows) for name, rows in sets.items()} == {"retain": 40, "ra": 100, "wf": 76, "forget": 40}
    assert [row.question for row in sets["forget"]] == [row["question"] for row in full[-40:]]
    for name, wrong in {"retain": 5, "ra": 3, "wf": 3, "forget": 5}.items():
        assert all(len({row.answer, *row.perturbed}) == wrong + 1 for row in sets[name])


def test_others_are_nobody_of_the_forget_sets(folder):
    def people(split):
        text = "\n".join(row["question"] for row in load_rows(folder, split))
        return {f"{first} {last}" for first, last, _ in NAMES if f"{first} {last}" in text}

    assert len(people("full")) >= 20 and len(people("real_authors")) == 25
    assert not people("full") & people("real_authors")


@pytest.mark.skipif(not TOFU.is_dir(), reason="no tofu in NPO_DATA_DIR or ../shared/data")
def test_columns_are_tofus(folder):
    for path in folder.glob("*.json"):
        theirs = load_rows(TOFU, path.stem.replace("holdout", "forget"))  # which is on the hub alone
        for row in load_rows(folder, path.stem):
            assert row.keys() == theirs[0].keys()
            assert {k: type(v) for k, v in row.items()} == {k: type(v) for k, v in theirs[0].items()}


def test_the_command_needs_a_folder():
    with pytest.raises(ValueError, match="expected --out DIR"):
        main(AuthorsOptions())
