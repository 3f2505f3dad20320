"""What the table "Works with" of docs/guides/plain_loop.md promises of a loop in one process.

tests/distributed has the rest.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from npo_kernels import explain, fused_logprob_loss, fused_npo_loss, sequence_logprobs
from npo_kernels.core import execute
from tests.support import TINY

B, S, V, H = 6, 9, 150, 16


def make():
    """Hidden states and head that require grad, labels with a ragged prompt ignored, a reference."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, H, generator=g, requires_grad=True)
    weight = torch.randn(V, H, generator=g, requires_grad=True)
    labels = torch.randint(V, (B, S), generator=g)
    labels[torch.arange(S) < torch.arange(B)[:, None]] = -100
    return hidden, weight, labels, torch.randn(B, generator=g) - 30


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_accumulating_ragged_micro_batches_with_a_normalizer_is_the_whole_batch(impl):
    hidden, weight, labels, ref_logps = make()
    whole = gradients(fused_npo_loss(hidden, weight, labels, ref_logps=ref_logps, impl=impl), hidden, weight)
    parts = [slice(0, 1), slice(1, 4), slice(4, B)]
    total = sum(
        fused_npo_loss(hidden[p], weight, labels[p], ref_logps=ref_logps[p], normalizer=B, impl=impl) for p in parts
    )
    for a, b in zip(whole, gradients(total, hidden, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_inside_activation_checkpointing_the_gradients_are_the_same():
    hidden, weight, labels, ref_logps = make()
    layer = nn.Linear(H, H)

    def block(x, w):
        return fused_npo_loss(torch.tanh(layer(x)), w, labels, ref_logps=ref_logps)

    plain = gradients(block(hidden, weight), hidden, weight, *layer.parameters())
    kept = gradients(checkpoint(block, hidden, weight, use_reentrant=False), hidden, weight, *layer.parameters())
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a, b)


def test_a_frozen_head_gets_the_same_hidden_gradient_in_the_cheap_mode():
    hidden, weight, labels, ref_logps = make()
    expected = gradients(fused_npo_loss(hidden, weight, labels, ref_logps=ref_logps), hidden)
    frozen = weight.detach()
    found = gradients(fused_npo_loss(hidden, frozen, labels, ref_logps=ref_logps), hidden)
    assert explain(fused_npo_loss, hidden, frozen, labels).mode == "frozen"
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_forget_and_retain_rows_in_one_call_are_the_two_losses_apart(impl):
    hidden, weight, labels, ref_logps = make()
    n = B // 2

    def loss_fn(logps, num_tokens):
        forget = -20 * nn.functional.logsigmoid(-0.1 * (logps[:n] - ref_logps[:n])).mean()
        return forget - logps[n:].sum() / num_tokens[n:].sum()

    logps, num_tokens = sequence_logprobs(hidden[n:], weight, labels[n:], impl=impl)
    apart = fused_npo_loss(hidden[:n], weight, labels[:n], ref_logps=ref_logps[:n], impl=impl)
    apart = apart - logps.sum() / num_tokens.sum()
    together = fused_logprob_loss(hidden, weight, labels, loss_fn, impl=impl)
    torch.testing.assert_close(together, apart)
    for a, b in zip(gradients(together, hidden, weight), gradients(apart, hidden, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_explain_says_which_mode_and_why():
    hidden, weight, labels, _ = make()
    assert explain(fused_npo_loss, hidden, weight, labels).mode == "slab"
    assert explain(sequence_logprobs, hidden, weight, labels).mode == "recompute"
    assert explain(fused_npo_loss, hidden, weight, labels, reduction="none").mode == "recompute"
    small = explain(fused_npo_loss, hidden, weight, labels, workspace_mb=TINY)
    assert small.mode == "recompute"
    assert "longest sequence" in str(small)
    with torch.no_grad():
        assert explain(fused_npo_loss, hidden, weight, labels).mode == "no_grad"
    with pytest.raises(ValueError, match="no plan"):
        explain(fused_npo_loss, hidden, weight, labels, impl="reference")


class Scores(torch.nn.Module):
    """What one exports: log-probabilities of a batch of any size, without logits."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, hidden, labels):
        return sequence_logprobs(hidden, self.weight, labels, impl="torch")


def test_an_exported_program_scores_other_batches_as_well(tmp_path):
    """The operator stays one node; the number of scored rows is found out at run time."""
    hidden, weight, labels, _ = make()
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    model = Scores(weight.detach())
    program = torch.export.export(model, (hidden.detach(), labels), dynamic_shapes=(dims, dims))
    names = [str(node.target) for node in program.graph.nodes if "npo_kernels" in str(node.target)]
    assert names == ["npo_kernels.token_logps.default"]
    torch.export.save(program, tmp_path / "scores.pt2")
    loaded = torch.export.load(tmp_path / "scores.pt2").module()
    for batch in ((hidden, labels), (hidden[:4, 2:], labels[:4, 2:]), (hidden[:2], torch.full((2, S), -100))):
        for got, expected in zip(loaded(*batch), model(*batch), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("save", [True, False])
def test_selective_checkpointing_decides_about_the_operators(save, monkeypatch):
    """A policy that saves them does not run them again in the backward; one that does not, does."""
    op, runs = torch.ops.npo_kernels.ratio_loss.default, []
    monkeypatch.setattr(execute, "value_and_gradients", counted(execute.value_and_gradients, runs))

    def policy(ctx, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if save and operator is op else CheckpointPolicy.PREFER_RECOMPUTE

    hidden, weight, labels, ref_logps = make()

    def block(hidden, weight):
        return fused_npo_loss(torch.tanh(hidden), weight, labels, ref_logps=ref_logps, impl="torch")

    expected = gradients(block(hidden, weight), hidden, weight)
    runs.clear()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    loss = checkpoint(block, hidden, weight, use_reentrant=False, context_fn=contexts)
    grads = gradients(loss, hidden, weight)
    assert len(runs) == (1 if save else 2)
    for got, truth in zip(grads, expected, strict=True):
        assert torch.equal(got, truth)


def counted(function, runs):
    def run(*args, **kwargs):
        runs.append(function.__name__)
        return function(*args, **kwargs)

    return run


class Own(nn.Parameter):
    """As libraries have them, to remember something of a parameter."""


def test_a_subclass_of_parameter_compiles_without_a_break():
    hidden, labels = torch.randn(2, 5, 8), torch.randint(20, (2, 5))
    weight = Own(torch.randn(20, 8))
    loss = partial(fused_npo_loss, labels=labels, ref_logps=torch.zeros(2))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), loss(hidden, weight))


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_fakes_inside_of_a_transformation_are_no_real_tensors(mode):
    tensors = torch.randn(2, 5, 8), torch.randn(20, 8), torch.randint(20, (2, 5)), torch.zeros(2)

    def loss(hidden, weight, labels, ref_logps):
        return fused_npo_loss(hidden, weight, labels, ref_logps=ref_logps, num_rows=8)

    graph = make_fx(torch.func.functionalize(loss), tracing_mode=mode)(*tensors)
    torch.testing.assert_close(graph(*tensors), loss(*tensors))
