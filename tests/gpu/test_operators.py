"""The operators on real tensors: fakes, guards around every output, KL, heads of more than 2^31 entries."""

import pytest
import torch

from npo_kernels import fused_linear_kl, fused_npo_loss, sequence_logprobs, token_logprobs
from npo_kernels.ops.linear_kl import KLLossCall, SavedKL, UpstreamKL, linear_kl, linear_kl_backward, linear_kl_loss
from npo_kernels.ops.logprobs import LogpsCall, SavedCall, Upstream, token_logps, token_logps_backward
from npo_kernels.ops.ratio_loss import RatioCall, ratio_loss
from tests import support
from tests.gpu.test_correctness import SHAPE
from tests.support import DTYPES, call_of, kl_call_of, make_batch, name_of, opcheck
from tests.test_canaries import NEEDS, WORKSPACES, check

SMALL = {"lengths": (40, 1, 0, 33), "prompts": (2, 0, 0, 0), "H": 72, "V": 1500}


@pytest.mark.parametrize("num_rows", [None, 90])
@pytest.mark.parametrize("needs", NEEDS, ids=name_of)
def test_fakes_have_the_shapes_strides_and_dtypes_of_the_outputs(needs, num_rows):
    batch = make_batch(torch.bfloat16, "bias", "packed", **SMALL)
    call, kl_call = call_of(batch.leaves(needs), "triton", num_rows=num_rows), kl_call_of(batch.leaves(needs), "triton")
    normalizer = None if num_rows is None else torch.tensor(3.0, device="cuda")
    weights = None if num_rows is None else batch.ref_logps.abs()
    opcheck(token_logps, LogpsCall(call, per_token=True))
    opcheck(ratio_loss, RatioCall(call, batch.ref_logps, normalizer, weights, 0.1, False, "mean"))
    opcheck(linear_kl_loss, KLLossCall(kl_call, torch.tensor(0.25, device="cuda")))
    opcheck(linear_kl, kl_call)
    if not needs:
        return
    call, kl_call = call_of(batch, "triton", needs, num_rows=num_rows), kl_call_of(batch, "triton", needs)
    tokens, sequences = (torch.ones(n, device="cuda") for n in (len(call.labels), call.num_sequences))
    saved = SavedCall(call.hidden, call.head, token_logps(LogpsCall(call, per_token=False)).saved, call.execution)
    opcheck(token_logps_backward, Upstream(saved, tokens, sequences))
    opcheck(linear_kl_backward, UpstreamKL(tokens, SavedKL(kl_call, linear_kl(kl_call).statistics)))


@pytest.mark.parametrize("workspace_mb", WORKSPACES, ids=["default", "tiny"])
@pytest.mark.parametrize("needs", NEEDS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nothing_is_written_outside(dtype, needs, workspace_mb):
    check("triton", dtype, needs, workspace_mb, **{**SHAPE, "V": 8193})  # 4096 is a label, and begins a slice


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_kl_is_no_worse_than_plain_pytorch(dtype, reduction):
    """Ragged in rows, depth and vocabulary; a reference of another width; an upstream gradient that is nowhere one."""
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((301, 264), (9001, 264), (301, 392), (9001, 392))
    exact = [torch.randn(s, generator=g, device="cuda", dtype=torch.float64) for s in shapes]
    exact = [t * (1.5 * t.shape[1] ** -0.5 if t.shape[0] == 9001 else 1) for t in exact]
    exact = [t.to(dtype).double() for t in exact]
    mask = torch.rand(301, generator=g, device="cuda") > 0.4

    def evaluate(impl, dtype):
        hidden, weight, ref_hidden, ref_weight = (t.to(dtype) for t in exact)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        options = {"mask": mask, "reduction": reduction, "impl": impl, "logit_scale": 0.7, "softcap": 4.0}
        kl = fused_linear_kl(*leaves, ref_hidden, ref_weight, **options)
        upstream = torch.linspace(0.5, 2.0, kl.numel(), device="cuda", dtype=kl.dtype).view(kl.shape)
        grads = torch.autograd.grad((kl * upstream).sum(), leaves)
        return dict(zip(("kl", "hidden", "weight"), (kl.detach(), *grads), strict=True))

    truth = evaluate("reference", torch.float64)
    ours, plain = evaluate("triton", dtype), evaluate("reference", dtype)
    for name in truth:
        wrong, allowed = (support.relative_error(found[name], truth[name]) for found in (ours, plain))
        assert wrong <= 1.1 * allowed + 2e-6, f"{name}: {wrong:.3g}, plain PyTorch {allowed:.3g}"


def test_a_head_of_more_than_two_to_the_31_entries():
    """Labels and columns at the very end are where offsets of 32 bits would go wrong."""
    N, H, V = 96, 8448, 262_144
    assert V * H > 2**31
    g = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(V, H, device="cuda", generator=g, dtype=torch.bfloat16) * H**-0.5
    hidden = torch.randn(1, N, H, device="cuda", generator=g, dtype=torch.bfloat16)
    labels = V - 1 - torch.randint(64, (1, N), device="cuda", generator=g)
    options = {"shift": False, "impl": "triton"}
    logps = token_logprobs(hidden, weight, labels, **options)[0]
    z = torch.cat([hidden[0].double() @ part.double().t() for part in weight.split(16_384)], 1)
    truth = z.log_softmax(-1)
    torch.testing.assert_close(logps.double(), truth.gather(1, labels[0, :, None])[:, 0], rtol=1e-5, atol=0)
    # at its own reference the weight of the only sequence is 1: the gradient is that of the sum of logp
    ref_logps = sequence_logprobs(hidden, weight, labels, **options)[0]
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = fused_npo_loss(*leaves, labels, ref_logps=ref_logps, **options)
    hidden_grad, weight_grad = torch.autograd.grad(loss, leaves)
    dz = -truth.exp()
    dz[torch.arange(N, device="cuda"), labels[0]] += 1
    tail = slice(V - 64, V)
    want = dz[:, tail].t() @ hidden[0].detach().double()
    assert support.relative_error(weight_grad[tail], want) < 2**-8
    want = sum(d @ part.detach().double() for d, part in zip(dz.split(16_384, 1), weight.split(16_384), strict=True))
    assert support.relative_error(hidden_grad[0], want) < 2**-8
