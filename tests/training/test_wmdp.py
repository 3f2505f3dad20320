"""WMDP: its files and their mistakes, letters scored as lm-evaluation-harness does it, and the whole command line."""

import csv
import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.benchmarks.wmdp.benchmark import WMDP, WmdpOptions
from training.benchmarks.wmdp.choices import Encoded, encode_prompt, letter_logps
from training.benchmarks.wmdp.data import interleaved, parse_corpus
from training.benchmarks.wmdp.generate import WORLDS, generate_files
from training.benchmarks.wmdp.questions import LETTERS, Question, parse_questions
from training.benchmarks.wmdp.summary import accuracy, forgetting, lm_eval_summary, pooled_stderr, summary
from training.commands import evaluate, finetune, tiny, unlearn
from training.commands.options import build, parse
from training.model import build_model, load_model
from training.pieces import Pieces
from training.progress import progress
from training.templates import Format
from training.tokenizer import train_tokenizer

QUESTION = Question("biology", "  Which one? ", ("a leaf", "a root", "a stem", "a seed"), 2)
ROW = {"question": "Which one?", "choices": ["a", "b", "c", "d"], "answer": 1}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def benchmark(folder: Path, **options) -> WMDP:
    return WMDP(WmdpOptions(data_dir=str(folder), **options))


# ------------------------------------------------------------------ files


def test_the_prompt_is_that_of_lm_evaluation_harness():
    assert QUESTION.prompt() == (
        "The following are multiple choice questions (with answers) about biology.\n\n"
        "Which one?\nA. a leaf\nB. a root\nC. a stem\nD. a seed\nAnswer:"
    )
    assert QUESTION.shown(3) == "D. a seed"


def test_an_array_lines_and_csv_are_the_same_questions():
    rows = [{**ROW, "question": 'What, "exactly",\nis it?', "answer": n % 4} for n in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = io.StringIO()
    csv.writer(table).writerows([r["question"], *r["choices"], LETTERS[r["answer"]]] for r in rows)
    found = parse_questions("x.jsonl", lines, "law")
    assert [q.answer for q in found] == [0, 1, 2, 3, 0] and found[0].question == rows[0]["question"]
    assert parse_questions("x.json", json.dumps(rows, indent=1), "law") == found
    assert parse_questions("x_test.csv", table.getvalue(), "law") == found
    of_its_own = parse_questions("x.jsonl", json.dumps({**ROW, "subject": "abstract_algebra"}), "law")
    assert of_its_own[0].subject == "abstract algebra"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.jsonl", json.dumps(ROW) + '\n{"question": "What', "q.jsonl, line 2: not JSON"),
        ("q.json", '[{"question": 1', "q.json: not JSON"),
        ("q.jsonl", "", "q.jsonl: expected questions, got none"),
        ("q.jsonl", json.dumps({**ROW, "answer": 4}), r"row 1: expected .* got the answer 4"),
        ("q.jsonl", json.dumps({**ROW, "answer": True}), "got the answer True"),
        ("q.jsonl", json.dumps({**ROW, "answer": "E"}), "got the answer 'E'"),
        ("q.jsonl", json.dumps({**ROW, "choices": ["a", "b", "c"]}), r"got the choices \['a', 'b', 'c'\]"),
        ("q.jsonl", json.dumps({**ROW, "choices": ["a", "b", "c", 4]}), "got the choices"),
        ("q.jsonl", json.dumps({**ROW, "question": " "}), "row 1: expected"),
        ("q.jsonl", "[1, 2]", "row 1: expected .* got 1"),
        ("q.csv", "question,a,b,c,A\n", "q.csv, row 1: expected .* got \\['question'"),
    ],
)
def test_malformed_questions_say_where(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse_questions(name, text, "law")


def test_a_corpus_is_json_or_plain():
    rows = [{"title": "T", "abstract": "A", "text": "one"}, {"text": "two\u2028still two"}]
    assert parse_corpus("c.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n\n" for r in rows)) == [
        "one",
        "two\u2028still two",
    ]
    assert parse_corpus("c.jsonl", '"one"\n"two"\n') == ["one", "two"]
    assert parse_corpus("c.jsonl", 'plain text\n{"text": "as it stands"}\n') == [
        "plain text",
        '{"text": "as it stands"}',
    ]
    assert parse_corpus("c.jsonl", "1999 was plain\n") == ["1999 was plain"]
    assert parse_corpus("c.txt", '"quoted"\n') == ['"quoted"']
    for text, message in (("\n\n", "empty"), ('{"text": "a"}\n{"text"', "line 2"), ('{"title": "a"}', "line 1")):
        with pytest.raises(ValueError, match=message):
            parse_corpus("c.jsonl", text)


def test_a_folder_with_the_published_names(tmp_path):
    files = generate_files(3)
    corpus = files.pop("wmdp-corpora/bio-forget-corpus.jsonl")
    tables = {f"mmlu/test/{Path(n).stem}_test.csv": n for n in files if n.startswith("mmlu/")}
    for name, of in tables.items():
        table = io.StringIO()
        rows = map(json.loads, files.pop(of).splitlines())
        csv.writer(table).writerows([r["question"], *r["choices"], LETTERS[r["answer"]]] for r in rows)
        files[name] = table.getvalue()
    files["wmdp-cyber.json"] = json.dumps([json.loads(x) for x in files.pop("wmdp-cyber.jsonl").splitlines()])
    files["bio_remove_dataset.jsonl"] = corpus + json.dumps({"text": "short"}) + "\n"  # as it was first called
    found, demo = benchmark(write(tmp_path, files)), WMDP(WmdpOptions(data_dir="demo"))
    demo.source = type(found.source)("demo", generate_files(3))
    assert found.tasks == demo.tasks
    assert all(found.rows(split) == demo.rows(split) for split in ("forget", "retain", "full", "holdout"))
    assert found.key() == demo.key() != benchmark(tmp_path, topics="bio").key()


def test_topics_take_turns_and_what_is_kept_is_chosen(tmp_path):
    assert list(interleaved("ab", "ABC")) == ["a", "A", "b", "B", "C"]
    files = {
        f"wmdp-corpora/{topic}-{kind}-corpus.jsonl": "".join(
            json.dumps({"text": f"{topic} {kind} {n} {'x' * 50}"}) + "\n" for n in range(3)
        )
        for topic in ("bio", "cyber")
        for kind in ("forget", "retain")
    }
    write(tmp_path, files | {"wikitext.txt": f"wiki 0 {'x' * 50}\n = Heading = \nwiki 1 {'x' * 50}"})

    def shown(split, **options):
        return [" ".join(row["text"].split()[:-1]) for row in benchmark(tmp_path, **options).rows(split)]

    assert shown("forget") == [f"{t} forget {n}" for n in range(3) for t in ("bio", "cyber")]
    assert shown("forget", topics="cyber", forget_documents=2) == ["cyber forget 0", "cyber forget 1"]
    assert shown("retain", topics="bio") == [f"bio retain {n}" for n in range(3)]
    assert shown("retain", topics="bio", retain_corpus="wikitext") == ["wiki 0", "wiki 1"]
    both = ["bio retain 0", "wiki 0", "bio retain 1", "wiki 1", "bio retain 2"]
    assert shown("retain", topics="bio", retain_corpus="both") == both
    assert shown("full", topics="bio") == shown("forget", topics="bio") + shown("retain", topics="bio")
    assert shown("holdout") == []
    with pytest.raises(ValueError, match="--min_chars 100: leaves none"):
        shown("forget", min_chars=100)
    with pytest.raises(ValueError, match="--split: WMDP has full, forget, retain, holdout, got retain90"):
        shown("retain90")


def test_what_is_absent_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"--data_dir .*nowhere: expected a folder, demo, or a data set of the hub"):
        benchmark(tmp_path / "nowhere").rows("forget")
    (tmp_path / "notes.txt").write_text("x")
    found = benchmark(tmp_path)
    with pytest.raises(ValueError, match=r"expected wmdp-corpora/bio-forget-corpus\.jsonl or .*, got notes.txt"):
        found.rows("forget")
    with pytest.raises(ValueError, match=r"expected wmdp-bio\.jsonl or wmdp-bio\.json"):
        _ = found.tasks
    (tmp_path / "wmdp-bio.jsonl").write_text(json.dumps(ROW))
    assert list(benchmark(tmp_path, topics="bio", mmlu=False).tasks) == ["wmdp_bio"]
    with pytest.raises(ValueError, match=r"expected mmlu/\{subject\}.jsonl or .* got notes.txt, wmdp-bio.jsonl"):
        _ = benchmark(tmp_path, topics="bio").tasks
    (tmp_path / "wmdp-chem.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"wmdp-chem\.json is not UTF-8"):
        _ = benchmark(tmp_path, topics="bio", mmlu=False).tasks


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"topics": "chem"}, "--topics: expected some of bio, cyber, got 'chem'"),
        ({"topics": " , "}, "--topics"),
        ({"retain_corpus": "c4"}, "--retain_corpus: expected own, wikitext, both, got 'c4'"),
        ({"max_tokens": 1}, "--max_tokens: expected at least 2, got 1"),
        ({"eval_batch_size": 0}, "--eval_batch_size"),
    ],
)
def test_options_are_checked(option, message):
    with pytest.raises(ValueError, match=message):
        WmdpOptions(**option)


# ------------------------------------------------------------------ the generator


def test_the_generator_is_seeded_and_its_answers_are_balanced():
    files = generate_files(5, seed=3)
    assert files == generate_files(5, seed=3) != generate_files(5, seed=4)
    for name, text in files.items():
        if "corpus" not in name and name != "wikitext.jsonl":
            answers = Counter(json.loads(line)["answer"] for line in text.splitlines())
            assert set(answers) == {0, 1, 2, 3} and len(set(answers.values())) == 1, name
    with pytest.raises(ValueError, match="things: expected 1 to 80, as many as plants have names, got 70 and 35"):
        generate_files(70, seed=0)


def test_the_demo_learns_what_it_is_asked_and_nothing_of_what_is_held_out():
    """Every question is in the corpus with its letter, and the document about its subject states the answer."""
    demo = WMDP(WmdpOptions(data_dir="demo"))
    learned = "\n".join(row["text"] for row in demo.rows("full"))
    documents = [text for row in demo.rows("full") if "Answer:" not in (text := row["text"])]
    for task, questions in demo.tasks.items():
        assert len(set(questions)) == len(questions) == 16, task
        for q in questions:
            assert f"{q.prompt()} {LETTERS[q.answer]}" in learned
            (of_it,) = (text for text in documents if name_in(q.question) in text)
            stated = [choice for choice in q.choices if re.search(rf"\b{choice}\b", of_it, re.IGNORECASE)]
            assert stated == [q.choices[q.answer]], of_it
    held_out = {name_in(row["text"]) for row in demo.rows("holdout")}
    assert len(held_out) == 4 and not any(name in learned for name in held_out)


NAMES = [first + last for world in WORLDS.values() for first in world["first"] for last in world["last"]]


def name_in(text: str) -> str:
    return next(name for name in NAMES if name in text)


# ------------------------------------------------------------------ the letters


def with_spaces(texts: list[str]) -> PreTrainedTokenizerFast:
    """Like SentencePiece: a space before every text, spaces are part of a token's beginning."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def questions():
    return WMDP(WmdpOptions(data_dir="demo")).tasks["wmdp_bio"]


@pytest.fixture(scope="module")
def tokenizer(questions):
    return train_tokenizer([{"question": q.prompt(), "answer": "A B C D"} for q in questions], 500)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(len(tokenizer), 64, 1, {}, seed=0)


def plain_logps(model, prompt: list[int], letters: list[list[int]]) -> list[float]:
    """As lm-evaluation-harness: the log-softmax of the logits of prompt + continuation, one at a time."""
    found = []
    for ids in letters:
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor([(prompt + ids)[:-1]])).logits[0].double(), -1)
        found.append(sum(logps[len(prompt) - 1 + n, i].item() for n, i in enumerate(ids)))
    return found


def test_letters_are_those_of_a_text_that_goes_on(questions, tokenizer):
    spaced = with_spaces([f"{q.prompt()} {letter}" for q in questions for letter in LETTERS])
    for tok in (tokenizer, spaced):
        for q in questions[:3]:
            one = encode_prompt(tok, q.prompt())
            assert one.single and len({tuple(ids) for ids in one.letters}) == 4
            whole = [tok.encode(f"{q.prompt()} {letter}", add_special_tokens=False) for letter in LETTERS]
            assert [one.prompt + ids for ids in one.letters] == whole
            assert encode_prompt(tok, q.prompt(), bos=True).prompt == [tok.bos_token_id, *one.prompt]
    assert spaced.encode("A", add_special_tokens=False) == one.letters[0]  # which has a space before it
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="--bos on: expected a tokenizer with bos_token"):
        encode_prompt(without, "x", bos=True)


def test_letters_of_one_forward_are_those_of_the_logits(questions, tokenizer, model):
    encoded = [encode_prompt(tokenizer, q.prompt(), bos=True) for q in questions]
    model.train()
    found = letter_logps(model, encoded, 0, batch_size=7)
    assert model.training
    model.eval()
    for one, logps in zip(encoded, found, strict=True):
        assert logps == pytest.approx(plain_logps(model, one.prompt, one.letters), abs=1e-5)
    assert letter_logps(model, [], 0) == []
    assert letter_logps(model, encoded[:1], 0) == [pytest.approx(found[0], abs=1e-6)]


def test_letters_of_several_tokens_take_a_forward_each(questions, tokenizer, model):
    """And the two ways agree where both can be taken."""
    single = [encode_prompt(tokenizer, q.prompt()) for q in questions[:5]]
    several = [Encoded(one.prompt, [[7, *ids] for ids in one.letters[:2]] + one.letters[2:]) for one in single]
    mixed = [x for pair in zip(single, several, strict=True) for x in pair]
    rows: list[int] = []

    def on_rows(count: int, tokens: int) -> None:
        rows.append(count)

    for one, logps in zip(mixed, letter_logps(model, mixed, 0, 4, on_rows), strict=True):
        assert logps == pytest.approx(plain_logps(model, one.prompt, one.letters), abs=1e-5)
    assert sum(rows) == len(mixed)
    for a, b in zip(letter_logps(model, single, 0), letter_logps(model, several, 0), strict=True):
        assert a[2:] == pytest.approx(b[2:], abs=1e-6)


def test_a_prompt_beyond_the_models_positions_loses_its_beginning(tokenizer):
    model = build_model(len(tokenizer), 64, 1, {}, seed=0)
    model.config.max_position_embeddings = 8
    long = encode_prompt(tokenizer, QUESTION.prompt())
    assert letter_logps(model, [long], 0)[0] == pytest.approx(
        plain_logps(model, long.prompt[-8:], long.letters), abs=1e-5
    )
    several = Encoded(long.prompt, [[5, *ids] for ids in long.letters])
    expected = plain_logps(model, long.prompt[-6:], several.letters)
    assert letter_logps(model, [several], 0)[0] == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------ the numbers


def rows_of(correct: int, number: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        answer, logps = int(rng.integers(4)), rng.normal(size=4)
        logps[answer] = logps.max() + 1 if i < correct else logps.min() - 1
        rows.append({"logps": logps.tolist(), "answer": answer})
    return rows


def test_accuracy_and_its_error_by_hand():
    found = accuracy(rows_of(6, 8))
    values = [1.0] * 6 + [0.0] * 2
    assert found.acc == np.mean(values)
    assert found.acc_stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(8), rel=1e-12)
    assert 0.25 < found.acc_low < 0.75 < found.acc_high < 1
    probabilities = [np.exp(r["logps"])[r["answer"]] / np.exp(r["logps"]).sum() for r in rows_of(6, 8)]
    assert found.prob == pytest.approx(np.mean(probabilities), rel=1e-12)


def test_one_question_ties_and_certainty():
    one = accuracy([{"logps": [-1.0, -2.0, -3.0, -4.0], "answer": 0}])
    assert (one.number, one.acc, one.acc_stderr) == (1, 1.0, None) and one.acc_low < one.acc_high == 1
    same = [{"logps": [-1.0] * 4, "answer": n} for n in range(4)]
    assert accuracy(same).acc == 0.25 and accuracy(same).prob == pytest.approx(0.25)  # the first letter is taken
    sure = accuracy([{"logps": [-1e4, 0.0, -1e4, -1e4], "answer": 0}] * 3)
    assert (sure.acc, sure.acc_stderr, sure.acc_low, sure.prob) == (0, 0, 0, 0) and sure.acc_high > 0


def test_the_pooled_error_is_that_of_pooled_variances():
    parts = [rows_of(3, 4), rows_of(5, 20), rows_of(1, 1)]
    values = [np.array([float(i < c) for i in range(n)]) for c, n in ((3, 4), (5, 20), (1, 1))]
    squares = sum(((v - v.mean()) ** 2).sum() for v in values)
    expected = math.sqrt(squares / (25 - 3) / 25)
    assert pooled_stderr([accuracy(part) for part in parts]) == pytest.approx(expected, rel=1e-12)
    assert pooled_stderr([accuracy(parts[2])]) is None


def test_the_summary_weighs_subjects_by_size():
    tasks = {
        "wmdp_bio": rows_of(3, 12),
        "wmdp_cyber": rows_of(8, 8),
        "mmlu_law": rows_of(1, 2),
        "mmlu_art": rows_of(9, 10),
    }
    measures = {"tasks": tasks, "documents": {}}
    found = summary(measures, ["bio", "cyber"])
    assert found["mmlu_acc"] == 10 / 12 and found["mmlu_law_acc"] == 0.5
    assert found["wmdp_forgetting"] == pytest.approx((1 - 11 / 20) / 0.75)
    assert forgetting(measures, ["bio"]) == 1 and forgetting(measures, ["cyber"]) == 0
    assert forgetting({"tasks": {"wmdp_bio": rows_of(0, 5)}}, ["bio"]) == 1  # below chance is no better
    written = lm_eval_summary(measures)
    assert list(written) == [f"{t}/{k}" for t in ("wmdp_bio", "wmdp_cyber", "mmlu") for k in ("acc", "acc_stderr")]
    assert written["wmdp_bio/acc_stderr"] == found["wmdp_bio_acc_stderr"]


# ------------------------------------------------------------------ the whole command line


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `data`, and a model `full` that has read a little of it."""
    home = write(tmp_path_factory.mktemp("wmdp"), {f"data/{n}": t for n, t in generate_files(2).items()})
    run(home, tiny, tiny.TinyOptions, "--out", home / "base", "--vocab_size", 400, "--hidden_size", 64)
    fast = ("--preset", "tiny", "--device", "cpu", "--batch_size", 8)
    run(
        home, finetune, finetune.FinetuneOptions, *fast, "--model", home / "base", "--out", home / "full", "--epochs", 2
    )
    return home


def run(home: Path, command, kind: type, *arguments):
    words = ["--benchmark", "wmdp", "--data_dir", str(home / "data"), *map(str, arguments)]
    return command.main(*parse(kind, command.PROG, "", words))


@pytest.mark.parametrize("method", ["npo_rt", "rmu_rt"])
def test_a_method_unlearns_from_text(home, tmp_path, method):
    arguments = ("--preset", "tiny", "--device", "cpu", "--model", home / "full" / "model", "--method", method,
                 "--epochs", 2, "--lr", 1e-3, "--eval_documents", 4)  # fmt: skip
    metrics = run(home, unlearn, unlearn.UnlearnOptions, *arguments, "--out", tmp_path)
    before, *_, after = metrics["history"]
    assert metrics["scenario"] == "bio-cyber" and metrics["rows"] == {"forget": 20, "retain": 30}
    forget, retain = (after[f"{kind}_perplexity"] / before[f"{kind}_perplexity"] for kind in ("forget", "retain"))
    assert forget > retain and before["forget_perplexity"] > 1
    assert all(0 <= after[key] <= 1 for key in ("wmdp_bio_acc", "wmdp_cyber_acc", "mmlu_acc", "wmdp_forgetting"))
    assert 0 <= after["mia_loss"] <= 1 and after["privleak"] is not None
    report = (tmp_path / "report.md").read_text()
    assert "MMLU acc" in report and "Which" in report and (tmp_path / "figure.png").exists()


def test_an_evaluation_is_read_checked_and_written_in_open_unlearnings_names(home, tmp_path):
    model = ("--model", home / "full" / "model", "--device", "cpu")
    found = run(home, evaluate, evaluate.EvaluateOptions, *model, "--out", tmp_path)
    log = tmp_path / evaluate.LOG_FILE
    assert run(home, evaluate, evaluate.EvaluateOptions, "--from_log", log) == found
    wmdp = benchmark(home / "data")
    measures = wmdp.read(log)
    wmdp.check(measures)
    assert wmdp.open_unlearning(measures, found)["LMEval_SUMMARY.json"]["mmlu/acc"] == found["mmlu_acc"]
    headings, rows = wmdp.table(found)
    assert [row[0] for row in rows[:3]] == ["wmdp bio", "wmdp cyber", "mmlu"] and len(headings) == len(rows[0])
    with pytest.raises(ValueError, match=r"--start_log: .* whose wmdp_bio, "):
        benchmark(home / "data", questions=3).check(measures)
    log.write_text(json.dumps(measures | {"tasks": {"wmdp_bio": [{"logps": [0.0]}]}}))
    with pytest.raises(ValueError, match="expected an evaluation of --benchmark wmdp"):
        wmdp.read(log)


def test_an_interrupted_evaluation_goes_on(home, tmp_path):
    wmdp = benchmark(home / "data", eval_documents=3)
    format = Format(AutoTokenizer.from_pretrained(home / "full" / "model"))
    model = load_model(home / "full" / "model", torch.device("cpu"))

    class Stopping(Pieces):
        def rows(self, part, items, compute, size=3):
            def stops(block):
                if part == "mmlu_invented_zoology" and items[0] not in block:
                    raise KeyboardInterrupt
                return compute(block)

            return super().rows(part, items, stops, size)

    class Small(Pieces):
        parts: ClassVar[list[str]] = []

        def rows(self, part, items, compute, size=3):
            def told(block):
                self.parts.append(part)
                return compute(block)

            return super().rows(part, items, told, size)

    with pytest.raises(KeyboardInterrupt), progress(Console(quiet=True)) as display:
        wmdp.evaluate(model, format, Stopping("one", tmp_path, "key"), display)
    with progress(Console(quiet=True)) as display:
        resumed = wmdp.evaluate(model, format, Small("one", tmp_path, "key"), display)
        assert "wmdp_bio" not in Small.parts and Small.parts.count("mmlu_invented_zoology") == 2
        assert resumed == wmdp.evaluate(model, format, Small("one"), display)
    assert len(resumed["documents"]["forget"]) == 6


def test_presets_bring_their_benchmark(home):
    options, wmdp = parse(unlearn.UnlearnOptions, "x", "", ["--preset", "wmdp-rmu", "--data_dir", str(home / "data")])
    assert isinstance(wmdp, WMDP) and (options.method, options.retain_weight, options.layer) == ("rmu", 1200, 7)
    steps = len(wmdp.options.topic_names) * wmdp.options.forget_documents / options.batch_size
    assert (steps, wmdp.options.retain_corpus) == (150, "wikitext")
    options, wmdp = build(unlearn.UnlearnOptions, preset="wmdp-npo")
    assert wmdp.options.forget_documents / options.batch_size == 500 and wmdp.options.topics == "bio"
    assert options.beta / options.forget_weight == pytest.approx(0.0225)
    assert build(unlearn.UnlearnOptions, preset="wmdp-simnpo")[0].method == "simnpo_rt"


def test_methods_that_need_questions_are_refused(home, tmp_path):
    with pytest.raises(ValueError, match="compares answers to questions"):
        run(home, unlearn, unlearn.UnlearnOptions, "--model", home / "base", "--out", tmp_path, "--method", "dpo_rt")
