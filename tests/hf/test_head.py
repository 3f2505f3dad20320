"""The contract of `add_fused_unlearning_head`: what it changes, what it leaves alone, what it refuses."""

import copy
import inspect
import io
import sys
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from npo_kernels import (
    fused_logprob_loss,
    fused_npo_loss,
    fused_simnpo_loss,
    fused_token_loss,
    sequence_logprobs,
    token_logprobs,
    token_statistics,
)
from npo_kernels.hf import add_fused_unlearning_head
from tests.hf.models import own_logps, packed_batch, padded_batch, tiny

REFS = torch.tensor([-20.0, -30.0, -5.0])
NPO = partial(fused_npo_loss, ref_logps=REFS, beta=0.3)


def npo_from(logps):
    return -(2 / 0.3) * F.logsigmoid(-0.3 * (logps - REFS)).mean()


@pytest.fixture
def batch():
    return padded_batch()


@pytest.fixture
def model():
    return add_fused_unlearning_head(tiny("llama"))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---------------------------------------------------------------------------------------------------------------------
# What a call returns
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "cohere", "phi", "gemma2"])
def test_a_loss_inside_the_forward_is_the_loss_of_the_models_own_logits(name, batch, plans):
    model = add_fused_unlearning_head(tiny(name))
    expected = npo_from(own_logps(model, batch)[0])
    loss = model(**batch, fused_unlearning=NPO).loss
    assert plans[-1].mode == "slab"
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-4, atol=1e-5)


def test_any_loss_of_logps_runs_inside_the_forward(model, batch, plans):
    def loss_fn(logps, num_tokens):
        return (logps / num_tokens)[0] - logps[1:].logsumexp(0)

    loss = model(**batch, fused_unlearning=partial(fused_logprob_loss, loss_fn=loss_fn)).loss
    assert plans[-1].mode == "slab"
    expected = loss_fn(*own_logps(model, batch))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-4, atol=1e-5)


def test_statistics_come_with_a_loss(model, batch):
    out = model(**batch, fused_unlearning=partial(NPO, return_stats=True))
    torch.testing.assert_close(out.stats.log_ratio, own_logps(model, batch)[0].detach() - REFS)


def test_token_losses_and_token_statistics(model, batch):
    def loss_fn(token_logps, sequence, num_tokens):
        return (token_logps.exp() / num_tokens[sequence]).sum()

    loss = model(**batch, fused_unlearning=partial(fused_token_loss, loss_fn=loss_fn)).loss
    labels = batch["labels"][:, 1:]
    log_p = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    p = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).exp() * (labels != -100)
    expected = (p / (labels != -100).sum(1, keepdim=True).clamp(min=1)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-4, atol=1e-5)
    found = model(**batch, fused_unlearning=partial(token_statistics, which=["entropy"])).statistics["entropy"]
    entropy = -(log_p.exp() * log_p).sum(-1) * (labels != -100)
    torch.testing.assert_close(found[:, :-1], entropy, rtol=1e-4, atol=1e-5)


def test_token_logprobs(model, batch):
    tokens = model(**batch, fused_unlearning=token_logprobs).token_logps
    logps, _ = own_logps(model, batch)
    assert tokens.shape == batch["labels"].shape
    torch.testing.assert_close(tokens.sum(1), logps)


def test_options_of_the_function_reach_it(model, batch):
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        model(**batch, fused_unlearning=partial(sequence_logprobs, temperature=2.0))
    out = model(**batch, fused_unlearning=partial(sequence_logprobs, impl="reference"))
    torch.testing.assert_close(out.logps, own_logps(model, batch)[0])


def test_shifted_labels_and_positional_arguments(model, batch):
    expected = model(**batch, fused_unlearning=True).logps
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    found = model(batch["input_ids"], batch["attention_mask"], shift_labels=shifted, fused_unlearning=True)
    assert torch.equal(found.logps, expected)


def test_wrappers_see_every_tensor_of_an_output(model, batch):
    """DDP and FSDP2 look for tensors by torch's pytree, and rebuild the output from them."""
    for function, names in ((True, {"logps", "num_tokens"}), (NPO, {"loss"}), (token_logprobs, {"token_logps"})):
        out = model(**batch, fused_unlearning=function)
        leaves, spec = torch.utils._pytree.tree_flatten(out)
        assert set(out.keys()) == names and len(leaves) == len(names)
        rebuilt = torch.utils._pytree.tree_unflatten([leaf * 1 for leaf in leaves], spec)
        assert type(rebuilt) is type(out)
        for name in names:
            assert torch.equal(getattr(rebuilt, name), getattr(out, name))


def test_another_ignore_index(model, batch):
    expected = model(**batch, fused_unlearning=True).logps
    labels = batch["labels"].masked_fill(batch["labels"] == -100, -7)
    assert torch.equal(model(**{**batch, "labels": labels}, ignore_index=-7, fused_unlearning=True).logps, expected)


def test_no_logits_are_formed(model, batch, monkeypatch):
    """Not by the head, whose own forward must not run, and not as an output."""
    monkeypatch.setattr(nn.Linear, "forward", _refuse_wide(nn.Linear.forward, model.config.vocab_size))
    out = model(**batch, fused_unlearning=True)
    with pytest.raises(AttributeError, match="without fused_unlearning"):
        _ = out.logits
    with pytest.raises(AssertionError, match="logits"):
        model(**batch)


def _refuse_wide(forward, vocab_size):
    def checked(self, x):
        assert self.out_features != vocab_size, "logits were formed"
        return forward(self, x)

    return checked


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_the_routers_loss_is_added_as_the_model_adds_it(name, batch):
    model = add_fused_unlearning_head(tiny(name))
    own = model(**batch)

    def cross_entropy(logps, num_tokens):
        return -logps.sum() / num_tokens.sum()

    out = model(**batch, fused_unlearning=partial(fused_logprob_loss, loss_fn=cross_entropy))
    torch.testing.assert_close(out.aux_loss, own.aux_loss)
    torch.testing.assert_close(out.loss, own.loss)
    torch.testing.assert_close(gradients(model, out.loss), gradients(model, own.loss), rtol=1e-4, atol=1e-5)
    assert own.aux_loss > 0
    assert model(**batch, output_router_logits=False, fused_unlearning=NPO).aux_loss is None


def test_hidden_states_are_returned_when_asked_for(model, batch):
    found = model(**batch, output_hidden_states=True, fused_unlearning=True).hidden_states
    for a, b in zip(found, model(**batch, output_hidden_states=True).hidden_states, strict=True):
        assert torch.equal(a, b)


def test_inside_autocast_and_activation_checkpointing(model, batch):
    plain = gradients(model, model(**batch, fused_unlearning=NPO).loss)
    model.train()  # checkpointing is for training; this model has no dropout
    model.gradient_checkpointing_enable()
    assert torch.equal(gradients(model, model(**batch, fused_unlearning=NPO).loss), plain)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch, fused_unlearning=True)
        own = own_logps(model, batch)[0]
    assert out.logps.dtype == torch.float32
    torch.testing.assert_close(out.logps, own, rtol=0.02, atol=0.2)


def test_torch_compile_gives_the_same(model, batch):
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(
        compiled(**batch, fused_unlearning=True).logps, model(**batch, fused_unlearning=True).logps
    )


def test_a_head_whose_weight_accelerate_loads_when_it_is_called(model, batch):
    accelerate = pytest.importorskip("accelerate", reason="the hf extra is not installed")
    expected = model(**batch, fused_unlearning=True).logps.detach()
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(2):  # the hook is there again after a call
        assert offloaded.lm_head.weight.device.type == "meta"
        with torch.no_grad():
            assert torch.equal(offloaded(**batch, fused_unlearning=True).logps, expected)


def test_outputs_pass_through_accelerates_mixed_precision(model, batch):
    utils = pytest.importorskip("accelerate.utils", reason="the hf extra is not installed")
    out = utils.convert_outputs_to_fp32(model.forward)(**batch, fused_unlearning=partial(NPO, return_stats=True))
    assert torch.equal(out.loss, model(**batch, fused_unlearning=NPO).loss)
    assert out.stats.logps.shape == (3,)


# ---------------------------------------------------------------------------------------------------------------------
# What stays as it was
# ---------------------------------------------------------------------------------------------------------------------


def test_without_the_flag_nothing_changes(batch, tmp_path):
    plain, fused = tiny("llama-tied"), add_fused_unlearning_head(tiny("llama-tied"))
    for a, b in zip(fused(**batch).values(), plain(**batch).values(), strict=False):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
    prompt = batch["input_ids"][:1]
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fused.generate(prompt, **settings), plain.generate(prompt, **settings))
    with pytest.raises(ValueError, match="not used by the model"):  # generate still reads the forward's signature
        fused.generate(prompt, atention_mask=torch.ones_like(prompt), **settings)
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)

    fused(**batch, fused_unlearning=True)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(fused, type(plain)) and repr(fused) == repr(plain)
    fused.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(plain) and loaded.config.architectures == ["LlamaForCausalLM"]
    for name, value in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_the_head_is_itself_again_after_an_error(model, batch):
    head = model.lm_head
    with pytest.raises(ValueError, match="labels: 2 outside"):
        model(**{**batch, "labels": batch["labels"].masked_fill(batch["labels"] == batch["labels"][0, 3], 10**6)},
              fused_unlearning=True)  # fmt: skip
    assert model.lm_head is head and "forward" not in vars(head)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        model(labels=batch["labels"], fused_unlearning=True)  # the backbone raises: no input_ids
    assert model.lm_head is head


def test_threads_share_a_model(model, batch):
    """A fused call replaces the head: a concurrent plain call or another fused call must not be affected."""
    calls = {
        "plain": lambda: model(**{k: v for k, v in batch.items() if k != "labels"}).logits,
        "sequences": lambda: model(**batch, fused_unlearning=True).logps,
        "loss": lambda: model(**batch, fused_unlearning=NPO).loss,
    }
    with torch.no_grad():
        expected = {name: call() for name, call in calls.items()}
    failures = []

    def work(name):
        with torch.no_grad():
            for _ in range(15):
                try:
                    assert torch.equal(calls[name](), expected[name])
                except Exception as error:
                    failures.append((name, repr(error)))

    threads = [threading.Thread(target=work, args=(name,)) for name in (*calls, *calls)]
    switch, head = sys.getswitchinterval(), model.lm_head
    sys.setswitchinterval(1e-5)  # so that threads meet inside every call
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not failures, failures[:3]
    assert model.lm_head is head and "forward" not in vars(head)


def test_copies_run_their_own_weights(model, batch):
    """A reference made by deepcopy, a replica, an unpickled model: none may compute with the original's weights."""
    before = model(**batch, fused_unlearning=True).logps.detach()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    for twin in copies:
        assert torch.equal(twin(**batch, fused_unlearning=True).logps, before)
    assert not torch.equal(model(**batch, fused_unlearning=True).logps, before)


def test_adding_twice_is_adding_once(model):
    cls = type(model)
    assert type(add_fused_unlearning_head(model)) is cls


# ---------------------------------------------------------------------------------------------------------------------
# PEFT
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="the train extra is not installed")


@pytest.mark.parametrize("first", ["head", "adapter"])
def test_lora_on_the_layers_keeps_the_head_frozen(first, batch, peft, plans):
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = tiny("llama")
    if first == "head":
        model = peft.get_peft_model(add_fused_unlearning_head(model), config)
    else:
        model = add_fused_unlearning_head(peft.get_peft_model(model, config))
    expected = npo_from(own_logps(model, batch)[0])
    loss = model(**batch, fused_unlearning=NPO).loss
    assert plans[-1].mode == "frozen"
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-4, atol=1e-5)
    trained = model(**batch, fused_unlearning=True).logps
    with model.disable_adapter():  # the reference
        torch.testing.assert_close(model(**batch, fused_unlearning=True).logps, own_logps(model, batch)[0])
        assert not torch.allclose(model(**batch, fused_unlearning=True).logps, trained)


def test_modules_to_save_trains_the_copy_that_is_active(batch, peft):
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    model = peft.get_peft_model(add_fused_unlearning_head(tiny("phi")), config)
    copied = model.base_model.model.lm_head.modules_to_save["default"]
    with torch.no_grad():
        copied.weight.mul_(1.5)
    out = model(**batch, fused_unlearning=True)
    torch.testing.assert_close(out.logps, own_logps(model, batch)[0])
    out.logps.sum().backward()
    assert copied.weight.grad.abs().sum() > 0 and copied.bias.grad.abs().sum() > 0
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch, fused_unlearning=True).logps, own_logps(model, batch)[0])


def test_prompt_tuning_scores_behind_the_virtual_tokens(batch, peft):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(add_fused_unlearning_head(tiny("llama")), config)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 3:]
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    torch.testing.assert_close(model(**batch, fused_unlearning=True).logps, -nll.sum(1))


def test_adapters_that_have_no_fused_form_are_refused(batch, peft):
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2)
    with pytest.raises(ValueError, match=r"target_modules.*modules_to_save"):
        add_fused_unlearning_head(peft.get_peft_model(tiny("llama"), config))
    late = peft.get_peft_model(add_fused_unlearning_head(tiny("llama")), config)
    with pytest.raises(ValueError, match=r"target_modules.*modules_to_save"):
        late(**batch, fused_unlearning=True)
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(add_fused_unlearning_head(tiny("llama")), prefix)
    with pytest.raises(ValueError, match=r"past_key_values.*prefix tuning"):
        model(**batch, fused_unlearning=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


class QuantisedLinear(nn.Linear):
    """As bitsandbytes does it: a subclass with a forward of its own."""

    def forward(self, x):
        return x


class PackedWeight(torch.Tensor):
    """As torchao does it: a linear layer whose weight is another kind of tensor."""


def test_heads_that_are_no_plain_linear_layer(model):
    model.lm_head = QuantisedLinear(32, 97)
    with pytest.raises(ValueError, match=r"QuantisedLinear.*expected torch.nn.Linear.*modules_to_not_convert"):
        add_fused_unlearning_head(model)
    model.lm_head = nn.Linear(32, 97)
    weight = torch.Tensor._make_subclass(PackedWeight, torch.zeros(97, 32))
    del model.lm_head.weight
    vars(model.lm_head)["weight"] = weight
    with pytest.raises(ValueError, match=r"PackedWeight.*dequantise"):
        add_fused_unlearning_head(model)
    model.lm_head = None
    with pytest.raises(ValueError, match="no output embeddings"):
        add_fused_unlearning_head(model)


def test_models_that_are_no_causal_language_model(model):
    with pytest.raises(TypeError, match=r"expected a causal language model.*before wrapping"):
        add_fused_unlearning_head(nn.DataParallel(model))
    with pytest.raises(TypeError, match="encoder-decoder"):
        model.config.is_encoder_decoder = True
        add_fused_unlearning_head(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: torch.relu(z), "a scale and a tanh softcap"),
        (lambda z: z + 1.0, "a scale and a tanh softcap"),
        (lambda z: z.index_fill(-1, torch.tensor([50]), -torch.inf), "a scale and a tanh softcap"),
        (lambda z: z[..., :90], "cut or rearranged"),
    ],
)
def test_logits_that_the_model_changes_in_another_way(change, message, batch):
    plain = tiny("llama")

    class Changed(type(plain)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = change(out.logits)
            return out

    plain.__class__ = Changed
    with pytest.raises(NotImplementedError, match=message):
        add_fused_unlearning_head(plain)(**batch, fused_unlearning=True)


def test_arguments_that_have_no_meaning_here(model, batch):
    packed = {**packed_batch(), "cu_seqlens": torch.tensor([0, 7, 10, 19], dtype=torch.int32)}
    for change, kind, message in (
        ({"labels": None}, ValueError, "pass labels="),
        ({"num_items_in_batch": 3}, ValueError, "normalizer="),
        ({"logits_to_keep": 1}, ValueError, "logits_to_keep"),
        ({"use_cache": True}, ValueError, "use_cache"),
        ({"fused_unlearning": "npo"}, TypeError, "a function such as fused_npo_loss"),
        ({"cu_seqlens": packed["cu_seqlens"]}, ValueError, "padded"),
        ({**packed, "attention_mask": torch.ones(1, 19)}, ValueError, "takes no attention_mask"),
    ):
        with pytest.raises(kind, match=message):
            model(**{**batch, "fused_unlearning": True, **change})


def test_illegal_arguments_are_named_before_the_model_runs(model, batch, tried):
    packed = {key: value for key, value in packed_batch().items() if key != "attention_mask"}
    offsets = torch.tensor([0, 7, 10, 19], dtype=torch.int32)
    wrong = {
        "labels": [batch["labels"].tolist(), batch["labels"].to_sparse(), batch["labels"][0], "labels", 1.0],
        "shift_labels": [batch["labels"].tolist(), 3],
        "ignore_index": ["-100", -100.0, None, True, 2**70],
        "fused_unlearning": ["npo", 1, [0.0] * 1000, torch.ones(())],
        "cu_seqlens": [offsets.tolist(), offsets.float() + 0.5, offsets[None], offsets[:0], offsets.to("meta"), 19],
    }
    for name, values in wrong.items():
        for value in values:
            base = packed if name == "cu_seqlens" else batch
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b") as caught:
                model(**{**base, "fused_unlearning": True, name: value})
            assert len(str(caught.value)) < 400
            assert "npo_kernels" in str(caught.traceback[-1].path), (name, value)
    for value in (None, "model", model.config, type(model), torch.nn.Linear(2, 2), [model]):
        with pytest.raises(TypeError, match=r"^model: expected a causal language model") as caught:
            add_fused_unlearning_head(value)
        assert len(str(caught.value)) < 400
    tried("illegal calls", sum(map(len, wrong.values())) + 6)


@pytest.mark.parametrize("name", ["bias", "logit_scale", "softcap", "labels", "shift", "cu_seqlens", "ignore_index"])
def test_a_partial_fixes_nothing_that_the_model_gives(model, batch, name):
    """It would be lost without a word, also from a partial of a partial."""
    npo = partial(partial(fused_simnpo_loss, **{name: None}), beta=2.0)
    with pytest.raises(ValueError, match=rf"fused_unlearning: {name} is the model's own .*leave it out"):
        model(**batch, fused_unlearning=npo)


# ---------------------------------------------------------------------------------------------------------------------
# Packed batches
# ---------------------------------------------------------------------------------------------------------------------


def test_cu_seqlens_with_empty_sequences_and_its_other_name(model):
    batch = packed_batch()
    expected = model(**batch, fused_unlearning=True)
    cu_seqlens = torch.tensor([0, 0, 7, 10, 10, 19, 19], dtype=torch.int32)
    for how in ({"cu_seqlens": cu_seqlens}, {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}):
        out = model(input_ids=batch["input_ids"], labels=batch["labels"], **how, fused_unlearning=True)
        assert out.num_tokens.tolist() == [0, 6, 2, 0, 5, 0]
        torch.testing.assert_close(out.logps[[1, 2, 4]], expected.logps)
        assert out.logps[[0, 3, 5]].eq(0).all()


def test_position_ids_without_a_restart_are_one_sequence_a_row(model, batch):
    batch = {"input_ids": batch["input_ids"][2:].repeat(2, 1), "labels": batch["labels"][2:].repeat(2, 1)}
    expected = model(**batch, fused_unlearning=True).logps
    offset = torch.arange(5, 14).repeat(2, 1)  # neither do they have to begin at 0
    assert model(**batch, position_ids=offset, fused_unlearning=True).logps.shape == (2,)
    assert torch.equal(model(**batch, position_ids=offset - 5, fused_unlearning=True).logps, expected)


def test_rows_of_packed_sequences(model):
    batch = packed_batch()
    expected = model(**batch, fused_unlearning=True).logps
    double = {name: value.repeat(2, 1) for name, value in batch.items()}
    torch.testing.assert_close(model(**double, fused_unlearning=True).logps, expected.repeat(2))
