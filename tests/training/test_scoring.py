"""Scores against transformers' own loss, one sequence at a time and with its logits."""

import numpy as np
import pytest
import torch

from training.data import IGNORE_INDEX, Example
from training.generation import CLOSE, complete, complete_all, generate
from training.scoring import answer_scores, gradient_norms, score


def test_scores_are_those_of_the_model_itself(corpus, model):
    examples = corpus.forget[:9]
    scores = score(model, examples, corpus.tokenizer.pad_token_id, batch_size=4)
    for i, example in enumerate(examples):
        labels = torch.tensor([example.labels])
        with torch.no_grad():
            loss = model(torch.tensor([example.input_ids]), labels=labels).loss
        num_tokens = int((labels != -100).sum())
        assert scores.num_tokens[i] == num_tokens
        assert scores.logps[i].item() == pytest.approx(-loss.item() * num_tokens, rel=1e-5)
        assert scores.answer_probability[i].item() == pytest.approx(torch.exp(-loss).item(), rel=1e-5)


def test_score_uses_eval_mode_and_restores_the_mode(corpus, model):
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    first, second = (score(model, corpus.forget, corpus.tokenizer.pad_token_id) for _ in range(2))
    assert torch.equal(first.logps, second.logps)
    assert model.training


def test_complete_continues_the_prompt(corpus, model):
    answer = complete(model, corpus.format, corpus.rows[0]["question"], max_new_tokens=5)
    assert isinstance(answer, str) and "Question" not in answer
    assert answer == complete(model, corpus.format, corpus.rows[0]["question"], max_new_tokens=5)


def test_padding_does_not_change_answers(corpus, model):
    questions = [row["question"] for row in corpus.rows[:12]]
    batched = complete_all(model, corpus.format, questions, max_new_tokens=6, batch_size=5)
    assert batched == [complete(model, corpus.format, question, max_new_tokens=6) for question in questions]


def nothing_scored(example):
    return Example(example.input_ids, [IGNORE_INDEX] * len(example.labels))


def test_answer_scores_are_those_of_the_logits(corpus, model):
    examples = [*corpus.forget[:6], nothing_scored(corpus.forget[6]), corpus.forget[7]]
    sizes = []
    found = answer_scores(model, examples, 0, batch_size=3, on_rows=lambda rows, tokens: sizes.append((rows, tokens)))
    assert sum(rows for rows, _ in sizes) == 8 and sum(t for _, t in sizes) == sum(len(e.input_ids) for e in examples)
    for example, answer in zip(examples, found, strict=True):
        labels = torch.tensor(example.labels[1:])
        scored = labels != IGNORE_INDEX
        with torch.no_grad():
            log_p = model(torch.tensor([example.input_ids])).logits[0, :-1].double().log_softmax(-1)[scored]
        mean = (log_p.exp() * log_p).sum(-1)
        variance = (log_p.exp() * log_p.square()).sum(-1) - mean.square()
        np.testing.assert_allclose(answer.logps, log_p.gather(1, labels[scored, None])[:, 0], rtol=1e-5)
        np.testing.assert_allclose(answer.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(answer.std, variance.sqrt(), rtol=1e-5)
        assert answer.hits.tolist() == (log_p.argmax(-1) == labels[scored]).tolist()
        assert answer.nll == pytest.approx(-answer.logps.mean() if scored.any() else 0.0)
        assert len(answer.body.logps) == max(0, int(scored.sum()) - 1)
    assert answer_scores(model, [], 0) == []
    assert [len(a.hits) for a in answer_scores(model, [nothing_scored(examples[0])], 0)] == [0]


def test_gradient_norms_are_those_of_the_loss(corpus, model):
    kept = torch.full_like(model.model.norm.weight, 7.0)
    model.model.norm.weight.grad = kept.clone()
    examples = [*corpus.forget[:2], nothing_scored(corpus.forget[2])]
    found = gradient_norms(model, examples)
    assert torch.equal(model.model.norm.weight.grad, kept)
    model.requires_grad_(False)  # as after adapters were merged
    model.model.norm.weight.requires_grad_(True)
    assert gradient_norms(model, examples) == found
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    model.requires_grad_(True)
    for example, norm in zip(examples[:2], found, strict=False):
        labels = torch.tensor([example.labels])
        labels[0, -1] = IGNORE_INDEX  # the end
        model.zero_grad()
        model(torch.tensor([example.input_ids]), labels=labels).loss.backward()
        expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).mean()
        assert norm == pytest.approx(expected.item(), rel=1e-5)
    assert found[2] == 0


@pytest.mark.parametrize("batch_size", [1, 2, 12])
def test_an_answer_does_not_depend_on_its_batch(corpus, model, batch_size):
    """Two embeddings that differ by rounding alone make every step a close one for the tokens they belong to."""
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[1::2] = weight[::2] * (1 + 3e-7)
    prompts = [corpus.format.prompt_ids(row["question"]) for row in corpus.rows[:12]]
    alone = [generate(model, [prompt], corpus.format, 8)[0] for prompt in prompts]
    assert generate(model, prompts, corpus.format, 8, batch_size) == alone and any(alone)


def test_close_calls_alone_are_generated_again(corpus, model, monkeypatch):
    from training import generation

    rows = []
    monkeypatch.setattr(generation._Writer, "write", recorded := spy(generation._Writer.write, rows))
    prompts = [corpus.format.prompt_ids(row["question"]) for row in corpus.rows[:4]]
    monkeypatch.setattr(generation, "CLOSE", 0)
    generate(model, prompts, corpus.format, 4)
    assert rows == [4]
    rows.clear()
    monkeypatch.setattr(generation, "CLOSE", 1e9)  # of one row the largest logit
    generate(model, prompts, corpus.format, 4)
    assert rows == [4, 1, 1, 1, 1] and recorded and CLOSE > 4


def test_the_settings_of_a_models_folder_are_not_used(corpus, model):
    prompts = [corpus.format.prompt_ids(row["question"]) for row in corpus.rows[:3]]
    plain = generate(model, prompts, corpus.format, 8)
    kept = model.generation_config
    kept.repetition_penalty, kept.no_repeat_ngram_size = 5.0, 1
    assert generate(model, prompts, corpus.format, 8) == plain and model.generation_config is kept


def test_what_is_too_long_for_the_model_is_said(corpus, model):
    model.config.max_position_embeddings = 12
    with pytest.raises(ValueError, match=r"a prompt and its answer of \d+ tokens: the model has 12 positions"):
        generate(model, [corpus.format.prompt_ids(corpus.rows[0]["question"])], corpus.format, 12)
    with pytest.raises(ValueError, match=r"an example of \d+ tokens: the model has 12 positions"):
        score(model, corpus.forget, 0)


def spy(function, sizes):
    def counted(self, prompts):
        sizes.append(len(prompts))
        return function(self, prompts)

    return counted


def test_generations_end_before_the_texts_that_stop_them(corpus, model):
    prompt = corpus.format.prompt_ids(corpus.rows[0]["question"])
    (whole,) = generate(model, [prompt], corpus.format, 12)
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    tokens = []
    (cut,) = generate(model, [prompt], corpus.format, 12, stop=[middle], on_rows=lambda rows, n: tokens.append(n))
    assert cut == whole.partition(middle)[0].strip() and len(middle) > 0 and tokens[0] < 12
    with pytest.raises(ValueError, match="stop: expected texts with at least one character"):
        generate(model, [prompt], corpus.format, 12, stop=[""])
