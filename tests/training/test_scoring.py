"""Scores against transformers' own loss, one sequence at a time and with its logits."""

import pytest
import torch

from training.generation import complete, complete_all
from training.scoring import score


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
