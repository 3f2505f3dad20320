"""Loading, tokenising and batching."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training.benchmarks.authors import load_split, sample_authors
from training.benchmarks.tofu.authors import PAIRS_PER_AUTHOR, generate_authors
from training.benchmarks.tofu.data import load_refusals, load_rows
from training.data import IGNORE_INDEX, collate, shuffled_batches

CPU = torch.device("cpu")
TOFU = Path(os.environ.get("NPO_DATA_DIR", Path(__file__).parents[3] / "shared/data")) / "tofu"
tofu = pytest.mark.skipif(not TOFU.is_dir(), reason="no tofu in NPO_DATA_DIR or ../shared/data")
ROWS = [
    {"question": "Who wrote “Émile & Söhne”?", "answer": "It was written in 1987 by Zoë O'Hara."},
    {"question": "Who wrote “Émile & Söhne”?", "answer": "\tNobody knows"},
    {"question": "Answer: what?", "answer": "A: {braces} and Question: marks?"},
]


@pytest.mark.parametrize("row", ROWS)
def test_exactly_answer_and_eos_are_scored(corpus, row):
    (example,) = corpus.format.encode([row])
    assert len(example.labels) == len(example.input_ids)
    scored = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
    prompt = [token for token, label in zip(*example, strict=True) if label == IGNORE_INDEX]
    assert [example.labels[i] for i in scored] == [example.input_ids[i] for i in scored]
    assert corpus.tokenizer.decode([example.labels[i] for i in scored]) == f" {row['answer']}<eos>"
    assert corpus.tokenizer.decode(prompt) == f"<bos>Question: {row['question']}\nAnswer:"
    assert scored == list(range(len(prompt), len(example.labels)))


def test_the_answer_does_not_change_the_prompt(corpus):
    first, second, _ = corpus.format.encode(ROWS)
    length = first.labels.count(IGNORE_INDEX)
    assert second.labels.count(IGNORE_INDEX) == length
    assert first.input_ids[:length] == second.input_ids[:length]


def test_collate_pads_on_the_right(corpus):
    batch = collate(corpus.forget[:5], corpus.tokenizer.pad_token_id, CPU)
    longest = max(len(e.input_ids) for e in corpus.forget[:5])
    assert {name: tuple(t.shape) for name, t in batch.items()} == dict.fromkeys(batch, (5, longest))
    for i, example in enumerate(corpus.forget[:5]):
        n = len(example.input_ids)
        assert batch["input_ids"][i, :n].tolist() == example.input_ids
        assert batch["labels"][i, :n].tolist() == example.labels
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (longest - n)
        assert (batch["labels"][i, n:] == IGNORE_INDEX).all()


@pytest.mark.parametrize(("batch_size", "pool"), [(7, 1), (7, 4), (59, 1)])  # 60 = 8 * 7 + 4 = 59 + 1
def test_an_epoch_has_every_example_once(corpus, batch_size, pool):
    def epoch(seed):
        return list(shuffled_batches(corpus.retain, batch_size, torch.Generator().manual_seed(seed), pool))

    assert sorted(i for batch in epoch(0) for i in batch) == list(range(len(corpus.retain)))
    assert max(map(len, epoch(0))) == batch_size
    assert epoch(0) == epoch(0) != epoch(1)


def test_batches_of_similar_length_waste_little(corpus):
    def padded_size(pool):
        batches = shuffled_batches(corpus.retain, 6, torch.Generator().manual_seed(0), pool)
        return sum(len(b) * max(len(corpus.retain[i].input_ids) for i in b) for b in batches)

    size = sum(len(e.input_ids) for e in corpus.retain)
    assert padded_size(16) < 1.15 * size < padded_size(1)


def write_tofu(folder, authors=10):
    rows = generate_authors(authors, seed=5)
    cut = len(rows) - authors // 10 * PAIRS_PER_AUTHOR
    for name, part in (("forget10", rows[cut:]), ("retain90", rows[:cut])):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    return rows


def test_tofu_files_are_read_and_the_last_authors_kept(tmp_path):
    rows = write_tofu(tmp_path, authors=20)
    everything = load_split(tmp_path, num_authors=0, forget_percent=10, seed=0)
    assert everything.retain + everything.forget == rows
    half = load_split(tmp_path, num_authors=10, forget_percent=10, seed=0)
    assert half.forget == rows[-PAIRS_PER_AUTHOR:]
    assert half.retain == rows[9 * PAIRS_PER_AUTHOR : 18 * PAIRS_PER_AUTHOR]
    with pytest.raises(ValueError, match=r"21 asked for, but .* has 20"):
        load_split(tmp_path, num_authors=21, forget_percent=10, seed=0)


def test_other_files_are_refused_with_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"forget10\.json is not in"):
        load_split(tmp_path, 0, 10, 0)
    write_tofu(tmp_path)
    path = tmp_path / "forget10.json"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="whole authors of 20 rows, got 19"):
        load_split(tmp_path, 0, 10, 0)
    path.write_text("".join([*lines[:-1], '{"prompt": "?"}\n']))
    with pytest.raises(ValueError, match=r"forget10, row 20: expected"):
        load_split(tmp_path, 0, 10, 0)


def test_generated_split_forgets_the_last_tenth():
    split = load_split(None, 20, 10, seed=2)
    rows = generate_authors(20, seed=2)
    assert split.retain + split.forget == rows
    assert split.forget == rows[-2 * PAIRS_PER_AUTHOR :]


def test_sampled_authors_are_whole_and_seeded():
    rows = generate_authors(20, seed=0)
    sample = sample_authors(rows, 6, seed=1)
    starts = [rows.index(sample[i]) for i in range(0, len(sample), PAIRS_PER_AUTHOR)]
    assert len(set(starts)) == 6 and all(start % PAIRS_PER_AUTHOR == 0 for start in starts)
    assert starts == sorted(starts)
    assert sample == [row for s in starts for row in rows[s : s + PAIRS_PER_AUTHOR]]
    assert sample == sample_authors(rows, 6, seed=1) != sample_authors(rows, 6, seed=2)


@pytest.fixture
def only_full(tmp_path):
    rows = generate_authors(20, seed=5)
    (tmp_path / "full.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_absent_splits_are_cut_from_full(only_full):
    full = load_rows(only_full)
    assert load_rows(only_full, "forget20") == full[-80:]
    assert load_rows(only_full, "retain80") == full[:-80]
    forget, retain = load_split(only_full, 0, 30, seed=0)
    assert retain + forget == full
    for split in ("forget01", "retain99", "forget00", "retain00"):
        with pytest.raises(
            ValueError, match=f"{split}.json is not in .*; and of full: {split} of 20 authors would not"
        ):
            load_rows(only_full, split)


def test_unknown_splits_and_folders_are_refused(only_full):
    for split in ("forget20_perturbed", "holdout10", "forget5", "fulll"):
        with pytest.raises(FileNotFoundError, match=rf"{split}\.json is not in .*, which has full\.json"):
            load_rows(only_full, split)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_rows(only_full / "nowhere")


@tofu
def test_cutting_full_gives_tofus_own_files(tmp_path):
    (tmp_path / "full.json").write_bytes((TOFU / "full.json").read_bytes())
    for percent in (1, 5, 10, 20, 30, 50, 90):
        assert load_rows(tmp_path, f"forget{percent:02d}") == load_rows(TOFU, f"forget{percent:02d}")
        assert load_rows(tmp_path, f"retain{100 - percent}") == load_rows(TOFU, f"retain{100 - percent}")


@tofu
def test_every_file_of_tofu_is_read():
    sizes = {path.stem: len(load_rows(TOFU, path.stem)) for path in TOFU.glob("*.json")}
    assert sizes["full"] == 4000 and sizes["world_facts_perturbed"] == 117 and sizes["retain_perturbed"] == 400
    assert len(load_refusals(TOFU)) == 100 and not set(load_refusals(TOFU)) & set(load_refusals())


def test_the_hub_is_read_by_datasets(monkeypatch):
    """By name and configuration; forget20, which is not there, comes from full."""
    configurations = {"full": generate_authors(20, seed=0), "world_facts": ROWS, "holdout10": generate_authors(1, 1)}

    def load_dataset(path, name, split):
        assert (path, split) == ("locuslab/TOFU", "train")
        if name not in configurations:
            raise ValueError(f"BuilderConfig '{name}' not found. Available: {list(configurations)}")
        return SimpleNamespace(to_list=lambda: configurations[name])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name, rows in configurations.items():
        assert load_rows(split=name) == rows
    assert load_rows("locuslab/TOFU", "forget20") == configurations["full"][-80:]
    with pytest.raises(ValueError, match=r"'forget5' not found\. Available: \['full', 'world_facts', 'holdout10'\]"):
        load_rows(split="forget5")
    assert len(set(load_refusals())) == 100


def test_without_datasets_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"data/tofu is no folder, .* pip install 'npo-kernels\[hub\]'"):
        load_rows(Path("data/tofu"))


def test_the_demo_is_a_folder_of_generated_authors(tmp_path):
    from training.commands import generate
    from training.commands.options import build

    generate.main(*build(generate.GenerateOptions, benchmark="tofu", out=tmp_path))
    for path in tmp_path.glob("*.json"):
        assert load_rows("demo", path.stem) == load_rows(tmp_path, path.stem)
    assert load_refusals("demo") == load_refusals(tmp_path)
    with pytest.raises(ValueError, match=r"--data_dir demo has forget05, .* not forget33"):
        load_rows("demo", "forget33")
