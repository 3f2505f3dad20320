"""The fused head against the model's own logits, for every architecture: values and all gradients."""

import copy

import pytest
import torch

from npo_kernels.hf import add_fused_unlearning_head
from tests.hf.models import ARCHITECTURES, own_logps, packed_batch, padded_batch, tiny
from tests.support import assert_no_worse_than_plain, upstream


def results(model, evaluate) -> dict:
    """logps and the gradient of a weighted sum of them: all parameters in one vector, and the head."""
    model.zero_grad()
    logps, counts = evaluate(model)
    (logps * upstream(logps.shape).to(logps.dtype)).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    head = model.get_output_embeddings()
    found = {"logps": logps.detach(), "all": torch.cat(grads), "head": head.weight.grad.clone()}
    if head.bias is not None:
        found["bias"] = head.bias.grad.clone()
    return {"counts": counts, **found}


def check(name: str, fused, own) -> None:
    model = tiny(name)
    oracle = results(copy.deepcopy(model).double(), own)
    plain = results(model, own)
    ours = results(add_fused_unlearning_head(model), fused)
    assert torch.equal(ours.pop("counts"), oracle.pop("counts"))
    # a backbone in float32 comes before the head: its error comes from another order of summation
    assert_no_worse_than_plain(ours, plain, oracle, slack=2.0, ceiling=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padded(name):
    batch = padded_batch()

    def fused(model):
        out = model(**batch, fused_unlearning=True)
        return out.logps, out.num_tokens

    check(name, fused, lambda model: own_logps(model, batch))


def one_by_one(model):
    """Each sequence in a forward of its own: nothing can leak between them."""
    batch = padded_batch()
    parts = []
    for s, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        parts.append(own_logps(model, {key: value[s : s + 1, :length] for key, value in batch.items()}))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi", "pythia", "mixtral"])
@pytest.mark.parametrize("how", ["position_ids", "cu_seqlens"])
def test_packed(name, how):
    batch = packed_batch()
    if how == "cu_seqlens":
        batch.pop("position_ids")
        batch["cu_seqlens"] = torch.tensor([0, 7, 10, 19], dtype=torch.int32)

    def fused(model):
        out = model(**batch, fused_unlearning=True)
        return out.logps, out.num_tokens

    check(name, fused, one_by_one)
