"""A layer's output, read during the forward; layers that are not needed are not run and not trained."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from training.layers import LayerTap, train_only
from training.model import add_adapters, build_model

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def model():
    return build_model(50, hidden_size=64, num_layers=3, special_ids={}, seed=0)


def ran(model) -> list[int]:
    """Which layers the next forward runs."""
    found = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: found.append(i))
    model(IDS)
    return found


def test_the_output_of_the_layer_is_read_once(model):
    tap = LayerTap(model, 1)
    hidden = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(tap.read(), hidden[2])
    with pytest.raises(ValueError, match="expected a forward of the model"):
        tap.read()
    assert LayerTap(model, None).layer == 2  # the last of fewer than 8
    with pytest.raises(ValueError, match="layer: the model has decoder layers 0 to 2, got 3"):
        LayerTap(model, 3)


@pytest.mark.parametrize(("alone", "training", "runs"), [
    (None, True, [0, 1, 2]), ("training", True, [0, 1]), ("training", False, [0, 1, 2]), ("always", False, [0, 1]),
])  # fmt: skip
def test_layers_above_run_where_they_are_needed(alone, training, runs, model):
    LayerTap(model, 1, alone)
    model.train(training)
    assert ran(model) == runs and model.config.num_hidden_layers == 3


def test_a_forward_that_fails_leaves_the_model_whole(model):
    LayerTap(model, 0, "always")
    with pytest.raises(IndexError):
        model(torch.tensor([[70]]))
    assert model.config.num_hidden_layers == 3


def test_what_is_not_run_is_not_trained(model):
    tap = LayerTap(model, 1, "training")
    tap.freeze_above()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if "layers.2." in n} | {"model.norm.weight"}
    adapted = add_adapters(build_model(50, 64, 3, {}, seed=0), 2, 4, 0.0, 0)
    LayerTap(adapted, 0).freeze_above()
    assert {n.split("layers.")[1][0] for n, p in adapted.named_parameters() if p.requires_grad} == {"0"}


def test_what_lies_behind_the_layers_is_found_whatever_its_name(model):
    """GPT-2's last norm is `ln_f`, OPT's lies a module deeper: a forward tells."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16))
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2,
                  word_embed_proj_dim=16, max_position_embeddings=16)
    )  # fmt: skip
    for other, layers in ((gpt2, "transformer.h."), (opt, "model.decoder.layers.")):
        LayerTap(other, 1, "training").freeze_above()
        frozen = {name for name, p in other.named_parameters() if not p.requires_grad}
        above = {name for name, _ in other.named_parameters() if name.startswith(f"{layers}2.")}
        assert above < frozen and all("ln_f" in name or "final_layer_norm" in name for name in frozen - above)
        assert any("norm" in name or "ln_f" in name for name in frozen - above)
    train_only(model, r".*layers\.2\.mlp\.down_proj\.weight")
    with pytest.raises(ValueError, match="expected --train_only to match parameters of layers 0 to 1"):
        LayerTap(model, 1, "training").freeze_above()


def test_a_copied_model_has_a_tap_of_its_own(model):
    tap = LayerTap(model, 0)
    model(IDS)
    copied = copy.deepcopy(model)  # what the tap holds has a graph, which cannot be copied
    copied(IDS + 1)
    assert torch.equal(tap.read(), model.model.layers[0](model.model.embed_tokens(IDS), position_embeddings=model.model
                                                         .rotary_emb(IDS.float(), torch.arange(6)[None])))  # fmt: skip


def test_other_architectures_have_layers_as_well():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    tap = LayerTap(model, 0)
    hidden = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(tap.read(), hidden[1])
