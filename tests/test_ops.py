"""The operators as PyTorch's own machinery sees them: opcheck, torch.compile, checkpointing, fake tensors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from npo_kernels import (
    fused_linear_kl,
    fused_logprob_loss,
    fused_npo_loss,
    fused_simnpo_loss,
    fused_token_loss,
    sequence_logprobs,
    token_logprobs,
    token_statistics,
)
from npo_kernels.core.row_moments import NAMES
from npo_kernels.core.task import Needs
from npo_kernels.ops import token_statistics as statistics
from npo_kernels.ops.gradients import GradientTensors, Kept, SavedGradients, ScaleCall, scale_gradients
from npo_kernels.ops.linear_kl import KLLossCall, SavedKL, UpstreamKL, linear_kl, linear_kl_backward, linear_kl_loss
from npo_kernels.ops.logprobs import LogpsCall, SavedCall, Upstream, token_logps, token_logps_backward
from npo_kernels.ops.ratio_loss import RatioCall, ratio_loss
from npo_kernels.ops.token_statistics import SavedStatistics, UpstreamStatistics
from tests.support import (
    DTYPES,
    IMPLS,
    call_of,
    evaluate,
    kl_call_of,
    make_batch,
    mixed_loss,
    name_of,
    npo,
    opcheck,
    relative_error,
)

SMALL = {"lengths": (6, 1, 0, 9), "prompts": (2, 0, 0, 0), "H": 20, "V": 150}
NEEDS = [(), ("hidden",), ("weight",), ("hidden", "weight", "bias")]


@pytest.mark.parametrize("num_rows", [None, 15])
@pytest.mark.parametrize("needs", NEEDS, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_token_logps(impl, needs, num_rows):
    batch = make_batch(head="bias", layout="packed", **SMALL).leaves(needs)
    opcheck(token_logps, LogpsCall(call_of(batch, impl, num_rows=num_rows), per_token=num_rows is None))


@pytest.mark.parametrize("needs", NEEDS[1:], ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_token_logps_backward(impl, needs):
    call = call_of(make_batch(head="bias", layout="packed", **SMALL), impl, needs)
    saved = SavedCall(call.hidden, call.head, token_logps(LogpsCall(call, per_token=False)).saved, call.execution)
    tokens, sequences = torch.ones(len(call.labels)), torch.ones(call.num_sequences)
    opcheck(token_logps_backward, Upstream(saved, tokens, sequences if "hidden" in needs else None))


@pytest.mark.parametrize("num_rows", [None, 15])
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_token_statistics_and_its_backward(impl, num_rows):
    call = call_of(make_batch(head="bias", layout="packed", **SMALL), impl, NEEDS[-1], num_rows=num_rows)
    opcheck(statistics.token_statistics, call)
    saved = SavedStatistics(call.hidden, call.head, statistics.token_statistics(call).saved, call.execution)
    opcheck(statistics.token_statistics_backward, UpstreamStatistics(torch.ones(5, len(call.labels)), saved))


@pytest.mark.parametrize("num_rows", [None, 15])
@pytest.mark.parametrize("needs", NEEDS, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_ratio_loss(impl, needs, num_rows):
    batch = make_batch(torch.bfloat16, head="bias", layout="packed", **SMALL).leaves(needs)
    normalizer, weights = (None, None) if num_rows is None else (torch.tensor(3.0), batch.ref_logps.abs())
    call = call_of(batch, impl, num_rows=num_rows)
    opcheck(ratio_loss, RatioCall(call, batch.ref_logps, normalizer, weights, 0.1, False, "mean"))


@pytest.mark.parametrize("needs", NEEDS, ids=name_of)
@pytest.mark.parametrize(("impl", "reverse"), [*((impl, False) for impl in IMPLS), ("torch", True)])
def test_opcheck_linear_kl(impl, reverse, needs):
    batch = make_batch(head="bias", layout="packed", **SMALL)
    call = kl_call_of(batch.leaves(needs), impl, reverse=reverse)
    opcheck(linear_kl_loss, KLLossCall(call, torch.tensor(0.25)))
    opcheck(linear_kl, call)
    if needs:
        call = kl_call_of(batch, impl, needs, reverse)
        saved = SavedKL(call, linear_kl(call).statistics)
        opcheck(linear_kl_backward, UpstreamKL(torch.ones(len(call.counted)), saved))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", NEEDS[1:], ids=name_of)
def test_opcheck_scale_gradients(impl, dtype, needs):
    opcheck(scale_gradients, scaling(torch.randn(5, 3).to(dtype), torch.rand(5), torch.tensor(0.3), dtype, impl, needs))


def scaling(grad, unit, upstream, dtype, impl, needs=("weight",)) -> ScaleCall:
    """Of three gradients that are all `grad`, as far as they are wanted."""
    wanted = Needs(*(name in needs for name in Needs._fields))
    grads = GradientTensors(*(grad.clone() if want else grad.new_empty(0) for want in wanted))
    unit = grad.new_empty(0, dtype=torch.float32) if unit is None else unit
    return ScaleCall(SavedGradients(Kept(grads, unit), wanted, dtype, impl), upstream)


@pytest.mark.parametrize("shape", [(1,), (72,), (73, 5), (200, 3), (3, 1500), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_is_scaled_in_float32_and_rounded_once(small_blocks, poisoned_allocations, impl, dtype, shape):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, unit = grad.clone(), 2.0 ** torch.arange(shape[0])
    for upstream in (torch.tensor(-0.3), torch.tensor(-0.3).bfloat16()):
        every = scale_gradients(scaling(grad, None, upstream, dtype, impl, Needs._fields))
        assert all(torch.equal(found, (grad.float() * upstream.float()).to(dtype)) for found in every)
    hidden, weight, _ = scale_gradients(scaling(grad, unit, upstream, torch.float32, impl, ("hidden", "weight")))
    assert torch.equal(hidden, grad.float() * upstream.float())  # the units are of the rows of dWeight alone
    assert torch.equal(weight, grad.float() * (upstream.float() * unit).reshape(-1, *[1] * (grad.dim() - 1)))
    assert torch.equal(grad, before)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------


def token_loss(token_logps, sequence, num_tokens):
    return ((1 + sequence) * token_logps.square()).sum() + (token_logps / num_tokens[sequence]).exp().sum()


def kl(batch, **options):
    """The model against a reference that is the model of reversed hidden states."""
    options.pop("num_rows", None)
    return fused_linear_kl(batch.hidden, batch.weight, batch.hidden.detach().flip(-1), batch.weight.detach())


COMPILED = {
    "fused_npo_loss": lambda b, **o: b(fused_npo_loss, ref_logps=b.ref_logps, **o),
    "fused_npo_loss, by sequence": lambda b, **o: b(fused_npo_loss, ref_logps=b.ref_logps, reduction="none", **o).sum(),
    "fused_npo_loss, statistics": lambda b, **o: sum(
        v.sum() if isinstance(v, torch.Tensor) else v.weight.sum() + v.logps.sum()
        for v in b(fused_npo_loss, ref_logps=b.ref_logps, return_stats=True, **o)
    ),
    "fused_simnpo_loss": lambda b, **o: b(fused_simnpo_loss, gamma=1.0, reduction="sum", **o),
    "fused_npo_loss, weighted": lambda b, **o: b(fused_npo_loss, ref_logps=b.ref_logps, weights=b.ref_logps.abs(), **o),
    "fused_logprob_loss": lambda b, **o: b(fused_logprob_loss, mixed_loss, **o),
    "fused_token_loss": lambda b, **o: b(fused_token_loss, token_loss, **o),
    "sequence_logprobs": lambda b, **o: b(sequence_logprobs, **o)[0].square().sum(),
    "token_logprobs": lambda b, **o: b(token_logprobs, **o).square().sum(),
    "token_statistics": lambda b, **o: sum(v.square().sum() for v in b(token_statistics, NAMES, **o).values()),
    "fused_linear_kl": kl,
}


def ragged(seed, layout):
    """Batches of one kind in sizes of their own."""
    lengths = [(7, 1, 0, 9), (5, 12, 3), (4, 4, 4, 4, 10), (2, 30)][seed]
    return make_batch(lengths=lengths, prompts=[0] * len(lengths), H=20, V=150, seed=seed, layout=layout, head="bias")


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "packed") for name in COMPILED), ("fused_npo_loss", "padded"), ("fused_linear_kl", "padded")],
)
def test_compiled_without_breaks_it_is_the_same_and_ragged_batches_share_the_graphs(fresh_compiler, name, layout):
    counter = CompileCounterWithBackend("aot_eager")
    objective, needs = COMPILED[name], ("hidden", "weight")
    compiled = torch.compile(objective, fullgraph=True, dynamic=True, backend=counter)
    for seed in range(4):
        batch = ragged(seed, layout)
        expected = evaluate(objective, batch, needs, impl="torch")
        for part, value in evaluate(compiled, batch, needs, impl="torch").items():
            assert relative_error(value, expected[part]) < 1e-6, part
    # one more where the first batch has a size that stands for itself
    assert counter.frame_count <= 2


@pytest.mark.skipif("triton" not in IMPLS, reason="Triton is not installed")
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=name_of)
def test_the_operators_of_the_triton_path_compile_as_well(fresh_compiler, needs):
    batch = ragged(0, "packed")
    for num_rows in (None, batch.num_scored):
        compiled = torch.compile(npo, fullgraph=True, dynamic=True, backend="aot_eager")
        expected = evaluate(npo, batch, needs, impl="triton", num_rows=num_rows)
        for part, value in evaluate(compiled, batch, needs, impl="triton", num_rows=num_rows).items():
            assert relative_error(value, expected[part]) < 1e-6, part


def test_autocast_survives_compilation(fresh_compiler):
    batch, needs = ragged(0, "padded"), ("hidden", "weight")
    compiled = torch.compile(npo, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluate(npo, batch, needs, impl="torch")
        values = evaluate(compiled, batch, needs, impl="torch")
    for part, value in values.items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[part]) < 1e-6, part


@pytest.mark.parametrize("name", ["fused_npo_loss", "fused_logprob_loss"])
def test_a_compiled_backward_of_an_eager_loss_has_no_breaks(fresh_compiler, name):
    batch = ragged(0, "padded").leaves(("hidden", "weight"))
    expected = torch.autograd.grad(2.0 * COMPILED[name](batch, impl="torch"), batch.weight)[0]
    loss = 2.0 * COMPILED[name](batch, impl="torch")
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    assert torch.equal(batch.weight.grad, expected)


@pytest.mark.parametrize("name", ["fused_npo_loss", "fused_token_loss", "sequence_logprobs", "token_logprobs"])
@pytest.mark.parametrize("impl", IMPLS)
def test_under_checkpointing_the_gradients_are_the_same(impl, name):
    def checkpointed(batch, **options):
        def run(hidden, weight):
            return COMPILED[name](batch, **options)

        return checkpoint(run, batch.hidden, batch.weight, use_reentrant=False)

    batch, needs = make_batch(**SMALL), ("hidden", "weight")
    expected = evaluate(COMPILED[name], batch, needs, impl=impl)
    for part, value in evaluate(checkpointed, batch, needs, impl=impl).items():
        assert torch.equal(value, expected[part]), part


@pytest.mark.parametrize("impl", IMPLS)
def test_the_forward_of_a_loss_without_gradients_makes_none(impl, monkeypatch):
    """An unwanted gradient is an empty tensor, not one of zeros."""
    batch = make_batch(head="bias", layout="packed", **SMALL)
    for needs in NEEDS:
        call = call_of(batch, impl, needs)
        found = ratio_loss(RatioCall(call, batch.ref_logps, None, None, 0.1, False, "mean")).kept.grads._asdict()
        assert {name for name, grad in found.items() if grad.numel()} == set(needs)
