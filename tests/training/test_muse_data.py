"""MUSE's files in every layout, the errors of invalid ones, and the generated news."""

import json
import sys
import types
from dataclasses import replace
from itertools import chain, pairwise

import pytest

from training.benchmarks.muse.benchmark import MUSE, MuseOptions
from training.benchmarks.muse.data import FORGET_SETS, AbsentError, Corpus
from training.benchmarks.muse.generate import ORGS, QUESTIONS, SHOTS, news_files
from training.benchmarks.muse.sets import load_sets
from training.templates import Format
from training.tokenizer import train_tokenizer

FILES = news_files(4, 0)


def texts(name, files=FILES):
    return json.loads(files[f"{name}.json"])


def written(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def as_lines(text):
    return "\n".join(json.dumps(row) for row in json.loads(text)) + "\n"


def as_objects(text):
    return json.dumps([row if isinstance(row, dict) else {"text": row, "id": 3} for row in json.loads(text)])


def of_repository(files):
    """With the repository's names of the retain questions."""
    return {name.replace("/retain_qa", "/retain2_qa"): text for name, text in files.items()}


LAYOUTS = {
    "arrays": FILES,
    "objects": {name: as_objects(text) for name, text in FILES.items()},
    "lines": {name: as_lines(text) for name, text in FILES.items()},
    "lines of objects": {name + "l": as_lines(as_objects(text)) for name, text in FILES.items()},
    "repository": of_repository(FILES),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_rows(layout, tmp_path):
    found, ours = Corpus(str(written(tmp_path, LAYOUTS[layout])), {}), Corpus("demo", FILES)
    assert load_sets(found, 0, True) == load_sets(ours, 0, True)
    assert found.forgettable == ours.forgettable == texts("scal/forget_4")
    assert all(found.forget_set(name) == ours.forget_set(name) for name in FORGET_SETS)


def test_a_text_file_is_one_document(tmp_path):
    book = "Chapter one.\n\n[It was dark.]\n"
    corpus = Corpus(str(written(tmp_path, {"raw/forget.txt": book})), {})
    assert corpus.texts("raw", "forget") == corpus.forgettable == [book]  # Books have no scal and no sust


def test_the_hub_is_asked_for_subset_and_split(monkeypatch):
    asked = []

    class Rows(list):
        def to_list(self):
            return list(self)

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        if subset in ("scal", "sust"):
            raise ValueError(f"BuilderConfig '{subset}' not found. Available: ['raw', 'knowmem']")
        return Rows([{"question": "q", "answer": "a"}] if subset == "knowmem" else [{"text": f"{subset} {split}"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    corpus = Corpus("muse-bench/MUSE-Books", {})
    assert corpus.texts("raw", "retain1") == ["raw retain1"]
    assert corpus.rows("knowmem", "retain_qa") == [{"question": "q", "answer": "a"}]
    assert corpus.forgettable == ["raw forget"]
    assert set(asked) >= {("muse-bench/MUSE-Books", "raw", "retain1"), ("muse-bench/MUSE-Books", "scal", "forget_1")}
    with pytest.raises(ValueError, match="MUSE-Books has no sust/forget_2: BuilderConfig"):
        corpus.forget_set("sust_2")


def test_without_datasets_the_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install 'npo-kernels\\[hub\\]'"):
        Corpus("muse-bench/MUSE-News", {}).texts("raw", "forget")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("raw/forget.json", "[]", "raw/forget: expected at least one row"),
        ("raw/forget.json", "[1]", 'raw/forget, row 1: expected texts under "text", got 1'),
        ("raw/forget.json", '["a", {"txt": "b"}]', "raw/forget, row 2: expected texts under"),
        ("raw/forget.json", '["a", ', "raw/forget.json: expected a JSON array, or a JSON value a line"),
        ("verbmem/forget.json", '["a"]', 'verbmem/forget, row 1: expected texts under "prompt", "gt", got \'a\''),
        ("knowmem/forget_qa.json", '[{"question": "a", "answer": ["b"]}]', 'under "question", "answer"'),
    ],
)
def test_wrong_files_say_which_row(name, text, message, tmp_path):
    corpus = Corpus(str(written(tmp_path, {**FILES, name: text})), {})
    subset, split = name.removesuffix(".json").split("/")
    with pytest.raises(ValueError, match=message):
        corpus.rows(subset, split)


def test_what_is_absent_is_named_with_what_is_there(tmp_path):
    corpus = Corpus(str(written(tmp_path, {"raw/forget.json": FILES["raw/forget.json"]})), {})
    with pytest.raises(AbsentError, match=r"raw/holdout\.json is not there; it has raw/forget\.json"):
        corpus.texts("raw", "holdout")
    with pytest.raises(AbsentError, match=r"retain2_qa\.json is not there.*nor retain_qa"):
        corpus.rows("knowmem", "retain_qa")
    with pytest.raises(AbsentError, match=r"no \*\.json in a folder of its own"):
        Corpus(str(tmp_path / "raw"), {}).texts("raw", "forget")
    with pytest.raises(ValueError, match="no such folder; expected one with raw/forget"):
        Corpus(str(tmp_path / "none"), {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"forget_set": "scal_5"}, "--forget_set: expected one of forget, scal_1"),
        ({"max_tokens": 1}, "--max_tokens: expected 2 or more, got 1"),
        ({"demo_items": 2}, "--demo_items: expected 3 to 64, got 2"),
        ({"demo_items": 65}, "--demo_items: expected 3 to 64, got 65"),
    ],
)
def test_options_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        MUSE(replace(MuseOptions(data_dir="demo", demo_items=4), **changed)).rows("full")


def demo(**options):
    return MUSE(MuseOptions(data_dir="demo", **{"demo_items": 4, **options}))


def test_the_splits_are_what_each_model_has_learned():
    muse = demo(forget_set="scal_2")

    def of(split):
        return [row["text"] for row in muse.rows(split)]

    kept = texts("raw/retain1") + texts("raw/retain2")
    assert of("forget") == of("scal_2") == texts("scal/forget_2")
    assert of("retain") == of("retain1") == texts("raw/retain1")
    assert of(muse.retain_split) == kept and of("full") == texts("scal/forget_4") + kept
    assert of("holdout") == texts("raw/holdout") and not set(of("full")) & set(of("holdout"))
    with pytest.raises(ValueError, match=r"--split: MUSE has full, retrain, .* got retain3"):
        muse.rows("retain3")


def test_requests_follow_one_another_and_larger_sets_do_not():
    muse = demo()
    assert (muse.scenario, muse.series, muse.follows) == ("forget", "", None)
    found = muse.scenarios("sust_1, sust_2,scal_3,sust_2")
    assert [(b.scenario, b.series, b.follows) for b in found] == [
        ("sust_1", "sust", None),
        ("sust_2", "sust", "sust_1"),
        ("scal_3", "scal", None),
    ]
    assert {b.key() for b in found} == {muse.key()}  # they are evaluated alike
    with pytest.raises(ValueError, match=r"expected some of forget, scal_1, .* got '5'"):
        muse.scenarios("scal_1,5")


def test_measures_depend_on_the_rows_and_on_how_they_are_evaluated():
    keys = [demo().key(), demo(data_seed=1).key(), demo(eval_rows=2).key(), demo(trailing_space=False).key()]
    assert len({*keys, demo(rouge="open-unlearning").key()}) == 5
    assert demo(eval_batch_size=3).key() == demo().key()


def test_the_demo_is_read_like_a_folder_of_its_files(tmp_path):
    folder = MUSE(MuseOptions(data_dir=str(written(tmp_path, demo().demo_files()))))
    assert folder.key() == demo().key() and folder.rows("full") == demo().rows("full")


def test_the_prompt_of_a_question_is_the_published_one():
    sets, shots = demo().sets, texts("knowmem/retain_qa_icl")
    lead = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in shots)
    row, asked = texts("knowmem/retain_qa")[0], sets.retain_knowmem[0]
    assert asked.prompt == f"{lead}Question: {row['question']}\nAnswer: " and asked.answer == row["answer"]
    assert demo(trailing_space=False).sets.retain_knowmem[0].prompt == asked.prompt[:-1]
    assert demo(eval_rows=3).sets.sizes() == dict.fromkeys(sets.sizes(), 3)


def test_generated_news_are_seeded():
    assert news_files(4, 0) == FILES
    assert set(texts("raw/forget", news_files(4, 1))).isdisjoint(texts("raw/forget"))


def test_generated_sets_are_disjoint_and_scal_is_nested():
    raw = {split: set(texts(f"raw/{split}")) for split in ("forget", "retain1", "retain2", "holdout")}
    sust, scal = ([texts(f"{subset}/forget_{k}") for k in (1, 2, 3, 4)] for subset in ("sust", "scal"))
    assert texts("raw/forget") == scal[0] == sust[0]
    assert [len(found) for found in scal] == [12, 24, 36, 48]  # four items and eight pages of questions each
    for before, after in pairwise(scal):
        assert after[: len(before)] == before
    assert list(chain(*sust)) == scal[3]
    apart = [set(scal[3]), raw["retain1"], raw["retain2"], raw["holdout"]]
    assert len(set().union(*apart)) == sum(map(len, apart)) == 4 * 9 * 3


def items_and_pages(name):
    documents = texts(name)
    count = len(documents) // (1 + QUESTIONS)
    return documents[:count], documents[count:]


def test_generated_questions_are_about_items_that_were_read():
    for part, split in (("forget", "raw/forget"), ("retain", "raw/retain2")):
        items, pages = items_and_pages(split)
        shots, asked = texts(f"knowmem/{part}_qa_icl"), texts(f"knowmem/{part}_qa")
        assert len(shots) == SHOTS and not {row["question"] for row in shots} & {row["question"] for row in asked}
        for row in shots + asked:
            lines = f"Question: {row['question']}\nAnswer: {row['answer']}"
            places = [page.split("\n\n").index(lines) for page in pages if lines in page]
            assert sorted(places) == [0, 1, 2]
            org = next(org for org in ORGS if org in row["question"])
            (item,) = (item for item in items if org in item)
            assert row["answer"].lower() in item.lower()  # a fact of the news itself
    items, _ = items_and_pages("raw/forget")
    assert items == [row["prompt"] + row["gt"] for row in texts("verbmem/forget")] == texts("privleak/forget")
    assert texts("privleak/holdout") == items_and_pages("raw/holdout")[0]


def test_no_organisation_is_in_two_items_or_on_pages_of_another_set():
    names = [f"raw/{split}" for split in ("retain1", "retain2", "holdout")] + [f"sust/forget_{k}" for k in (1, 2, 3, 4)]
    seen = set()
    for items, pages in map(items_and_pages, names):
        about = [{org for org in ORGS if org in item} for item in items]
        orgs = set().union(*about)
        assert all(len(some) == 1 for some in about) and len(orgs) == len(items) and not orgs & seen
        assert orgs == {org for org in ORGS if any(org in page for page in pages)}
        seen |= orgs


def test_examples_are_chunks_or_documents():
    rows = demo().rows("forget")
    format = Format(train_tokenizer(rows, vocab_size=400), "plain")
    chunks = demo(max_tokens=20).encode(format, rows)
    assert {len(e.input_ids) for e in chunks[:-1]} == {20} and all(e.labels[0] == -100 for e in chunks)
    whole = [token for e in chunks for token in e.input_ids[1:]]
    assert format.decode(whole) == "\n\n".join(row["text"] for row in rows)
    documents = demo(units="documents").encode(format, rows)
    assert [format.decode(e.input_ids[1:]) for e in documents] == [row["text"] for row in rows]


def test_line_ends_within_a_text_and_empty_texts(tmp_path):
    from training.benchmarks.muse.data import Corpus

    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw" / "forget.json"
    path.write_text('{"text": "one\u2028two"}\n{"text": "three\u0085four"}\n', encoding="utf-8")
    assert Corpus(str(tmp_path), {}).texts("raw", "forget") == ["one\u2028two", "three\u0085four"]
    path.write_text('["one", " \\n"]', encoding="utf-8")
    with pytest.raises(ValueError, match="row 2: expected texts under"):
        Corpus(str(tmp_path), {}).texts("raw", "forget")
