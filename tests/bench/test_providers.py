"""Providers: those that run here agree with float64 on what they say they compute, and the others say why not."""

import sys

import pytest
import torch

from bench import measure
from bench.cases import HEADS, Case, even
from bench.measure import Failure, interleaved
from bench.objectives import BETA, OBJECTIVES
from bench.options import Options
from bench.providers import PROVIDERS, Provider, UnsupportedError, cce, liger, quack
from bench.suites.accuracy import error_of, evaluate, oracle

HERE = ("npo_kernels/torch", "npo_kernels/torch/256MiB", "plain/eager", "torch/linear_ce", "torch/linear_ce-none")
CASES = {
    "even": even("even", HEADS["toy"], N=48, B=4),
    "ignored": Case("ignored", HEADS["toy"], ((3, 5), (0, 9), (2, 1), (4, 4))),
    "retain": Case("retain", HEADS["toy"], ((3, 5), (0, 9), (2, 1), (4, 4)), retain=2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", HERE)
def test_agrees_with_float64(name, case):
    batch = CASES[case].batch(torch.float32, "cpu")
    truth = oracle(batch, PROVIDERS[name].computes)
    try:
        found = evaluate(name, batch)
    except UnsupportedError as lacking:  # depends on torch: 2.11 has no fused cross-entropy
        assert name.startswith("torch/")
        pytest.skip(str(lacking))
    assert ("logps" in found) == (PROVIDERS[name].computes == "npo")
    for tensor, value in found.items():
        assert error_of(tensor, value, truth[tensor]) < 2e-6


@pytest.mark.parametrize("name", ["npo_kernels/torch", "plain/eager"])
def test_softcap(name):
    batch = even("softcap", HEADS["toy-softcap"], N=32, B=2).batch(torch.float32, "cpu")
    truth = oracle(batch, "npo")
    assert all(error_of(tensor, value, truth[tensor]) < 2e-6 for tensor, value in evaluate(name, batch).items())


def test_frozen_takes_no_gradient_of_the_head():
    batch = CASES["even"].batch(torch.float32, "cpu", "frozen")
    assert [t.shape for t in batch.leaves] == [batch.hidden.shape]
    assert CASES["even"].batch(torch.float32, "cpu", "logprobs").leaves == []


def test_the_kinds_of_rows_are_what_they_are_called():
    """Probability of the labels: some, nearly all, nearly none."""
    from bench.suites.accuracy import float64_logps

    def mean_logp(data):
        batch = even(data, HEADS["smollm2-135m"]._replace(V=2000), 64, 4, data).batch(torch.float32, "cpu", "logprobs")
        return (float64_logps(batch).sum() / 64).item()

    assert -0.1 < mean_logp("peaked") < 0 and mean_logp("forgotten") < -30 and -15 < mean_logp("random") < -5


def test_the_reference_is_near_the_policy():
    """Sequence weights well between 0 and 2, so that the gradients of every objective have ordinary sizes."""
    batch = CASES["even"].batch(torch.float32, "cpu")
    ratio = PROVIDERS["plain/eager"].run(batch.for_mode("logprobs")) - batch.ref_logps
    assert 0.01 < (BETA * ratio).abs().mean() < 3


def test_objectives_of_equal_models():
    """Policy = reference: log-ratios are 0 and the losses known."""
    logps, tokens = torch.tensor([-3.0, -5.0, -2.0, -8.0]), torch.tensor([2, 3, 1, 4])
    expected = {
        "npo": (2 / BETA) * torch.tensor(2.0).log() + 10 / 5,
        "ce": torch.tensor(1.8),
        "dpo": torch.tensor(2.0).log(),
        "kto": torch.tensor(0.5),
    }
    for name, objective in OBJECTIVES.items():
        torch.testing.assert_close(objective(logps, tokens, logps, 2), expected[name])


@pytest.mark.parametrize("name", ["npo", "kto"])
def test_forgetting_lowers_what_is_forgotten_and_raises_what_is_retained(name):
    logps = torch.tensor([-3.0, -5.0, -2.0, -8.0], requires_grad=True)
    loss = OBJECTIVES[name](logps, torch.tensor([2, 3, 1, 4]), torch.tensor([-4.0, -4.0, -3.0, -7.0]), 2)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert (gradient[:2] > 0).all() and (gradient[2:] < 0).all()


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name.split("/")[0] in ("liger", "trl", "cce", "quack")])
def test_a_peer_that_is_absent_is_a_row_that_says_so(name, monkeypatch):
    for module in ("liger_kernel", "trl", "cut_cross_entropy", "quack"):
        monkeypatch.setitem(sys.modules, module, None)
    for module in (liger, cce, quack):
        monkeypatch.setattr(module, "on_gpu", lambda batch, name: None)
    monkeypatch.setattr(liger, "on_hopper", lambda batch, name: None)
    batch = CASES["even"].batch(torch.bfloat16, "cpu")
    outcome = interleaved([name], batch, reps=1, warmup=0)[name]
    assert isinstance(outcome, Failure) and outcome.status == "missing" and outcome.error


def test_a_peer_that_needs_a_gpu_says_so():
    names = ["quack/base", "cce/exact", "liger/flce", "liger/flce-cute", "liger/scaled-cutile"]
    for outcome in interleaved(names, CASES["even"].batch(torch.float32, "cpu"), reps=1, warmup=0).values():
        assert outcome.status == "unsupported" and "needs a GPU" in outcome.error


def test_turns_are_interleaved_and_warm_up_is_left_out(monkeypatch):
    order = []

    def fake(name, fails_at=None):
        def loss(batch):
            order.append(name)
            if order.count(name) == fails_at:
                raise RuntimeError("no more\nsecond line")
            return batch.hidden.sum() + batch.weight.sum()

        return Provider(name, "torch", "npo", True, loss)

    monkeypatch.setattr(measure, "PROVIDERS", {"a": fake("a"), "b": fake("b"), "c": fake("c", fails_at=2)})
    results = interleaved(["a", "b", "c"], CASES["even"].batch(torch.float32, "cpu"), reps=3, warmup=1)
    assert order == ["a", "b", "c", "b", "c", "a", "a", "b", "a", "b"]
    assert [len(results[name]) for name in "ab"] == [3, 3]
    assert results["c"] == Failure("failed", "RuntimeError: no more")
    assert set(results["a"][0]) == {"fwd", "bwd", "fwd_bwd"}


def test_who_loses_the_gpu_is_named_and_nobody_else_is_blamed(monkeypatch):
    """After an illegal access every call fails: those that come later are told why, and times from before stay."""
    turns, lost = [], []

    def wait(clock):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fake(name, breaks_at=None):
        def loss(batch):
            turns.append(name)
            if turns.count(name) == breaks_at:
                lost.append(name)
            return batch.hidden.sum() + batch.weight.sum()

        return Provider(name, "torch", "npo", True, loss)

    def outcomes(breaks_at):
        turns.clear(), lost.clear()
        providers = {"a": fake("a"), "b": fake("b", breaks_at), "c": fake("c")}
        monkeypatch.setattr(measure, "PROVIDERS", providers)
        return interleaved(list("abc"), CASES["even"].batch(torch.float32, "cpu"), reps=3, warmup=0)

    monkeypatch.setattr(measure.Clock, "wait", wait)
    results = outcomes(breaks_at=1)
    assert turns == ["a", "b"] and len(results["a"]) == 1
    assert results["b"] == Failure("failed", "RuntimeError: CUDA error: an illegal memory access was encountered")
    assert results["c"] == Failure("failed", "CUDA context lost after b")
    results = outcomes(breaks_at=2)
    assert turns == ["a", "b", "c", "b"] and len(results["a"]) == len(results["c"]) == 1


def test_an_error_that_was_told_late_loses_nothing(monkeypatch):
    """One that the device reports once, where it next waits, leaves it usable."""
    pending = []

    def wait(clock):
        if pending:
            raise RuntimeError(pending.pop())

    def launch(batch):
        pending.append("late")
        raise RuntimeError("too many resources requested for launch")

    providers = {"a": Provider("a", "torch", "npo", True, launch), "b": PROVIDERS["plain/eager"]}
    monkeypatch.setattr(measure, "PROVIDERS", providers)
    monkeypatch.setattr(measure.Clock, "wait", wait)
    pending.clear()
    results = interleaved(["a", "b"], CASES["even"].batch(torch.float32, "cpu"), reps=1, warmup=0)
    assert results["a"].error == "RuntimeError: too many resources requested for launch"
    assert len(results["b"]) == 1


@pytest.mark.parametrize(
    "error, status",
    [
        (ImportError("no module"), "missing"),
        (RuntimeError("driver too old"), "failed"),
        (AttributeError("module 'triton' has no attribute 'ops'"), "failed"),
        (OSError("libcutlass.so: undefined symbol"), "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_a_peer_that_does_not_import_costs_its_row(error, status, monkeypatch):
    """Whatever its import raises, a broken native library included."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "cut_cross_entropy":
                raise error

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "cut_cross_entropy", raising=False)
    monkeypatch.setattr(cce, "on_gpu", lambda *_: None)
    batch = CASES["even"].batch(torch.bfloat16, "cpu")
    results = interleaved(["cce/exact", "plain/eager"], batch, reps=1, warmup=0)
    assert results["cce/exact"].status == status and str(error) in results["cce/exact"].error
    assert len(results["plain/eager"]) == 1


def test_names_are_patterns_and_unknown_ones_are_told():
    assert Options("head", providers=("torch/*",)).provider_names == ["torch/linear_ce", "torch/linear_ce-none"]
    assert "npo_kernels/triton" in Options("head", device="cuda").provider_names
    assert "npo_kernels/triton" not in Options("head").provider_names
    with pytest.raises(ValueError, match="unknown provider 'ligr'"):
        Options("head", providers=("ligr",)).provider_names  # noqa: B018


def test_a_killed_process_is_a_failure():
    from bench.isolate import take_turns

    (outcome,) = take_turns([Doomed()]).values()
    assert outcome == Failure("failed", "ended with 3")


class Doomed:
    device, threads, warmup, reps, whole, limit, patience = "cpu", 1, 0, 1, False, 20.0, 0.0

    def prepare(self):
        import os

        os._exit(3)
