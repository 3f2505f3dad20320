"""Packed and padded batches are the same sequences to a model, and attention does not see across their boundaries."""

import pytest
import torch

from training.data import IGNORE_INDEX, Example, collate, pack
from training.model import build_model
from training.scoring import score

CPU = torch.device("cpu")


@pytest.fixture(params=["sdpa", "eager"])
def llama(request, corpus):
    """Weights large enough for answers to depend on what is attended to."""
    model = build_model(len(corpus.tokenizer), hidden_size=64, num_layers=2, special_ids={}, seed=0)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    model.set_attn_implementation(request.param)
    return model.eval()


def test_layout(corpus):
    examples = corpus.forget[:4]
    batch = pack(examples, CPU)
    lengths = [len(e.input_ids) for e in examples]
    for name in ("input_ids", "labels"):
        assert batch[name].shape == (1, sum(lengths))
        pieces = [piece.tolist() for piece in batch[name][0].split(lengths)]
        assert pieces == [getattr(e, name) for e in examples]
    assert [p.tolist() for p in batch["position_ids"][0].split(lengths)] == [list(range(n)) for n in lengths]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"].tolist() == [sum(lengths[:i]) for i in range(5)]
    assert "attention_mask" not in batch


def test_packed_scores_are_the_padded_ones(corpus, llama):
    single = Example([5], [5])  # one token, nothing to predict it from
    examples = [corpus.forget[0], single, *corpus.forget[1:9], single, *corpus.retain[:5]]
    padded = score(llama, examples, corpus.format.pad_token_id, batch_size=6)
    packed = score(llama, examples, corpus.format.pad_token_id, batch_size=6, packing=True)
    torch.testing.assert_close(packed.logps, padded.logps, rtol=1e-5, atol=1e-4)
    assert torch.equal(packed.num_tokens, padded.num_tokens)
    assert packed.num_tokens[1] == 0


def test_a_neighbour_changes_nothing(corpus, llama):
    """The test above can fail: with one mask for the whole row the numbers are far off."""
    first, *others = corpus.forget[:4]

    def logps(neighbours, **changed):
        with torch.no_grad():
            return llama(**(pack([*neighbours, first], CPU) | changed), fused_unlearning=True).logps[-1]

    alone = logps([])
    for neighbours in ([others[0]], others, [first]):
        torch.testing.assert_close(logps(neighbours), alone, rtol=1e-5, atol=1e-4)
    across = {"position_ids": torch.arange(sum(len(e.input_ids) for e in (*others, first)))[None]}
    assert (logps(others, **across) - alone).abs() > 0.1


def test_gradients_are_the_same(corpus, llama):
    examples = corpus.forget[:5]

    def gradients(batch):
        llama.zero_grad()
        llama(**batch, fused_unlearning=True).logps.sum().backward()
        return {name: p.grad for name, p in llama.named_parameters()}

    padded, packed = gradients(collate(examples, 0, CPU)), gradients(pack(examples, CPU))
    for name, grad in padded.items():
        torch.testing.assert_close(packed[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


def test_boundaries_come_from_position_ids_too(corpus, llama):
    """As for models whose data collator has no `cu_seqlens`."""
    batch = pack(corpus.forget[:5], CPU)
    with torch.no_grad():
        expected = llama(**batch, fused_unlearning=True).logps
        del batch["cu_seqlens"]
        torch.testing.assert_close(llama(**batch, fused_unlearning=True).logps, expected, rtol=0, atol=0)
    assert all(e.labels[0] == IGNORE_INDEX for e in corpus.forget[:5])
