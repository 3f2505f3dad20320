"""Every bad input of the contract, and that its message has the value received, the value expected and what to do."""

import functools
import math

import pytest
import torch

from npo_kernels import (
    fused_logprob_loss,
    fused_npo_loss,
    fused_simnpo_loss,
    sequence_logprobs,
    token_logprobs,
)
from npo_kernels.core import value_checks
from tests.support import IMPLS, make_batch

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

B, S, H, V = 2, 5, 8, 20
FUNCTIONS = {
    "fused_npo_loss": fused_npo_loss,
    "fused_simnpo_loss": fused_simnpo_loss,
    "fused_logprob_loss": functools.partial(fused_logprob_loss, loss_fn=lambda logps, num_tokens: logps.sum()),
    "sequence_logprobs": sequence_logprobs,
    "token_logprobs": token_logprobs,
}


def padded(**change):
    arguments = {
        "hidden": torch.zeros(B, S, H),
        "lm_head_weight": torch.zeros(V, H),
        "labels": torch.ones(B, S, dtype=torch.int64),
        "ref_logps": torch.zeros(B),
    }
    return arguments | change


def packed(**change):
    arguments = {
        "hidden": torch.zeros(B * S, H),
        "lm_head_weight": torch.zeros(V, H),
        "labels": torch.ones(B * S, dtype=torch.int64),
        "cu_seqlens": torch.tensor([0, S, B * S], dtype=torch.int32),
        "ref_logps": torch.zeros(B),
    }
    return arguments | change


def call(name, arguments):
    arguments = dict(arguments)
    if name != "fused_npo_loss":
        arguments.pop("ref_logps")
    return FUNCTIONS[name](**arguments)


# name of the case -> (arguments, error, message)
SHARED = {
    # types
    "hidden is a list": (padded(hidden=[[0.0]]), TypeError, r"hidden: expected a torch.Tensor, got list \[\[0.0\]\]"),
    "weight is None": (padded(lm_head_weight=None), TypeError, "lm_head_weight: expected a torch.Tensor, got NoneType"),
    "labels are a list": (padded(labels=[1]), TypeError, "labels: expected a torch.Tensor"),
    "bias is a number": (padded(bias=0.0), TypeError, "bias: expected a torch.Tensor, got float"),
    "cu_seqlens is a list": (packed(cu_seqlens=[0, 5, 10]), TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
    "hidden is a long list": (
        padded(hidden=torch.randn(50, 50).tolist()),
        TypeError,
        r"^hidden: expected a torch.Tensor, got list .{0,60}$",
    ),
    "sparse hidden": (
        padded(hidden=torch.zeros(B, S, H).to_sparse()),
        TypeError,
        r"hidden: expected a dense.*to_dense",
    ),
    "sparse weight": (
        padded(lm_head_weight=torch.zeros(V, H).to_sparse_csr()),
        TypeError,
        "lm_head_weight: expected a",
    ),
    "hidden on meta": (
        padded(hidden=torch.zeros(B, S, H, device="meta")),
        ValueError,
        r"hidden: expected a tensor with values, got \(2, 5, 8\) float32 on meta",
    ),
    # dtypes
    "float64": (
        padded(hidden=torch.zeros(B, S, H).double()),
        TypeError,
        r"hidden: expected float32, bfloat16 or float16, got \(2, 5, 8\) float64 .*float64 is for impl='reference'",
    ),
    "integer hidden": (padded(hidden=torch.zeros(B, S, H).long()), TypeError, "expected float32, bfloat16 or float16"),
    "two dtypes": (
        padded(hidden=torch.zeros(B, S, H).bfloat16()),
        TypeError,
        r"lm_head_weight is \(20, 8\) float32.* but hidden is \(2, 5, 8\) bfloat16.*autocast",
    ),
    "int32 labels": (padded(labels=torch.ones(B, S).int()), TypeError, r"labels: expected int64.*labels.long\(\)"),
    "float cu_seqlens": (
        packed(cu_seqlens=torch.tensor([0.0, 5, 10])),
        TypeError,
        r"expected int32.*cu_seqlens.int\(\)",
    ),
    "bias of another dtype": (padded(bias=torch.zeros(V).half()), ValueError, r"bias: expected \(20,\) float32"),
    # ranks and shapes
    "hidden without sequences": (padded(hidden=torch.zeros(S, H)), ValueError, r"padded batch \(B, S, H\).*cu_seqlens"),
    "packed with a batch dimension": (
        packed(hidden=torch.zeros(1, B * S, H), labels=torch.ones(1, B * S).long()),
        ValueError,
        r"packed batch \(T, H\).*drop the batch dimension",
    ),
    "weight of rank 1": (padded(lm_head_weight=torch.zeros(V)), ValueError, r"lm_head_weight: expected \(V, H\)"),
    "empty weight": (padded(lm_head_weight=torch.zeros(0, H)), ValueError, "is empty.*ZeRO-3"),
    "two hidden sizes": (
        padded(hidden=torch.zeros(B, S, H + 1)),
        ValueError,
        r"disagree on H: expected hidden \(\.\.\., 8\)",
    ),
    "labels of another length": (
        padded(labels=torch.ones(B, S - 1).long()),
        ValueError,
        r"labels: expected the shape \(2, 5\) of hidden, got \(2, 4\)",
    ),
    "bias of another size": (
        padded(bias=torch.zeros(V + 1)),
        ValueError,
        r"bias: expected \(20,\) float32.*got \(21,\)",
    ),
    "cu_seqlens of rank 2": (packed(cu_seqlens=torch.zeros(B, S).int()), ValueError, r"expected \(B\+1,\) cumulative"),
    "empty cu_seqlens": (packed(cu_seqlens=torch.zeros(0).int()), ValueError, r"expected \(B\+1,\) cumulative"),
    # devices
    "weight elsewhere": (
        padded(lm_head_weight=torch.zeros(V, H, device="meta")),
        ValueError,
        "lm_head_weight is on meta but hidden is on cpu: move them",
    ),
    "labels elsewhere": (
        padded(labels=torch.ones(B, S, dtype=torch.int64, device="meta")),
        ValueError,
        "labels is on meta",
    ),
    "bias elsewhere": (padded(bias=torch.zeros(V, device="meta")), ValueError, "bias is on meta"),
    "cu_seqlens elsewhere": (
        packed(cu_seqlens=torch.zeros(3, dtype=torch.int32, device="meta")),
        ValueError,
        "cu_seqlens is on meta",
    ),
    # values that are free to read on the CPU
    "label V": (padded(labels=torch.full((B, S), V)), ValueError, r"labels: 8 outside \[0, 20\), the first is 20"),
    "label -1": (padded(labels=torch.full((B, S), -1)), ValueError, r"the first is -1; .*ignore_index=-100"),
    "cu_seqlens from 1": (packed(cu_seqlens=torch.tensor([1, 5, 10])), ValueError, r"from 0 to T=10, got \[1, 5, 10\]"),
    "cu_seqlens too short": (
        packed(cu_seqlens=torch.tensor([0, 5, 9])),
        ValueError,
        r"from 0 to T=10, got \[0, 5, 9\]",
    ),
    "cu_seqlens too long": (
        packed(cu_seqlens=torch.tensor([0, 5, 11])),
        ValueError,
        r"from 0 to T=10, got \[0, 5, 11\]",
    ),
    "cu_seqlens falling": (
        packed(cu_seqlens=torch.tensor([0, 7, 5, 10]), ref_logps=torch.zeros(3)),
        ValueError,
        "expected a non-decreasing sequence",
    ),
    "too few rows": (padded(num_rows=7), ValueError, "num_rows=7 but 8 positions are scored"),
    # numbers
    "logit_scale 0": (padded(logit_scale=0.0), ValueError, "logit_scale: expected a finite non-zero number, got 0.0"),
    "logit_scale inf": (padded(logit_scale=math.inf), ValueError, "logit_scale"),
    "logit_scale a tensor": (padded(logit_scale=torch.tensor(1.0)), ValueError, "logit_scale"),
    "softcap 0": (padded(softcap=0), ValueError, "softcap: expected a positive number or None, got 0"),
    "softcap negative": (padded(softcap=-30.0), ValueError, "softcap"),
    "softcap NaN": (padded(softcap=math.nan), ValueError, "softcap"),
    "workspace 0": (
        padded(workspace_mb=0),
        ValueError,
        "workspace_mb: expected a positive number of MiB or None, got 0",
    ),
    "workspace a string": (padded(workspace_mb="256"), ValueError, "workspace_mb"),
    "num_rows negative": (padded(num_rows=-1), ValueError, "num_rows: expected the number of scored positions"),
    "num_rows a float": (padded(num_rows=8.0), ValueError, "num_rows"),
    "workspace infinite": (
        padded(workspace_mb=math.inf),
        ValueError,
        "workspace_mb: expected a positive number of MiB",
    ),
    "num_rows a bool": (padded(num_rows=True), ValueError, "num_rows: expected the number of scored positions"),
    "num_rows too large": (padded(num_rows=2**70), ValueError, "num_rows"),
    "ignore_index a bool": (padded(ignore_index=True), TypeError, "ignore_index: expected an int, got True"),
    "ignore_index too large": (padded(ignore_index=2**70), ValueError, "ignore_index: .*int64 labels can hold"),
    "shift a string": (padded(shift="no"), TypeError, "shift: expected True or False, got 'no'"),
    "shift a number": (padded(shift=2), TypeError, "shift: expected True or False, got 2"),
    "process_group a name": (padded(process_group="tp"), TypeError, "process_group: .*ProcessGroup or None, got 'tp'"),
    "ignore_index a float": (padded(ignore_index=-100.0), TypeError, "ignore_index: expected an int, got -100.0"),
    # names
    "impl": (padded(impl="cuda"), ValueError, "impl: expected one of .*'reference'.*, got 'cuda'"),
    "unknown keyword": (
        padded(betta=0.1),
        TypeError,
        r"unexpected keyword argument 'betta': did you mean 'beta'\? .* help\(npo_kernels\.",
    ),
    "attention_mask": (
        packed(attention_mask=torch.ones(B * S)),
        TypeError,
        "'attention_mask': mask positions by setting their label to ignore_index .*cu_seqlens alone",
    ),
    "shift_labels": (padded(shift_labels=None), TypeError, "pass them as labels with shift=False"),
    "temperature": (padded(temperature=2.0), TypeError, "use logit_scale=1/temperature"),
}


@pytest.mark.parametrize("what", SHARED)
def test_an_error_says_what_to_do(what):
    """For one function; `tests/test_illegal_calls.py` checks that all functions refuse it."""
    arguments, error, message = SHARED[what]
    with pytest.raises(error, match=message):
        call("fused_npo_loss", arguments)


def test_the_arguments_that_these_tests_spoil_are_good():
    for name in FUNCTIONS:
        for arguments in (
            padded(),
            packed(),
            padded(num_rows=8),
            padded(bias=torch.zeros(V), softcap=30, logit_scale=2),
        ):
            result = call(name, arguments)
            assert all(part.isfinite().all() for part in (result if isinstance(result, tuple) else (result,)))


REF_LOGPS = {
    "a list": ([0.0, 0.0], TypeError, "ref_logps: expected a torch.Tensor, got list"),
    "bfloat16": (torch.zeros(B).bfloat16(), TypeError, r"expected float32, got \(2,\) bfloat16.*off by several nats"),
    "float16": (torch.zeros(B).half(), TypeError, "expected float32, got .* float16"),
    "integers": (torch.zeros(B).long(), TypeError, "expected float32"),
    "another B": (torch.zeros(B + 1), ValueError, r"one per sequence, \(2,\), got \(3,\)"),
    "one per token": (torch.zeros(B, S), ValueError, r"got \(2, 5\).*summed log-probability of each sequence"),
    "0-d": (torch.tensor(0.0), ValueError, "one per sequence"),
    "elsewhere": (torch.zeros(B, device="meta"), ValueError, "ref_logps is on meta but hidden is on cpu"),
}


@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize("what", REF_LOGPS)
def test_bad_ref_logps_are_refused(what, layout):
    ref_logps, error, message = REF_LOGPS[what]
    with pytest.raises(error, match=message):
        fused_npo_loss(**layout(ref_logps=ref_logps))


def test_ref_logps_have_no_default():
    arguments = padded()
    del arguments["ref_logps"]
    with pytest.raises(TypeError, match="ref_logps"):
        fused_npo_loss(**arguments)


LOSS_OPTIONS = {
    "beta 0": ({"beta": 0.0}, "beta: expected a positive number, got 0.0"),
    "beta negative": ({"beta": -0.1}, "beta"),
    "beta infinite": ({"beta": math.inf}, "beta"),
    "beta NaN": ({"beta": math.nan}, "beta"),
    "beta a tensor": ({"beta": torch.tensor(0.1)}, "beta"),
    "beta a bool": ({"beta": True}, "beta"),
    "reduction": ({"reduction": "batchmean"}, "reduction: expected one of .*, got 'batchmean'"),
    "normalizer 0": ({"normalizer": 0}, "normalizer: expected a positive number or a 0-d tensor, got 0"),
    "normalizer negative": ({"normalizer": -2.0}, "normalizer"),
    "normalizer a vector": (
        {"normalizer": torch.ones(B)},
        r"normalizer: expected a positive number or a 0-d tensor, got \(2,\)",
    ),
    "normalizer a bool tensor": ({"normalizer": torch.tensor(True)}, "normalizer: .*got .* bool"),
    "normalizer complex": ({"normalizer": torch.tensor(2j)}, "normalizer: .*got .* complex64"),
    "normalizer on meta": ({"normalizer": torch.ones((), device="meta")}, "normalizer: .*with values"),
    "normalizer a negative tensor": ({"normalizer": torch.tensor(-2.0)}, "normalizer: .*got a tensor of -2.0"),
    "normalizer a NaN tensor": ({"normalizer": torch.tensor(math.nan)}, "normalizer: .*got a tensor of nan"),
    "normalizer an infinite tensor": ({"normalizer": torch.tensor(math.inf)}, "normalizer: .*got a tensor of inf"),
    "normalizer of a sum": (
        {"normalizer": 2, "reduction": "sum"},
        "replaces the count of reduction='mean', got .*'sum'",
    ),
}


@pytest.mark.parametrize("what", LOSS_OPTIONS)
def test_losses_refuse(what):
    options, message = LOSS_OPTIONS[what]
    with pytest.raises(ValueError, match=message):
        call("fused_npo_loss", padded(**options))


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_reference_that_is_not_finite_is_refused(value, reduction, impl):
    ref_logps = torch.tensor([0.0, value])
    with pytest.raises(ValueError, match=r"ref_logps: expected finite log-probabilities, got .+ at sequence 1"):
        fused_npo_loss(**padded(ref_logps=ref_logps, reduction=reduction, impl=impl))


LOSS_FN = {
    "nothing": (None, "expected a function .*got None"),
    "a name": ("npo", "expected a function .*got 'npo'"),
    "one argument": (lambda logps: logps.sum(), "2 positional arguments.*too many"),
    "three arguments": (lambda logps, num_tokens, beta: logps.sum(), "functools.partial.*|missing a required"),
}


@pytest.mark.parametrize("what", LOSS_FN)
def test_loss_fn_is_a_function_of_two_arguments(what):
    loss_fn, message = LOSS_FN[what]
    with pytest.raises(TypeError, match=message):
        call("fused_logprob_loss", padded(loss_fn=loss_fn))


def test_a_dtensor_is_refused_with_the_way_out():
    dtensor = type("DTensor", (torch.Tensor,), {})
    with pytest.raises(
        TypeError, match="lm_head_weight is a DTensor: call the loss inside the wrapped model's forward"
    ):
        call("sequence_logprobs", padded(lm_head_weight=torch.zeros(V, H).as_subclass(dtensor)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_reference_takes_float64_and_double_ref_logps(dtype):
    arguments = padded(hidden=torch.zeros(B, S, H, dtype=dtype), lm_head_weight=torch.zeros(V, H, dtype=dtype))
    loss = fused_npo_loss(**arguments | {"ref_logps": torch.zeros(B).double(), "impl": "reference"})
    assert loss.isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# Where values are not read: NaN, which cannot be overlooked
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def values_unread(monkeypatch):
    """As on a GPU, where reading labels would wait for the device."""
    monkeypatch.setattr(value_checks, "readable", lambda tensor: False)


BROKEN = {
    "a label beyond the vocabulary": {"label": V},
    "a negative label": {"label": -7},
    "cu_seqlens from 1": {"cu_seqlens": [1, 6, 12]},
    "cu_seqlens too short": {"cu_seqlens": [0, 6, 11]},
    "cu_seqlens falling": {"cu_seqlens": [0, 9, 3, 12]},
    "too few rows": {"num_rows": 4},
}


@pytest.mark.usefixtures("values_unread")
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids="+".join)
@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_checked_poisons_the_loss(impl, what, needs):
    batch = make_batch(layout="packed", lengths=(6, 6), prompts=(0, 0), H=H, V=V).leaves(needs)
    broken = BROKEN[what]
    if "label" in broken:
        batch.labels[3] = broken["label"]
    ref_logps, num_rows, cu_seqlens = batch.ref_logps, broken.get("num_rows"), batch.cu_seqlens
    if "cu_seqlens" in broken:
        # without num_rows the row count is read from the device, and with it whether the sequences make sense
        cu_seqlens, num_rows = torch.tensor(broken["cu_seqlens"]), 10
        ref_logps = torch.zeros(len(cu_seqlens) - 1)
    loss = batch(fused_npo_loss, ref_logps=ref_logps, cu_seqlens=cu_seqlens, impl=impl, num_rows=num_rows)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, batch.hidden)
    assert grad.isnan().any()


WRONG_FACTORS = {
    "a negative normalizer": {"normalizer": torch.tensor(-2.0)},
    "a normalizer of 0": {"normalizer": torch.tensor(0)},
    "an infinite normalizer": {"normalizer": torch.tensor(math.inf)},
    "a NaN normalizer": {"normalizer": torch.tensor(math.nan)},
    "an infinite reference": {"ref_logps": torch.tensor([-3.0, math.inf])},
}


@pytest.mark.usefixtures("values_unread")
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids="+".join)
@pytest.mark.parametrize("what", WRONG_FACTORS)
@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_a_factor_that_is_not_checked_poisons_the_loss(impl, what, needs):
    """NaN is visible in a log; a loss of 0 would hide gradients that destroy the weights."""
    batch = make_batch(lengths=(6, 6), prompts=(0, 0), H=H, V=V).leaves(needs)
    loss = batch(fused_npo_loss, impl=impl, **{"ref_logps": batch.ref_logps, **WRONG_FACTORS[what]})
    assert loss.isnan()


@pytest.mark.usefixtures("values_unread")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_wrong_label_poisons_its_own_sequence_alone(impl):
    batch = make_batch(lengths=(6, 6, 4), prompts=(0, 0, 0), H=H, V=V)
    batch.labels[1, 3] = V + 1
    logps, num_tokens = batch(sequence_logprobs, impl=impl)
    assert logps.isnan().tolist() == [False, True, False]
    assert num_tokens.tolist() == [5, 5, 3]
    assert batch(token_logprobs, impl=impl).isnan().nonzero().tolist() == [[1, 2]]


def test_debug_reads_values_on_any_device():
    """A meta tensor takes the place of a GPU tensor: its values cannot be read."""
    labels, offsets = torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    batch = labels, offsets, False, V, -100, None
    value_checks.check_values(*batch)
    value_checks.set_debug(True)
    try:
        with pytest.raises(Exception, match="meta"):
            value_checks.check_values(*batch)
    finally:
        value_checks.set_debug(False)
