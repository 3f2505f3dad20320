"""Adapters of peers that need a GPU: what they hand to the peer's real function, and what they make of its answer.

The real function is replaced by one with its signature, which binds the call, keeps the arguments and answers as the
peer documents it, computed in float32. Nothing is launched, so these run wherever the peer can be imported.
"""

import functools
import importlib
import inspect
import os
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench.cases import HEADS, IGNORED, Case, R
from bench.providers import PROVIDERS, UnsupportedError, cce, liger, quack
from bench.suites.accuracy import error_of, evaluate, oracle

FLCE = "liger_kernel.ops.cutile.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
SCALED = "liger_kernel.ops.{}fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction"
CUTE = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
QUACK = "quack.linear_cross_entropy"
# 24 rows, some ignored: a multiple of 8, as QuACK asks
CASE = Case("ignored", HEADS["toy"], ((3, 3), (0, 6), (2, 1), (4, 2)))


@dataclass(frozen=True)
class Real:
    """A peer's function, or an autograd function that is applied; what its arguments are called; what it gives."""

    module: str
    name: str
    tensors: tuple[str, str, str]
    answers: str = "mean"  # "mean", "none", or what its argument `reduction` says
    outputs: int = 0  # of the tuple that it gives; 0: no tuple
    expected: dict = field(default_factory=dict)  # arguments with these values


LIGER_FUNCTION = Real(
    "liger_kernel.transformers.functional",
    "liger_fused_linear_cross_entropy",
    ("input", "weight", "target"),
    "reduction",
    expected={"ignore_index": IGNORED, "softcap": None, "accum_dtype": torch.float32},
)
CCE = Real(
    "cut_cross_entropy",
    "linear_cross_entropy",
    ("e", "c", "targets"),
    "reduction",
    expected={"reduction": "none", "ignore_index": IGNORED, "shift": False},
)
CHUNKED = Real(
    QUACK,
    "chunked_linear_cross_entropy",
    ("x", "weight", "target"),
    "reduction",
    expected={"ignore_index": IGNORED, "tuned": False},
)
LIGER_TENSORS = "_input", "weight", "target"
REAL = {
    "liger/flce": LIGER_FUNCTION,
    "liger/flce-none": LIGER_FUNCTION,
    "liger/flce-cute": Real(
        CUTE, "liger_fused_linear_cross_entropy_sm90", LIGER_TENSORS, "reduction", expected={"ignore_index": IGNORED}
    ),
    "liger/flce-cutile": Real(*FLCE, LIGER_TENSORS, "reduction", outputs=4, expected={"ignore_index": IGNORED}),
    "liger/scaled": Real(SCALED[0].format(""), SCALED[1], LIGER_TENSORS, "none", expected={"temperature": 1.0}),
    "liger/scaled-cutile": Real(
        SCALED[0].format("cutile.ops."), SCALED[1], LIGER_TENSORS, "none", expected={"return_entropy": False}
    ),
    "cce/default": CCE,
    "cce/exact": CCE,
    "quack/scaled-exp": CHUNKED,
    "quack/scaled-exp-whole": CHUNKED,
    "quack/base": CHUNKED,
    "quack/base-tuned": replace(CHUNKED, expected={"tuned": True}),
    "trl/chunked": Real(
        "trl.kernels",
        "ChunkedLogProbFunction",
        ("hidden", "weight", "targets"),
        "logprobs",
        outputs=5,
        expected={"bias": None, "temperature": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None},
    ),
}


def imported(module: str):
    """The module, or a skip that says what is missing."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{package} does not import: {error}")


def signature_of(real: object) -> inspect.Signature:
    """Of a function; of an autograd function as `apply` takes it, without the context."""
    if not inspect.isclass(real):
        return inspect.signature(real)
    if not issubclass(real, torch.autograd.Function):
        return inspect.signature(real.apply)
    signature = inspect.signature(real.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def answer(peer: Real, arguments: dict[str, object]) -> object:
    hidden, weight, labels = (arguments[name] for name in peer.tensors)
    logits = hidden.float() @ weight.float().t()
    nll = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    how = arguments["reduction"] if peer.answers == "reduction" else peer.answers
    if how == "mean":
        value = nll.sum() / (labels != IGNORED).sum()
    else:
        value = (-nll if how == "logprobs" else nll).view(labels.shape)
    return (value, *[None] * (peer.outputs - 1)) if peer.outputs else value


@pytest.fixture
def calls(monkeypatch):
    """Puts the stand-in where the peer's function is, and lets a CPU through; the calls made, as {argument: value}."""
    made: list[dict[str, object]] = []

    def install(peer: Real) -> list[dict[str, object]]:
        module = imported(peer.module)
        real = getattr(module, peer.name)
        signature = signature_of(real)

        def record(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            made.append(dict(bound.arguments))
            return answer(peer, made[-1])

        stand_in = SimpleNamespace(apply=record) if inspect.isclass(real) else functools.wraps(real)(record)
        monkeypatch.setattr(module, peer.name, stand_in)
        return made

    for provider in (liger, cce, quack):
        monkeypatch.setattr(provider, "on_gpu", lambda batch, name: None)
    monkeypatch.setattr(liger, "on_hopper", lambda batch, name: None)
    return install


@pytest.fixture
def eligible(monkeypatch):
    """QuACK's own word on a shape, which needs a GPU, is yes; the question is bound as well."""

    def install():
        module = imported(QUACK)
        signature = inspect.signature(module.scaled_exp_lce_supported)
        monkeypatch.setattr(module, "scaled_exp_lce_supported", lambda *a, **k: bool(signature.bind(*a, **k)))

    return install


@pytest.mark.parametrize("name", REAL)
def test_the_call_fits_the_real_function_and_the_answer_is_read_right(name, calls, eligible):
    peer, batch = REAL[name], CASE.batch(torch.bfloat16, "cpu")
    made = calls(peer)
    if peer.module == QUACK:
        eligible()
    found = evaluate(name, batch)
    arguments = made[0]
    assert peer.expected.items() <= arguments.items()
    hidden, weight, labels = (arguments[argument] for argument in peer.tensors)
    assert hidden.shape[:-1] == labels.shape and hidden.shape[-1] == weight.shape[-1] and labels.dtype == torch.int64
    assert hidden.is_contiguous() and weight.is_contiguous() and labels.is_contiguous()
    truth = oracle(batch, PROVIDERS[name].computes)
    for tensor, value in found.items():
        assert error_of(tensor, value, truth[tensor]) < 5e-3  # gradients are rounded to bfloat16


@pytest.mark.parametrize("name", REAL)
def test_a_frozen_head_asks_for_no_gradient(name, calls, eligible):
    made = calls(REAL[name])
    if REAL[name].module == QUACK:
        eligible()
    (gradient,) = PROVIDERS[name].step(CASE.batch(torch.bfloat16, "cpu", "frozen"))
    hidden, weight, _ = (made[0][argument] for argument in REAL[name].tensors)
    assert hidden.requires_grad and not weight.requires_grad and gradient.shape == (4, 6, HEADS["toy"].H)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("liger/flce", {"reduction": "mean", "chunk_mem_const": liger.CHUNK_MEMORY}),
        ("liger/flce-none", {"reduction": "none", "chunk_mem_const": liger.CHUNK_MEMORY}),
        ("cce/default", {"filter_eps": "high", "softcap": None}),
        ("cce/exact", {"filter_eps": None}),
        ("quack/scaled-exp", {"use_scaled_exp": True, "chunk_size": 4096}),
        ("quack/scaled-exp-whole", {"use_scaled_exp": True, "chunk_size": 128}),
        ("quack/base", {"use_scaled_exp": False, "chunk_size": 4096}),
        ("quack/base-tuned", {"use_scaled_exp": False, "tuned": True}),
        ("trl/chunked", {"outputs": ()}),
    ],
)
def test_settings(name, arguments, calls, eligible):
    """The options that distinguish the providers of a peer, under the names of the installed release."""
    made = calls(REAL[name])
    if REAL[name].module == QUACK:
        eligible()
    PROVIDERS[name].run(CASE.batch(torch.bfloat16, "cpu"))
    assert arguments.items() <= made[0].items()


def test_trl_has_the_tile_of_its_trainers():
    from bench.providers import trl

    assert imported("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE == trl.VOCAB_CHUNK


def test_softcap_reaches_who_has_one(calls):
    batch = CASE.batch(torch.bfloat16, "cpu")
    capped = Case("softcap", HEADS["toy-softcap"], CASE.lengths).batch(torch.bfloat16, "cpu")
    for name in ("quack/scaled-exp", "quack/base", "liger/flce-cute", "liger/flce-cutile", "liger/scaled"):
        with pytest.raises(UnsupportedError, match="has no softcap"):
            PROVIDERS[name].run(capped)
    made = calls(LIGER_FUNCTION)
    PROVIDERS["liger/flce"].run(capped)
    PROVIDERS["liger/flce"].run(batch)
    assert [call["softcap"] for call in made] == [30.0, None]


def test_on_hopper_scaled_cross_entropy_is_the_cute_kernel_and_does_not_wait_for_labels(monkeypatch):
    frontend = imported(SCALED[0].format(""))
    cute = imported("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    function = cute.LigerFusedScaledCrossEntropySM90Function
    signature, seen = signature_of(function), []

    def record(*args):
        seen.append((signature.bind(*args).arguments, cute._validate_targets_enabled()))
        return args[0].float().sum(1)

    monkeypatch.setattr(frontend, "_resolve_implementation", lambda device: SimpleNamespace(apply=record))
    PROVIDERS["liger/scaled"].step(CASE.batch(torch.bfloat16, "cpu", "frozen"))
    [(arguments, waits)] = seen
    assert arguments["ignore_index"] == IGNORED and arguments["return_entropy"] is False and not waits
    assert cute.VALIDATE_TARGETS_ENV not in os.environ


def test_shape_r_is_one_that_the_kernels_of_hopper_take():
    forward = imported("liger_kernel.ops.cutedsl.ops._fused_linear_cross_entropy_forward_sm90")
    assert R.N % forward.TILE_M == 0 and R.head.V % forward.TILE_N == 0


def test_shape_r_is_one_that_quack_takes():
    tile = imported(QUACK)._pick_tile_n1(R.head.V)
    assert R.head.V % tile == 0 and R.head.V % quack.ROW_TILE == 0 and R.N % quack.CHUNK == 0


def test_quack_does_not_take_as_many_rows_as_hidden_units():
    """What `chunk_rows` goes round. A release where this fails to raise needs it no more."""
    infer = importlib.import_module(imported("quack").__name__ + ".epilogue.frontend")._infer_kind
    vector = torch.empty(1, quack.CHUNK)
    assert infer("v", vector, quack.CHUNK, 2048) == "col"
    with pytest.raises(ValueError, match="ambiguous"):
        infer("v", vector, quack.CHUNK, quack.CHUNK)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("hidden_size", [576, 2048, 4096, 8192])
@pytest.mark.parametrize("rows", [300, 2048, 4096, 6144, 8192, 12200, 65536])
def test_no_chunk_of_quack_has_as_many_rows_as_hidden_units(rows, hidden_size, whole):
    chunk = quack.chunk_rows(rows, hidden_size, whole)
    sizes = {quack.padded(min(chunk, rows - start)) for start in range(0, rows, chunk)}
    assert chunk % quack.ROW_TILE == 0 and hidden_size not in sizes


def test_what_a_peer_does_not_take_is_unsupported(calls):
    """QuACK's own answer to rows that are no multiple of 8 is a failed assertion, CCE's to float32 another."""
    imported(QUACK)
    calls(CHUNKED)
    ragged = Case("ragged", HEADS["toy"], ((0, 7),)).batch(torch.bfloat16, "cpu")
    with pytest.raises(UnsupportedError, match="multiples of 8"):
        PROVIDERS["quack/base"].run(ragged)
    with pytest.raises(UnsupportedError, match="on Hopper"):  # the real function, of a CPU
        PROVIDERS["quack/scaled-exp"].run(ragged)


def test_cut_cross_entropy_is_not_asked_for_gradients_in_float32(monkeypatch):
    monkeypatch.setattr(cce, "on_gpu", lambda *_: None)
    imported("cut_cross_entropy")
    with pytest.raises(UnsupportedError, match="16 bits"):
        PROVIDERS["cce/exact"].run(CASE.batch(torch.float32, "cpu"))
