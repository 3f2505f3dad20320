"""`python -m bench certify`: what it does when a unit hangs, raises or crashes, and what becomes of the time."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bench import provenance
from bench.__main__ import main
from bench.cases import HEADS, Case
from bench.certify import report, runner, schedule, specializations
from bench.certify.command import exit_code
from bench.certify.journal import BROKEN, CRASHED, FAILED, MISSING, NOT_MEASURED, PASSED, TIMED_OUT, Journal
from bench.certify.schedule import BUDGETS, RESERVE, STAGES, Stage, allotment, chosen
from bench.certify.specializations import Compiled, Compilers, Specialization
from bench.certify.stages import checks, head, peers, sanitizer
from bench.certify.stages import compile as compile_stage
from bench.certify.tests import run_tests
from bench.certify.unit import Context, Unit
from bench.providers import UnsupportedError
from bench.records import read_lines, record, summary
from bench.timeline import Span, Timeline, ordered
from npo_kernels import explain, fused_npo_loss

ROOT = Path(__file__).parents[2]


def seconds(number: float):
    return lambda context: time.sleep(number)


def fail(context):
    raise ValueError("no good\nsecond line")


def lacking(context):
    raise UnsupportedError("nothing to run it on")


class Rigged(Stage):
    """A stage whose units are given."""

    rigged: ClassVar[dict[str, list[Unit]]] = {}

    def units(self, context: Context) -> list[Unit]:
        found = self.rigged[self.name]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def certify(tmp_path, monkeypatch):
    """Runs stages, given as name -> units; returns (name -> outcomes, the journal, the stages, what was said)."""

    def run(budget: float = 60.0, least: float = 0.0, **units):
        monkeypatch.setattr(Rigged, "rigged", units)
        stages = [Rigged(name, f"what {name} does", 1.0, least) for name in units]
        journal, said = Journal(tmp_path / "journal.jsonl"), []
        context = Context(tmp_path, toy=True, deadline=time.monotonic() + budget)
        runner.run(stages, context, journal, said.append, lambda: report.write(tmp_path, stages, journal))
        return {stage.name: journal.outcomes(stage.name) for stage in stages}, journal, stages, said

    return run


def statuses(outcomes):
    return [outcome.status for outcome in outcomes]


def test_a_unit_that_raises_costs_itself_alone(certify):
    units = [Unit("a", seconds(0), 1), Unit("b", fail, 1), Unit("c", lacking, 1), Unit("d", seconds(0), 1)]
    outcomes, journal, stages, _ = certify(one=units)
    assert statuses(outcomes["one"]) == [PASSED, FAILED, MISSING, PASSED]
    assert [o.detail for o in outcomes["one"]] == ["", "ValueError: no good", "nothing to run it on", ""]
    assert exit_code(stages, journal) == 1


def test_a_crash_a_hang_and_an_exit_cost_the_unit_and_the_next_goes_on_in_a_new_process(certify, tmp_path):
    units = [
        Unit("a", lambda context: str(os.getpid()), 1),
        Unit("crash", lambda context: os.abort(), 1),
        Unit("b", lambda context: str(os.getpid()), 1),
        Unit("hang", seconds(600), 1, limit=1),
        Unit("exit", lambda context: os._exit(7), 1),
        Unit("c", lambda context: str(os.getpid()), 1),
    ]
    outcomes, *_ = certify(one=units, two=[Unit("d", seconds(0), 1)])
    assert statuses(outcomes["one"]) == [PASSED, CRASHED, PASSED, TIMED_OUT, CRASHED, PASSED]
    a, crash, b, hang, exited, c = outcomes["one"]
    assert crash.detail == "killed by SIGABRT" and exited.detail == "ended with exit code 7"
    assert 1 <= hang.seconds < 3
    assert len({a.detail, b.detail, c.detail}) == 3 and str(os.getpid()) not in (a.detail, b.detail, c.detail)
    assert statuses(outcomes["two"]) == [PASSED]
    assert "Fatal Python error: Aborted" in (tmp_path / "log.txt").read_text()  # where it crashed


def test_tests_are_units_and_a_skip_is_no_pass(certify, tmp_path):
    for name, body in {"good": "pass", "bad": "assert 1 == 2", "absent": "pytest.skip('no GPU')"}.items():
        (tmp_path / f"test_{name}.py").write_text(f"import pytest\n\ndef test_it():\n    {body}\n")
    paths = {name: str(tmp_path / f"test_{name}.py") for name in ("good", "bad", "absent")}
    units = [Unit(name, partial(run_tests, arguments=["-c", os.devnull, path]), 1) for name, path in paths.items()]
    outcomes, journal, stages, _ = certify(one=units)
    assert [(o.status, o.detail) for o in outcomes["one"]] == [
        (PASSED, "1 passed"),
        (FAILED, "AssertionError: 1 failed: test_it"),
        (MISSING, "1 skipped"),
    ]
    assert [(e["name"].rpartition("/")[2], e["outcome"]) for e in journal.events("test")] == [
        ("test_good.py::test_it", "passed"), ("test_bad.py::test_it", "failed"), ("test_absent.py::test_it", "skipped"),
    ]  # fmt: skip
    assert report.failed_tests(journal)[0].endswith("test_bad.py::test_it") and exit_code(stages, journal) == 1


def test_what_a_stage_started_dies_with_it(certify, tmp_path):
    started = tmp_path / "started"

    def leave_a_process_behind(context):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        started.write_text(str(child.pid))
        time.sleep(600)

    certify(one=[Unit("hang", leave_a_process_behind, 1, limit=2)])
    state = Path(f"/proc/{started.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_stage_that_cannot_begin_says_why_and_the_next_one_runs(certify):
    outcomes, *_ = certify(one=ImportError("no such thing"), two=[Unit("a", seconds(0), 1)])
    assert [(o.unit, o.status) for o in outcomes["one"]] == [(runner.START, CRASHED)]
    assert statuses(outcomes["two"]) == [PASSED]


def test_a_stage_ends_with_its_time_and_what_it_did_not_reach_is_not_measured(certify):
    units = [Unit("a", seconds(0), 1), Unit("long", seconds(600), 1), Unit("b", seconds(0), 1)]
    start = time.monotonic()
    outcomes, journal, stages, _ = certify(budget=4, one=units, two=[Unit("c", seconds(0), 1)])
    assert time.monotonic() - start < 8
    assert statuses(outcomes["one"]) == [PASSED, NOT_MEASURED, NOT_MEASURED]
    assert "for want of time" in outcomes["one"][1].detail
    assert statuses(outcomes["two"]) == [PASSED] and exit_code(stages, journal) == 0


def test_a_stage_without_enough_time_is_not_begun(certify):
    outcomes, journal, stages, said = certify(budget=4, least=30, one=[Unit("a", seconds(0), 1)])
    assert statuses(outcomes["one"]) == [NOT_MEASURED] and "at least 30 s" in outcomes["one"][0].detail
    assert exit_code(stages, journal) == 2 and NOT_MEASURED in said[0]


def test_what_a_stage_does_not_use_goes_to_the_later_ones(certify):
    *_, said = certify(budget=30, one=[Unit("a", seconds(0), 1)], two=[Unit("b", seconds(0), 1)])
    assert "of 15 s" in said[0] and int(said[1].rpartition(" of ")[2].split()[0]) >= 25


def test_a_result_is_on_the_disk_before_the_crash(certify, tmp_path):
    def measure_and_die(context):
        fields = {"suite": "head", "case": "a", "provider": "b", "computes": "npo", "exact": True, "metric": "ms"}
        context.emit([record("cpu", **fields, **summary([1.0]))])
        os.abort()

    outcomes, *_ = certify(one=[Unit("a", measure_and_die, 1)])
    assert [r["value"] for r in read_lines(tmp_path / "records.jsonl")] == [1.0]
    assert statuses(outcomes["one"]) == [CRASHED] and "| b | npo | 1 |" in (tmp_path / "report.md").read_text()


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.planned("one", ["a", "b"])
    journal.begin("one", "a", 5)
    journal.end("one", "a", PASSED, 1.0)
    journal.begin("one", "b", 5)
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert statuses(journal.outcomes("one")) == [PASSED, NOT_MEASURED] and journal.running("one") is None
    path.write_text(whole)
    assert journal.running("one").unit == "b"


def test_a_unit_leaves_time_to_those_behind_it():
    unit = Unit("try", seconds(0), seconds=2, limit=60, reserve=30)
    found = [unit.kill_after(left) for left in (200, 90, 50, 31)]
    assert found == [(60, True), (60, True), (20, False), (2, False)]  # only a unit of 60 seconds hangs
    assert Unit("other", seconds(0), seconds=10).kill_after(left=1000) == (50, True)


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_is_divided_whole_and_every_stage_gets_enough_to_begin(budget):
    seconds = allotment(STAGES, budget - RESERVE)
    assert sum(seconds.values()) == pytest.approx(budget - RESERVE)
    context = Context(Path(), toy=False, deadline=0)
    for stage in STAGES:
        assert seconds[stage.name] >= stage.least
        assert schedule._begun(stage.units(context), seconds[stage.name]) >= 1, stage.name


def test_the_plan_shows_both_budgets(capsys):
    assert main(["certify", "--plan"]) == 0
    printed = capsys.readouterr().out
    assert all(f"of {budget:.0f} s" in printed for budget in BUDGETS)
    assert all(f"| {stage.name} |" in printed for stage in STAGES)


def test_stages_are_chosen_by_name():
    assert [stage.name for stage in chosen(["suite", "head"], [])] == ["head", "suite"]
    assert "tune" not in [stage.name for stage in chosen([], ["tune"])]
    with pytest.raises(ValueError, match="no stage is called 'heads'"):
        chosen(["heads"], [])


def test_every_claim_is_a_test():
    """pytest finds each by the name that the stage has for it."""
    wanted = [f"tests/gpu/{test}" for test, _ in checks.CLAIMS.values()]
    wanted += [test for tests in checks.by_mode().values() for test in tests]
    wanted += [*sanitizer.modes(), *(f"tests/gpu/{test}" for test in sanitizer.OPERATORS)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *wanted]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("code", "printed", "found"),
    [
        (0, ".. \n2 passed, 1 warning in 3.20s\n========= ERROR SUMMARY: 0 errors\n", "2 passed, 1 warning"),
        (9, "========= Invalid __global__ read of size 2 bytes\n=========  at kl_logits_kernel+0x10\n"
            "2 passed in 3.20s\n========= ERROR SUMMARY: 1 error\n",
         AssertionError("Invalid __global__ read of size 2 bytes; ERROR SUMMARY: 1 error")),
        (1, "1 failed, 1 passed in 3.20s\n", AssertionError("1 failed, 1 passed, ended with 1: see log.txt")),
        (255, "========= Error: No attachable process found\n",
         AssertionError("no test ran, ended with 255: see log.txt")),
        (0, "2 skipped in 0.10s\n", UnsupportedError("2 skipped")),
    ],
)  # fmt: skip
def test_what_the_sanitizer_found_fails_its_unit(code, printed, found):
    if isinstance(found, str):
        assert sanitizer.verdict(code, printed) == found
    else:
        with pytest.raises(type(found)) as raised:
            sanitizer.verdict(code, printed)
        assert str(raised.value) == str(found)


def test_the_sanitizer_is_looked_for_and_runs_the_tests(certify, tmp_path, monkeypatch):
    """One that passes on what it is given, after its own options; and none at all."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(sanitizer, "TOOLKIT", str(tmp_path))
    units = [Unit("memcheck", partial(sanitizer.check, tests=["nothing"]), 1)]
    outcomes, *_ = certify(absent=units)
    assert [(o.status, o.detail) for o in outcomes["absent"]] == [(MISSING, "compute-sanitizer is not installed")]
    stand_in = tmp_path / "cuda" / "bin" / sanitizer.PROGRAM
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/bin/sh\necho "7 passed in $PYTORCH_NO_CUDA_MEMORY_CACHING s: $*"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    context = Context(tmp_path, toy=True, deadline=0)
    assert sanitizer.check(context, ["tests/gpu"]) == "7 passed"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "found", "why"),
    [
        (["--out", "OUT"], "abc1234-dirty", "commit them first, or say --allow_dirty"),
        (["--out", "OUT"], "unknown", "no commit can be named"),
        ([], "abc1234", "--out DIR is needed"),
        (["--out", "OUT", "--only", "everything"], "abc1234", "no stage is called"),
        (["--out", "OUT"], "abc1234", "there is no GPU here"),
    ],
)
def test_what_cannot_be_certified_is_refused(arguments, found, why, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(provenance.VARIABLE, raising=False)
    monkeypatch.setattr(provenance, "_described", lambda: found)
    monkeypatch.setattr("torch.cuda.is_available", lambda: "GPU" not in why)
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    assert main(["certify", *arguments]) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_results_of_an_earlier_run_are_not_written_over(tmp_path, capsys):
    Journal(tmp_path / "journal.jsonl").planned("one", [])
    assert main(["certify", "--rehearse", "--out", str(tmp_path)]) == 2
    assert "name another folder" in capsys.readouterr().err


def test_the_commit_can_be_told_where_there_is_no_checkout(monkeypatch):
    monkeypatch.setattr(provenance, "_described", lambda: "unknown")
    monkeypatch.setenv(provenance.VARIABLE, "abc1234")
    assert provenance.commit() == "abc1234" and provenance.refusal(allow_dirty=False) is None


# ---------------------------------------------------------------------------------------------------------------------
# The pieces
# ---------------------------------------------------------------------------------------------------------------------


def test_a_timeline_counts_what_lies_between_launches():
    spans = [Span("b", 10, 30), Span("a", 0, 8), Span("copy", 20, 25), Span("a", 33, 40)]
    found = Timeline(ordered(spans))
    assert (found.total, found.idle) == (40, 5)  # 8 to 10, 30 to 33; what overlaps counts once
    assert found.by_name() == {"b": [20], "a": [8, 7], "copy": [5]}


def wait(specialization: Specialization) -> Compiled:
    """In place of compiling."""
    time.sleep(float(specialization.data))
    return Compiled(specialization.kernel, float(specialization.data), None)


@pytest.mark.parametrize(("seconds", "begins"), [("0", "1 specialisations"), ("600", "1 of 2 specialisations")])
def test_compiling_begins_while_it_is_found_and_stops_before_the_stage_is_killed(
    seconds, begins, tmp_path, monkeypatch
):
    @contextmanager
    def rigged(each):
        found = {}

        def launch(specialization):
            found[specialization] = None
            each(specialization)

        launches.append(launch)
        yield found

    def calls(device):
        yield lambda: launches[0](Specialization("m", "quick", "0"))
        if seconds != "0":
            yield lambda: launches[0](Specialization("m", "slow", seconds))

    launches = []
    monkeypatch.setattr(specializations, "compile_one", wait)
    monkeypatch.setattr(compile_stage, "collecting", rigged)
    context = Context(tmp_path, toy=True, deadline=time.monotonic() + compile_stage.MARGIN + 2)
    context.kept["compilers"] = Compilers(2)
    try:
        said = compile_stage.compile_all(calls, context)
        assert said.startswith(begins) and context.left > 0
        late = replace(context, deadline=time.monotonic())
        with pytest.raises(RuntimeError, match="nothing compiled in the time"):
            compile_stage.compile_all(calls, late)
    finally:
        for process in context.kept["compilers"].pool._processes.values():
            process.kill()


def test_measurements_are_compiled_first_and_a_try_leaves_time_to_the_turns(tmp_path):
    context = Context(tmp_path, toy=False, deadline=0)
    assert [unit.name.split()[-1] for unit in compile_stage.units(context)] == ["measurements", "checks"]
    tries = [unit for unit in peers.units(context) if unit.name.startswith("try ")]
    assert [unit.name.removeprefix("try ") for unit in tries[: len(peers.FIRST)]] == list(peers.FIRST)
    assert all(unit.reserve == peers.RESERVE and unit.seconds >= 3 for unit in tries)
    assert [unit.name for unit in head.units(context)][:2] == ["peaks", "growth over V"]


@pytest.mark.parametrize("model", compile_stage.MODELS)
@pytest.mark.parametrize("lengths", compile_stage.LENGTHS)
def test_the_small_workspace_recomputes_at_every_model(model, lengths):
    """Its kernels are compiled ahead too, so the bound must be large enough for a plan and too small for a slab."""
    batch = Case(model, HEADS[model], lengths).unfilled(torch.bfloat16, "cpu")
    call = partial(explain, fused_npo_loss, batch.hidden, batch.weight, batch.labels, shift=False, impl="triton")
    assert call().mode == "slab" and call(workspace_mb=compile_stage.SMALL_MB).mode == "recompute"


SPECIALIZATIONS = """
import os, sys, torch, warnings
from unittest import mock
from triton.compiler import CompiledKernel
from bench.certify.specializations import collect, compile_one, pretend_sm_90, rows_without_kernels
from tests import support
from tests.support import make_batch
pretend_sm_90()
launched = []

def call():
    launched.clear()
    support.evaluate(support.sequences, make_batch(torch.bfloat16, "all"), impl="triton")

def cached():
    return set(os.listdir(os.environ["TRITON_CACHE_DIR"]))

warnings.simplefilter("error")  # memory that no kernel wrote is not read
found = [s for s in collect([call, call])]
assert len(found) == len(set(found))
assert {s.kernel for s in found} >= {"target_logit_kernel", "exp_logits_kernel", "sequence_sums_kernel"}
quick = [s for s in found if not s.kernel.startswith("exp_logits")]
errors = [c.error for c in map(compile_one, quick) if c.error]
assert not errors, errors
before = cached()
assert before
for module in {s.module for s in quick}:  # a JIT that has compiled nothing
    for function in vars(sys.modules[module]).values():
        getattr(function, "device_caches", {}).clear()
with mock.patch.object(CompiledKernel, "run", property(lambda self: lambda *_: launched.append(self.name))), \\
     mock.patch.object(CompiledKernel, "launch_metadata", lambda *_: None), rows_without_kernels():
    call()
new = cached() - before
assert len(launched) > len(quick) and len(new) == len(found) - len(quick), (launched, len(new))
print("found", len(found))
"""


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_the_jit_asks_for(tmp_path):
    """In a process of its own: these tests interpret kernels, which are then not compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", SPECIALIZATIONS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout.startswith("found"), run.stdout + run.stderr


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every stage runs on a CPU, around a unit that raises, one that crashes, one that hangs, and an absent peer."""
    command = [sys.executable, "-m", "bench", "certify", "--rehearse", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    journal = Journal(tmp_path / "out" / "journal.jsonl")
    outcomes = [o for stage in STAGES for o in journal.outcomes(stage.name)]
    broken = {(o.stage, o.unit): (o.status, o.detail) for o in outcomes if o.status in BROKEN}
    assert broken == {
        ("environment", "a unit that raises"): (FAILED, "RuntimeError: put in to see what becomes of it"),
        ("checks", "a unit that crashes"): (CRASHED, "killed by SIGABRT"),
        ("head", "a unit that hangs"): (TIMED_OUT, "killed after 2 s"),
    }, (tmp_path / "out" / "log.txt").read_text()
    assert {(o.stage, o.status) for o in outcomes} >= {(stage.name, PASSED) for stage in STAGES}
    assert NOT_MEASURED not in statuses(outcomes)
    assert ("try absent/peer", MISSING) in [(o.unit, o.status) for o in outcomes]
    for faulty in ("environment", "checks", "head"):
        assert [o.status for o in outcomes if o.stage == faulty][-1] == PASSED  # what comes behind the fault
    text, tuned = ((tmp_path / "out" / name).read_text() for name in ("report.md", "tune.json"))
    assert run.stdout.endswith(text + "\n")
    assert all(f"| {unit} |" in text for _, unit in broken) and "| try absent/peer | missing |" in text
    records = read_lines(tmp_path / "out" / "records.jsonl")
    assert {r["suite"] for r in records} >= {"ceilings", "accuracy", "head", "memory", "scaling", "tofu", "step"}
    assert all(r["commit"] and not r["gpu"] for r in records)
    assert [len(json.loads(tuned)[kind][0]["medians"]) for kind in ("sweeps", "pairs", "moments")] == [3, 2, 2]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"environment.json", "journal.jsonl", "log.txt", "records.jsonl", "report.md", "tune.json"}
