"""How a model is loaded to train changes how it computes, not what."""

import pytest
import torch
from transformers.integrations import liger

from training.data import collate
from training.model import add_adapters, load_model
from training.objective import token_nll

CPU = torch.device("cpu")


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def gradients(model, corpus):
    batch = collate(corpus.forget[:4], corpus.format.pad_token_id, CPU)
    loss = model.train()(**batch, fused_unlearning=token_nll()).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"attn_implementation": "eager"}])
def test_options_of_the_layers_leave_loss_and_gradients(options, folder, corpus):
    loss, grads = gradients(load_model(folder, CPU), corpus)
    other = load_model(folder, CPU, **options)
    if "attn_implementation" in options:
        assert other.config._attn_implementation == "eager"
    else:
        assert other.is_gradient_checkpointing
    other_loss, other_grads = gradients(other, corpus)
    torch.testing.assert_close(other_loss, loss)
    for got, wanted in zip(other_grads, grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_liger_gets_the_layers_and_not_the_loss(folder, monkeypatch):
    taken = []
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda model, config: taken.append(config))
    load_model(folder, CPU, use_liger_kernel=True)
    assert taken == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_begin_as_the_model_and_learn_below_the_head(checkpointing, folder, corpus):
    loss, _ = gradients(load_model(folder, CPU), corpus)
    adapted = add_adapters(load_model(folder, CPU, gradient_checkpointing=checkpointing), 4, 8, 0.0, seed=0)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name and "lm_head" not in name for name in names)
    adapted_loss, grads = gradients(adapted, corpus)
    torch.testing.assert_close(adapted_loss, loss)
    # B is zero: A has no gradient yet, B has
    norms = {name: grad.norm().item() for name, grad in zip(names, grads, strict=True)}
    assert all((norm > 0) == ("lora_B" in name) for name, norm in norms.items())


def test_a_seed_determines_adapters(folder):
    states = [add_adapters(load_model(folder, CPU), 4, 8, 0.0, seed).state_dict() for seed in (1, 1, 2)]
    name = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])
