"""Answers that share a row have the same log-probabilities as in separate rows."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from npo_kernels.hf import add_fused_unlearning_head
from training import shared_prompts
from training.data import IGNORE_INDEX, Example
from training.model import build_model
from training.scoring import score
from training.shared_prompts import score_answers

VOCAB = 97


def example(prompt: list[int], answer: list[int]) -> Example:
    return Example([*prompt, *answer], [IGNORE_INDEX] * len(prompt) + answer)


def groups_of(sizes: list[tuple[int, list[int]]], seed: int = 0) -> list[list[Example]]:
    """(length of the prompt, lengths of the answers) of each group."""
    drawn = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=drawn).tolist()

    return [[example(prompt, tokens(n)) for n in lengths] for prompt, lengths in ((tokens(p), a) for p, a in sizes)]


RAGGED = [(5, [3, 9, 1]), (1, [4]), (17, [2, 2, 30, 6, 11]), (3, [8, 8]), (2, [1])]


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    found = build_model(VOCAB, 64, 2, {}, seed=3)
    found.config._attn_implementation = request.param
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_same_as_rows_of_their_own(model, batch_size):
    groups = groups_of(RAGGED)
    examples = [e for group in groups for e in group]
    told: list[tuple[int, int]] = []
    found = score_answers(model.train(), groups, 0, batch_size, lambda rows, tokens: told.append((rows, tokens)))
    alone = score(model, examples, 0)
    torch.testing.assert_close(found.logps, alone.logps, rtol=1e-5, atol=1e-5)
    assert found.num_tokens.tolist() == alone.num_tokens.tolist()
    assert model.training and sum(rows for rows, _ in told) == len(examples)
    assert sum(tokens for _, tokens in told) < sum(len(e.input_ids) for e in examples)


def test_an_answer_does_not_see_the_others(model):
    """Other answers, and their order, change nothing."""
    first, *rest = groups_of([(6, [5, 7, 9])])[0]
    other = groups_of([(6, [12])], seed=1)[0][0]
    other = example(first.input_ids[:6], other.input_ids[6:])
    lone = score_answers(model, [[first]], 0).logps[0]
    for group, place in (([first, *rest], 0), ([*rest, first], 2), ([other, first], 1)):
        torch.testing.assert_close(score_answers(model, [group], 0).logps[place], lone, rtol=1e-5, atol=1e-5)


def test_an_answer_that_scores_nothing(model):
    """All of its labels ignored: 0, of 0 tokens."""
    group = groups_of([(4, [3, 5])])[0]
    group[0] = Example(group[0].input_ids, [IGNORE_INDEX] * len(group[0].input_ids))
    found = score_answers(model, [[group[0]]], 0)
    assert found.logps.tolist() == [0.0] and found.num_tokens.tolist() == [0]


def test_different_prompts_are_refused(model):
    one, two = groups_of([(4, [3]), (4, [3])])
    with pytest.raises(ValueError, match="same prompt"):
        score_answers(model, [[one[0], two[0]]], 0)


def test_attention_that_looks_back_so_far_gets_rows(monkeypatch):
    """A sliding window would count other answers as the past."""
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config)
    add_fused_unlearning_head(model)
    monkeypatch.setattr(shared_prompts, "_logps", None)
    groups = groups_of(RAGGED)
    alone = score(model, [e for group in groups for e in group], 0)
    assert torch.equal(score_answers(model, groups, 0).logps, alone.logps)


def test_no_groups(model):
    assert score_answers(model, [], 0).logps.tolist() == []
