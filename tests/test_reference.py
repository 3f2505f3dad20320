"""The oracle itself: against arithmetic on single numbers, PyTorch's cross-entropy, and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from npo_kernels import fused_linear_kl, fused_npo_loss, fused_simnpo_loss, reference, sequence_logprobs
from tests.support import HEADS, LAYOUTS, make_batch


def by_hand(hidden, weight, bias, target, logit_scale, softcap):
    """log softmax at the target, one Python number at a time."""
    z = []
    for v in range(len(weight)):
        raw = sum(a * b for a, b in zip(hidden, weight[v], strict=True)) + (bias[v] if bias else 0.0)
        raw *= logit_scale
        z.append(raw if softcap is None else softcap * math.tanh(raw / softcap))
    return z[target] - math.log(math.fsum(math.exp(value) for value in z))


@pytest.mark.parametrize("head", HEADS)
def test_token_logps_are_the_definition(head):
    batch = make_batch(torch.float64, head, lengths=(4,), prompts=(0,), H=3, V=5).packed()
    options = {"bias": batch.bias, "logit_scale": batch.logit_scale, "softcap": batch.softcap}
    logps = reference.token_logps(batch.hidden, batch.weight, batch.labels, **options)
    bias = None if batch.bias is None else batch.bias.tolist()
    expected = [
        by_hand(hidden, batch.weight.tolist(), bias, target, batch.logit_scale, batch.softcap)
        for hidden, target in zip(batch.hidden.tolist(), batch.labels.tolist(), strict=True)
    ]
    assert logps.tolist() == pytest.approx(expected, rel=1e-13)


def test_the_shifted_sum_is_the_cross_entropy_of_a_causal_model():
    batch = make_batch(torch.float64)
    logits = batch.hidden @ batch.weight.t()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], reduction="none")
    logps, num_tokens = batch(sequence_logprobs, impl="reference")
    torch.testing.assert_close(logps, -losses.sum(1))
    assert num_tokens.tolist() == (batch.labels[:, 1:] != -100).sum(1).tolist()
    assert num_tokens.dtype == torch.int64


def test_an_ignored_position_is_zero_whatever_its_hidden_state_and_a_wrong_label_is_nan():
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    hidden[1] = torch.nan
    logps = reference.token_logps(hidden, weight, torch.tensor([2, -100, 5, -1]))
    assert logps[0] < 0
    assert logps[1] == 0
    assert logps[2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_float64_input_gives_float64(dtype):
    logps = reference.token_logps(torch.ones(1, 2, dtype=dtype), torch.ones(3, 2, dtype=dtype), torch.tensor([0]))
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_sums_go_by_offsets_and_empty_sequences_are_zero():
    sums = reference.sum_by_sequence(torch.tensor([1.0, 2, 4, 8]), torch.tensor([0, 0, 1, 1, 4, 4]))
    assert sums.tolist() == [0, 1, 0, 14, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [fused_npo_loss, fused_simnpo_loss])
def test_first_and_second_derivatives_by_finite_differences(function, layout):
    batch = make_batch(torch.float64, "all", layout, lengths=(4, 0, 3), prompts=(1, 0, 0), H=3, V=6, spread=1.0)
    extra = {"ref_logps": batch.ref_logps} if function is fused_npo_loss else {"gamma": 1.0}

    def loss(hidden, weight, bias):
        fresh = batch.leaves()
        return function(
            hidden, weight, fresh.labels, bias=bias, cu_seqlens=fresh.cu_seqlens, logit_scale=fresh.logit_scale,
            softcap=fresh.softcap, impl="reference", **extra,
        )  # fmt: skip

    leaves = tuple(batch.leaves(("hidden", "weight", "bias")).tensors.values())
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_an_ignored_position_holds_reaches_no_gradient(bad):
    """0 times a non-finite number is NaN: masking the loss alone leaves that in every gradient."""
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(1, 3, 4, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3]])
    labels[0, 1] = -100
    counted = torch.tensor([[True, False, True]])
    reference = hidden + 1

    def gradients(hidden, reference):
        hidden = hidden.clone().requires_grad_()
        logps, _ = sequence_logprobs(hidden, weight, labels, shift=False, impl="reference")
        kl = fused_linear_kl(hidden, weight, reference, weight.detach() + 1, mask=counted, impl="reference")
        return torch.autograd.grad(logps.sum() + kl, (hidden, weight))

    expected = gradients(hidden, reference)
    spoilt = hidden.clone(), reference.clone()
    for tensor in spoilt:
        tensor[0, 1] = bad
    for got, wanted in zip(gradients(*spoilt), expected, strict=True):
        assert torch.equal(got, wanted)
