"""The common parts of all evaluations: resuming after an interruption, counting tokens, a classifier for fluency."""

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from training import generation
from training.benchmarks.answers import Answers
from training.benchmarks.base import EvaluationOptions
from training.benchmarks.tofu.eval_sets import EvalRow
from training.benchmarks.tofu.evaluate import evaluate_model
from training.benchmarks.tofu.summary import summary
from training.commands.options import build
from training.commands.session import measured
from training.commands.unlearn import UnlearnOptions
from training.fluency import FluencyClassifier
from training.pieces import Pieces
from training.progress import Counted


@pytest.fixture
def sets(corpus):
    rows = [EvalRow(r["question"], r["answer"], f"So: {r['answer']}", ["no", "none of it"]) for r in corpus.rows]
    return {"retain": rows[:4], "ra": rows[4:7], "wf": rows[7:9], "forget": rows[-5:]}


@pytest.mark.parametrize("after", range(1, 10))
def test_an_interrupted_evaluation_goes_on(after, tmp_path, corpus, model, sets, monkeypatch):
    """Whichever piece was the last one: the log is that of an evaluation in one go, and no piece is made twice."""
    holdout = corpus.rows[:3]

    def evaluate(pieces):
        return evaluate_model(model, corpus.format, sets, holdout=holdout, pieces=pieces, max_new_tokens=3)

    whole = evaluate(Pieces("a"))
    made = []
    write = Pieces._write

    def written(self, path, record):
        if len(made) == after:
            raise KeyboardInterrupt
        write(self, path, record)
        made.append(path.name)

    monkeypatch.setattr(Pieces, "_write", written)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Pieces("a", tmp_path, "key"))
    before = set(made)
    after = -1
    assert evaluate(Pieces("a", tmp_path, "key")) == whole
    assert len(made) == len(set(made)) == 10 and before < set(made)


def test_pieces_of_other_weights_are_not_found(tmp_path, corpus, model):
    """And those of a finished evaluation are gone."""
    _, benchmark = build(UnlearnOptions, benchmark="authors", authors=4, forget_percent=25, retain_eval_authors=1)
    rows = Pieces.rows
    kept = []

    def seen(self, part, items, compute, size=256):
        kept.append((self.folder, self.key))
        return rows(self, part, items, compute, size)

    with pytest.MonkeyPatch.context() as patched, Progress(disable=True) as display:
        patched.setattr(Pieces, "rows", seen)
        measured(benchmark, model, corpus.format, tmp_path / "a.json", display)
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-6
        measured(benchmark, model, corpus.format, tmp_path / "a.json", display)
    assert len({folder for folder, _ in kept}) == 1 and len({key for _, key in kept}) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_each_answer_stands_with_its_question(corpus, model, sets):
    log = evaluate_model(model, corpus.format, sets, max_new_tokens=5)
    for name, rows in sets.items():
        for i, row in enumerate(rows):
            said = generation.complete(model, corpus.format, row.question, 5)
            assert log.sets[name].fields["generated_text"][i] == [
                corpus.format.prompt_text(row.question), said, row.answer
            ]  # fmt: skip


def test_tokens_a_second_are_told(corpus, model, sets, capsys):
    console = Console(width=200)
    with Progress(console=console, disable=True) as display:
        evaluate_model(model, corpus.format, sets, max_new_tokens=3, progress=display)
    printed = capsys.readouterr().out
    assert "Evaluation: 14 rows in 0:00:" in printed
    read, generated = (int(printed.split(f" tokens {kind} at ")[0].split()[-1]) for kind in ("read", "generated"))
    tokens = 0
    for row in (row for rows in sets.values() for row in rows):
        others = [*([row.paraphrased] if row.paraphrased else []), *row.perturbed]
        true, *rest = corpus.format.encode({"question": row.question, "answer": a} for a in (row.answer, *others))
        prompt = len(corpus.format.prompt_ids(row.question))
        tokens += len(true.input_ids) + prompt - 1 + sum(len(e.input_ids) - prompt + 1 for e in rest)
    assert read == tokens
    assert 14 <= generated <= 14 * 3


def test_rates_are_those_of_a_stage(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("training.progress.time.monotonic", lambda: now[0])
    with Progress(disable=True) as display:
        counted = Counted(display, "Evaluation", 10)
        for stage, seconds, tokens in (("read", 2, 100), ("generated", 5, 10), ("read", 2, 300)):
            counted.stage(stage, "forget")
            now[0] += seconds
            counted(1, tokens)
        assert counted.seconds == {"read": 4, "generated": 5} and counted.tokens == {"read": 400, "generated": 10}
        assert display.tasks[0].fields["note"] == "forget, 100 tokens/s"


@pytest.fixture
def classifier(tmp_path):
    """A small one with random weights, and words for tokens."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "the", "book", "is", "old"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    config = BertConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        num_labels=3, initializer_range=1.0, max_position_embeddings=16)  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


def test_the_classifier_gives_the_probability_of_its_first_class(classifier):
    texts = ["the book", "is old", "", "the the the the book is very old"]
    found = FluencyClassifier(classifier, torch.device("cpu"))(texts)
    loaded = BertForSequenceClassification.from_pretrained(classifier).eval()
    for text, probability in zip(texts, found, strict=True):
        words = ["[PAD]", "[UNK]", "the", "book", "is", "old"]
        ids = [words.index(word) if word in words else 1 for word in text.split()]
        if ids:
            with torch.no_grad():
                logits = loaded(torch.tensor([ids])).logits
            assert probability == pytest.approx(logits.softmax(-1)[0, 0].item(), rel=1e-4)
    assert len({round(p, 6) for p in found}) > 2 and found[2] == 0
    assert FluencyClassifier(classifier, torch.device("cpu"))(["", ""]) == [0, 0]
    with pytest.raises(ValueError, match="--fluency_classifier: expected the folder of a text classifier"):
        FluencyClassifier(classifier / "nowhere", torch.device("cpu"))


def test_fluency_of_generations(corpus, model, sets, classifier):
    options = EvaluationOptions(fluency_classifier=classifier)
    log = evaluate_model(model, corpus.format, sets, options=options, max_new_tokens=3)
    probabilities = log.sets["forget"].fields["classifier_prob"]
    assert len(probabilities) == 5 and all(0 < p < 1 for p in probabilities)
    with Progress(disable=True) as display:
        answers = Answers(model, corpus.format, options, Pieces("a"), Counted(display, "", 1))
        (found,) = answers.classified(["the book is"])
        assert found == {"classifier_prob": answers.classifier(["the book is"])[0]}
        assert Answers(model, corpus.format, EvaluationOptions(), Pieces("a"), answers.counted).classified(["a"]) == [
            {}
        ]
    summarized = summary(log)
    assert summarized["forget_classifier_prob"] == pytest.approx(sum(probabilities) / 5)


def test_generation_is_in_float32(corpus, model, monkeypatch):
    """Whatever the precision of training: margins of 16 bits are too coarse."""
    from training.model import set_precision

    seen = []
    monkeypatch.setattr(generation._Margins, "__call__", lambda self, ids, scores: (seen.append(scores), scores)[1])
    set_precision(model, "bf16")
    prompts = [corpus.format.prompt_ids(row["question"]) for row in corpus.rows[:2]]
    generation.generate(model, prompts, corpus.format, 2)
    logits = model(torch.tensor([prompts[0]])).logits[0, -1]
    assert any(torch.allclose(scores[i], logits, atol=1e-5) for scores in seen[:1] for i in range(2))
