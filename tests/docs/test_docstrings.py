"""The docstrings of the public functions: their examples run, their `Replaces` blocks compute what the functions do."""

import doctest
import inspect
import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import npo_kernels
from npo_kernels import hf
from tests.docs.blocks import ROOT

FUNCTIONS = {name: getattr(npo_kernels, name) for name in npo_kernels.__all__}
FUNCTIONS = {name: f for name, f in FUNCTIONS.items() if inspect.isfunction(f)}
FUNCTIONS["add_fused_unlearning_head"] = hf.add_fused_unlearning_head
REPLACED = re.compile(r"```python\n(.*?)```", re.S)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_examples_of_a_docstring_run(name, tried):
    torch.manual_seed(0)
    (test,) = doctest.DocTestFinder(recurse=False).find(FUNCTIONS[name], name, globs={})
    assert test.examples, "no example"
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert results.failed == 0
    tried("lines of docstring examples", results.attempted)


def documented(name):
    """Parameters that a docstring lists, and those of the functions that it refers to for the others."""
    text = inspect.getdoc(FUNCTIONS[name])
    referred = re.search(r"have the meaning that they have in ([^.]*)\.", " ".join(text.split()))
    others = re.findall(r"`(\w+)`", referred[1]) if referred else []
    return {*re.findall(r"^ {4}\*{0,2}(\w+): ", text, re.M)}.union(*(documented(other) for other in others))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented(name):
    assert set(inspect.signature(FUNCTIONS[name]).parameters) <= documented(name)


def test_every_public_name_has_a_place_in_the_pages():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", text, re.M))
    names = {f"npo_kernels.{name}" for name in npo_kernels.__all__} | {f"npo_kernels.hf.{name}" for name in hf.__all__}
    names ^= {"npo_kernels.explain", "npo_kernels.explain.explain"}  # the first is the module as well
    assert names <= shown


def inputs():
    """Variables of the `Replaces` blocks, with ignored labels where these allow any."""
    generator = torch.Generator().manual_seed(1)
    hidden, ref_hidden = torch.randn(2, 3, 5, 8, generator=generator)
    lm_head_weight, ref_lm_head_weight = torch.randn(2, 32, 8, generator=generator)
    bias, ref_bias = torch.randn(2, 32, generator=generator)
    labels = torch.randint(32, (3, 5), generator=generator)
    return SimpleNamespace(
        hidden=hidden, lm_head_weight=lm_head_weight, labels=labels, bias=bias, ref_hidden=ref_hidden,
        ref_lm_head_weight=ref_lm_head_weight, ref_bias=ref_bias, ref_logps=torch.tensor([-9.0, -8.0, -7.0]),
        beta=0.7, gamma=0.1, ignore_index=-100, logit_scale=0.5, softcap=3.0, target_shift=1.5, label=labels,
        mask=torch.rand(3, 5, generator=generator) > 0.5, direction="forward",
    )  # fmt: skip


def replaced(name, given):
    """The variables after the first block of a docstring."""
    (code,) = REPLACED.findall(inspect.getdoc(FUNCTIONS[name]))
    names = {**vars(npo_kernels), **vars(given), "torch": torch, "F": F}
    exec(textwrap.dedent(code), names)
    return SimpleNamespace(**names)


def ignoring(given):
    given.labels[0, :3] = -100
    given.labels[2, 4] = -100
    return given


def batch(given):
    return given.hidden, given.lm_head_weight, given.labels


def test_what_the_losses_replace():
    given = inputs()
    loss = npo_kernels.fused_npo_loss(*batch(given), ref_logps=given.ref_logps, beta=given.beta)
    torch.testing.assert_close(loss, replaced("fused_npo_loss", given).loss)
    given = ignoring(given)
    loss = npo_kernels.fused_simnpo_loss(*batch(given), beta=given.beta, gamma=given.gamma)
    torch.testing.assert_close(loss, replaced("fused_simnpo_loss", given).loss)


def test_what_the_losses_of_a_function_replace():
    given = ignoring(inputs())
    given.loss_fn = lambda logps, num_tokens: (logps / num_tokens).exp().sum()
    loss = npo_kernels.fused_logprob_loss(*batch(given), given.loss_fn)
    torch.testing.assert_close(loss, replaced("fused_logprob_loss", given).loss)
    given.loss_fn = lambda tokens, sequence, num_tokens: (tokens.exp() * (1 + sequence) / num_tokens[sequence]).sum()
    loss = npo_kernels.fused_token_loss(*batch(given), given.loss_fn)
    torch.testing.assert_close(loss, replaced("fused_token_loss", given).loss)


def test_what_the_log_probabilities_replace():
    given = inputs()
    torch.testing.assert_close(npo_kernels.token_logprobs(*batch(given)), replaced("token_logprobs", given).token_logps)
    given = ignoring(given)
    options = {"bias": given.bias, "logit_scale": given.logit_scale, "softcap": given.softcap}
    now, before = npo_kernels.sequence_logprobs(*batch(given), **options), replaced("sequence_logprobs", given)
    torch.testing.assert_close(now, (before.logps, before.num_tokens))


def test_what_the_statistics_replace():
    given = inputs()
    which = ["logp", "entropy", "max_logit", "mean_logit", "var_logp", "argmax"]
    before = vars(replaced("token_statistics", given))
    now = npo_kernels.token_statistics(*batch(given), which, bias=given.bias, shift=False)
    for name in which:
        torch.testing.assert_close(now[name], before[name])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_what_the_divergence_replaces(direction):
    given = inputs()
    given.direction = direction
    options = ("mask", "labels", "target_shift", "direction", "bias", "ref_bias")
    now = npo_kernels.fused_linear_kl(
        given.hidden, given.lm_head_weight, given.ref_hidden, given.ref_lm_head_weight,
        **{name: getattr(given, name) for name in options},
    )  # fmt: skip
    torch.testing.assert_close(now, replaced("fused_linear_kl", given).loss)


def test_what_the_fused_head_replaces():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    given = ignoring(inputs())
    given.model, given.input_ids, given.attention_mask = LlamaForCausalLM(config), given.label.clamp(min=0), None
    with torch.no_grad():
        before = replaced("add_fused_unlearning_head", given)
        model = hf.add_fused_unlearning_head(given.model)
        now = model(given.input_ids, labels=given.labels, fused_unlearning=True)
    torch.testing.assert_close((now.logps, now.num_tokens), (before.logps, before.num_tokens))
