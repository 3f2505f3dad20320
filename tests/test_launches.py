"""How many launches a call takes, and that a CUDA graph can hold them: counted without a GPU (tests/launches.py).

A new small operator on the way fails here, with the list of what is launched.
"""

from functools import partial

import pytest
import torch

from npo_kernels import fused_npo_loss, fused_simnpo_loss, sequence_logprobs, token_logprobs
from npo_kernels.core import execute, plan, task
from tests.launches import Launches, counted
from tests.support import DEVICE, ON_GPU

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(ON_GPU, reason="tests/gpu has the syncs and the graphs of a GPU itself")

B, S, H, V = 2, 5, 8, 100
ROWS = B * S  # a bound: some of them are filling

# positions counted, written, rows gathered; targets, exponentials, anchors, repair, statistics
LOGPROBS = 8
NPO = LOGPROBS + 11  # weights, epilogue, sum; dHidden: zeros, product, rows; dWeight: labels sorted, rows scaled,
#                      product, labels added, rounded


def make(layout):
    """(hidden, weight, labels) that require grad where they can, and the options of such a batch."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, H, generator=g).bfloat16()
    weight = torch.randn(V, H, generator=g).bfloat16().requires_grad_()
    labels = torch.randint(V, (B, S), generator=g)
    labels[:, :2] = -100
    options = {"impl": "triton", "num_rows": ROWS}
    if layout == "packed":
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        options["cu_seqlens"] = torch.arange(B + 1, dtype=torch.int32) * S
    return (hidden.requires_grad_(), weight, labels), options


@pytest.fixture(params=["padded", "packed"])
def batch(request):
    return make(request.param)


@pytest.fixture
def count(monkeypatch):
    """What a function launches in its forward, and in the backward of its result."""

    def run(function, backward=True) -> tuple[Launches, Launches | None]:
        with counted(monkeypatch) as forward:
            result = function()
        if not backward:
            return forward, None
        upstream = torch.ones_like(result)
        leaves = [t for t in function.args if t.requires_grad]
        with counted(monkeypatch) as back:
            torch.autograd.grad(result, leaves, upstream)
        return forward, back

    return run


def test_npo(batch, count):
    tensors, options = batch
    ref_logps = torch.zeros(B)
    forward, backward = count(partial(fused_npo_loss, *tensors, ref_logps=ref_logps, **options))
    assert len(forward.names) == NPO, str(forward)
    assert len(backward.names) == 2, str(backward)  # dHidden and dWeight times the upstream gradient
    assert not forward.syncs and not backward.syncs


@pytest.mark.parametrize(("hidden_size", "slices"), [(576, 1), (4096, 6)])
def test_dweight_of_a_small_head_takes_one_slice(count, monkeypatch, hidden_size, slices):
    """As a GPU cuts it, with as many slices as SmolLM2's vocabulary has: product, labels added and rounded in each."""
    allowed = plan.grad_slices(hidden_size, torch.device("cuda"))
    monkeypatch.setattr(task, "grad_slices", lambda H, device: allowed)
    for module in (plan, execute):
        monkeypatch.setattr(module, "GRAD_SLICE", -(-V // 6))
    tensors, options = make("padded")
    forward, _ = count(partial(fused_npo_loss, *tensors, ref_logps=torch.zeros(B), **options), backward=False)
    assert len(forward.names) == NPO + 3 * (slices - 1), str(forward)


@pytest.mark.parametrize(
    ("more", "options"),
    [
        (1, {"normalizer": 4.0}),  # put into a tensor
        (0, {"weights": torch.rand(B)}),
        (0, {"reduction": "sum"}),
        (0, {"num_rows": None}),
    ],
    ids=["normalizer", "weights", "sum", "counted"],
)
def test_npo_with_options(count, more, options):
    tensors, given = make("padded")
    forward, _ = count(partial(fused_npo_loss, *tensors, ref_logps=torch.zeros(B), **{**given, **options}), False)
    assert len(forward.names) == NPO + more, str(forward)


def test_simnpo_fills_its_offsets(count):
    tensors, options = make("padded")
    forward, backward = count(partial(fused_simnpo_loss, *tensors, **options))
    assert len(forward.names) == NPO + 1, str(forward)
    assert not forward.syncs and not backward.syncs


def test_npo_with_a_frozen_head(count):
    (hidden, weight, labels), options = make("padded")
    tensors = hidden, weight.detach(), labels
    forward, backward = count(partial(fused_npo_loss, *tensors, ref_logps=torch.zeros(B), **options))
    assert len(forward.names) == LOGPROBS + 6, str(forward)  # product, weights, epilogue, sum, zeros, rows of dHidden
    assert len(backward.names) == 1, str(backward)


def test_log_probabilities(batch, count):
    tensors, options = batch
    with torch.no_grad():
        forward, _ = count(partial(sequence_logprobs, *tensors, **options), backward=False)
    assert len(forward.names) == LOGPROBS + 1, str(forward)  # the sums
    assert not forward.syncs


def test_log_probabilities_under_autograd(count):
    tensors, options = make("padded")
    function = partial(lambda *args: sequence_logprobs(*args, **options)[0], *tensors)
    forward, backward = count(function)
    assert len(forward.names) == LOGPROBS + 1, str(forward)
    # coefficients, rows gathered, exponentials, and the gradients as in NPO
    assert len(backward.names) == 3 + 8, str(backward)
    assert not forward.syncs and not backward.syncs


def test_log_probabilities_of_tokens(count):
    tensors, options = make("padded")
    forward, backward = count(partial(partial(token_logprobs, **options), *tensors))
    assert len(forward.names) == LOGPROBS + 5, str(forward)  # sums, zeros, live rows, what is added of them, addition
    assert len(backward.names) == 3 + 8, str(backward)
    assert not forward.syncs and not backward.syncs


def test_what_a_graph_cannot_hold_is_found():
    found = Launches()
    t = torch.tensor([1.0, 2.0], device=DEVICE)
    with found:
        t[t > 1]
        t.nonzero()
        t.sum().item()
        torch.tensor([1.0]).view(1)
        t + t  # and what it can
    assert len(found.syncs) >= 4 and "add" in found.names, (found.syncs, str(found))
    assert "add" not in found.syncs and "view" not in found.names
