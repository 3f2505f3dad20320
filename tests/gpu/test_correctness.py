"""The claims of the interpreter tests for compiled kernels, at shapes of several tiles, and properties that only a GPU
can show."""

import math
from dataclasses import replace

import pytest
import torch

from npo_kernels import fused_npo_loss, sequence_logprobs, set_debug, token_logprobs
from tests import matrix, support
from tests.support import DTYPES, IMPLS, make_batch

# Ragged against every tile of the table; several splits of the vocabulary. Many short sequences: float32 knows the
# log-probability of a long one to too few digits for the errors that `support.CEILING` allows.
SHAPE = {
    "lengths": (18, 1, 0, 9, 15, 17, 12, 16) * 4 + (11,),
    "prompts": (3, 0, 0, 0, 2, 0, 0, 5) * 4 + (0,),
    "H": 264,
    "V": 9001,
}
# More rows a sequence than a program of the sums takes at a time.
LONG = {**SHAPE, "lengths": (150, 1, 0, 97, 310), "prompts": (20, 0, 0, 0, 33)}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", matrix.cases(), ids=matrix.case_id)
def test_every_mode_is_no_worse_than_plain_pytorch(impl, case, plans):
    matrix.check(impl, case, plans, **SHAPE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_runs_give_the_same_bits(dtype):
    batch = make_batch(dtype, "all", **SHAPE)
    for objective in (support.npo, support.sequences):
        first = support.evaluate(objective, batch, ("hidden", "weight", "bias"), impl="triton")
        for _ in range(5):
            again = support.evaluate(objective, batch, ("hidden", "weight", "bias"), impl="triton")
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logps_have_the_same_bits_alone_in_a_batch_packed_and_in_any_workspace(dtype):
    batch = make_batch(dtype, **LONG)
    logps = batch(sequence_logprobs, impl="triton")[0]
    exact = batch.leaves(dtype=torch.float64)(sequence_logprobs, impl="reference")[0]
    torch.testing.assert_close(logps.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(batch.packed()(sequence_logprobs, impl="triton")[0], logps)
    for s in range(len(batch.lengths)):
        assert torch.equal(batch.sequences([s])(sequence_logprobs, impl="triton")[0], logps[s : s + 1])
    tokens = batch(token_logprobs, impl="triton")
    for t in (60, 61):  # a single row
        alone = token_logprobs(batch.hidden[:1, t : t + 1], batch.weight, batch.labels[:1, t + 1 : t + 2], shift=False,
                               impl="triton")  # fmt: skip
        assert torch.equal(alone[0], tokens[0, t : t + 1])
    for workspace_mb in (None, 64, 8, 3, support.TINY):
        leaves = batch.leaves(("hidden", "weight"))
        options = {"ref_logps": batch.ref_logps, "impl": "triton", "workspace_mb": workspace_mb, "return_stats": True}
        assert torch.equal(leaves(fused_npo_loss, **options)[1].logps, logps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_reference_the_loss_is_exactly_two_over_beta_ln_two(dtype):
    batch = make_batch(dtype, lengths=(150, 40, 97), prompts=(20, 0, 0), H=264, V=9001)
    ref_logps = batch(sequence_logprobs, impl="triton")[0]
    loss, stats = batch.leaves(("hidden", "weight"))(
        fused_npo_loss, ref_logps=ref_logps, impl="triton", reduction="none", return_stats=True
    )
    assert (stats.log_ratio == 0).all()
    torch.testing.assert_close(loss, torch.full_like(loss, 20 * math.log(2)), rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["slab", "frozen"])
def test_a_row_at_p_of_e_to_the_minus_200_is_repaired(dtype, mode):
    batch = make_batch(dtype, lengths=(16,) * 12, prompts=(0,) * 12, H=256, V=4000)
    direction = batch.weight[batch.labels[0, 7]].double()
    far = -200 * direction / direction.square().sum()
    batch.hidden[0, 6] = far.to(dtype)
    # the reference of the row as it is now: far below another, its gradient would have vanished
    exact = batch.leaves(dtype=torch.float64)(sequence_logprobs, impl="reference")[0]
    batch = replace(batch, ref_logps=exact.float())
    needs = ("hidden",) if mode == "frozen" else ("hidden", "weight")
    plain, oracle = support.evaluate_plain_and_oracle(support.npo, batch, needs)
    assert batch(token_logprobs, impl="triton")[0, 6] < -150
    support.assert_no_worse_than_plain(support.evaluate(support.npo, batch, needs, impl="triton"), plain, oracle)


def test_labels_out_of_range_give_nan_without_a_sync_and_raise_in_debug(no_host_sync):
    batch = make_batch(torch.bfloat16, **SHAPE)
    batch.labels[0, 15] = SHAPE["V"] + 3  # of a scored position
    rows = batch.num_scored
    loss = no_host_sync(lambda: support.npo(batch, impl="triton", num_rows=rows))
    assert loss.isnan()
    set_debug(True)
    try:
        with pytest.raises(ValueError, match="outside"):
            support.npo(batch, impl="triton")
    finally:
        set_debug(False)


@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight", "bias")], ids=support.name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_scored_is_a_loss_of_zero_with_zero_gradients(dtype, needs):
    batch = make_batch(dtype, "all", lengths=(9, 5), prompts=(9, 5), H=264, V=9001)
    for objective in (support.npo, support.sequences):
        found = support.evaluate(objective, batch, needs, impl="triton")
        assert all((t == 0).all() for t in found.values())


def test_offsets_beyond_two_to_the_31():
    """N x V of the slab and rows x stride of hidden pass 2^31: the last rows are where 32 bits would go wrong."""
    N, H, V = 17_000, 64, 128_256
    assert N * V > 2**31
    storage = torch.randn(N, 131_072, device="cuda", dtype=torch.bfloat16)
    hidden = storage[:, :H].unsqueeze(0)  # row stride 131072: the last row starts at 2.2e9
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16) / 4
    labels = torch.randint(V, (1, N), device="cuda")
    options = {"shift": False, "impl": "triton"}

    def logps_and_gradients(hidden, labels):
        # at its own reference the weight of the only sequence is 1, however many rows it has
        ref_logps = sequence_logprobs(hidden, weight, labels, **options)[0]
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = fused_npo_loss(*leaves, labels, ref_logps=ref_logps, workspace_mb=8192, **options)
        return token_logprobs(hidden, weight, labels, **options), *torch.autograd.grad(loss, leaves)

    tail = slice(N - 64, N)
    logps, hidden_grad, weight_grad = logps_and_gradients(hidden, labels)
    near_logps, near_grad, _ = logps_and_gradients(hidden[:, tail].contiguous(), labels[:, tail])
    assert torch.equal(logps[:, tail], near_logps)
    assert support.relative_error(hidden_grad[:, tail], near_grad) < 2**-7
    assert weight_grad.isfinite().all()


def test_compiled_with_inductor_equals_eager():
    batch = make_batch(torch.bfloat16, **SHAPE)
    compiled = torch.compile(support.npo, fullgraph=True)
    eager = support.evaluate(support.npo, batch, ("hidden", "weight"), impl="triton")
    traced = support.evaluate(compiled, batch, ("hidden", "weight"), impl="triton")
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


def test_autocast_is_the_casts_done_by_hand():
    batch = make_batch(torch.float32, **SHAPE).leaves(("hidden", "weight"))
    with torch.autocast("cuda", torch.bfloat16):
        inside = support.npo(batch, impl="triton")
    by_hand = fused_npo_loss(
        batch.hidden.bfloat16(), batch.weight.bfloat16(), batch.labels, ref_logps=batch.ref_logps, impl="triton"
    )
    assert torch.equal(inside, by_hand)
    leaves = (batch.hidden, batch.weight)
    for a, b in zip(torch.autograd.grad(inside, leaves), torch.autograd.grad(by_hand, leaves), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_current():
    batch = make_batch(torch.bfloat16, **SHAPE)
    moved = {name: t.to("cuda:1") for name, t in vars(batch).items() if isinstance(t, torch.Tensor)}
    loss = support.npo(type(batch)(**{**vars(batch), **moved}), impl="triton")
    assert loss.device.index == 1
    torch.testing.assert_close(loss.cpu(), support.npo(batch, impl="triton").cpu())
