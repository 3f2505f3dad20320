"""`training.real` from a model to REPORT.md: records, resumption, a second call, the report of records alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.test_pretrained import source  # noqa: F401  (a fixture)
from training.benchmarks.tofu.log import read_log
from training.commands import finetune, real, real_stages, tiny, unlearn
from training.commands.options import build
from training.pretrained.part import Part
from training.pretrained.plan import PERCENTS, QUICK, Tried

SMALL = replace(
    QUICK,
    part=Part(authors=20, evaluated=2, facts=2, wrong=1),
    finetune={"epochs": 1, "lr": 1e-3, "batch_size": 32},
    unlearn={name: {"epochs": 1, "batch_size": 8} for name in ("forget10", "forget50", "tune")},
    max_new_tokens=3,
    tries=(Tried("npo_rt", 1e-3),),
    seeds={scenario: {"npo_rt": 1} for scenario in PERCENTS},
    costs=(),
)
RECORD = {"name": "tiny", "parameters": 1, "weights_sha256": 64 * "0", "source": "nothing", "licence": "none"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The records say how many threads there were."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(source, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny.main(*build(tiny.TinyOptions, benchmark="tofu", hidden_size=64, layers=1, out=folder, data_dir=str(source)))
    return folder


@pytest.fixture(autouse=True)
def small(base, monkeypatch):
    monkeypatch.setattr(real, "real_model", lambda name: base)
    monkeypatch.setattr(real, "record_of", lambda folder: RECORD)
    monkeypatch.setitem(real.SIZES, "quick", SMALL)


def options(source: Path, folder: Path, **changes) -> real.RealOptions:  # noqa: F811
    return real.RealOptions(data_dir=str(source), quick=True, work=folder / "work", out=folder / "out", **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(source, base, tmp_path_factory):  # noqa: F811
    """The folder of a study that was interrupted in its first run of forget10, and went on."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "real_model", lambda name: base)
        patch.setattr(real, "record_of", lambda folder: RECORD)
        patch.setitem(real.SIZES, "quick", SMALL)
        whole = unlearn.main

        def interrupted(options, benchmark):
            if "forget10-npo_rt" in str(options.out):
                raise KeyboardInterrupt
            return whole(options, benchmark)

        patch.setattr(unlearn, "main", interrupted)
        with pytest.raises(KeyboardInterrupt):
            real.main(options(source, folder))
        partial = json.loads((folder / "out" / "models.json").read_text())
        assert {"base", "full", "retain50", "retain90"} == set(partial) and not (folder / "out" / "runs").exists()
        patch.setattr(unlearn, "main", whole)
        real.main(options(source, folder))
    return folder


def test_records_are_those_of_the_runs(finished):
    out, work = finished / "out", finished / "work"
    runs = {path.stem: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}
    assert set(runs) == {"forget10-npo_rt-seed0", "forget50-npo_rt-seed0"}
    for name, run in runs.items():
        folder = work / "runs" / name
        metrics = json.loads((folder / "metrics.json").read_text())
        assert [c["step"] for c in run["checkpoints"]] == [entry["step"] for entry in metrics["history"]]
        assert run["lr"] == 1e-3 and run["retain_weight"] == 1.0 and len(run["answers"]) == 6 + 2
        for checkpoint, entry in zip(run["checkpoints"], metrics["history"], strict=True):
            for key in ("forget_quality", "model_utility_geometric", "forget_prob"):
                assert checkpoint["summary"][key] == pytest.approx(entry[key], rel=1e-5)
            rows = checkpoint["rows"]
            assert {len(values) for values in rows.values()} == {20}
            assert sum(rows["prob"]) / 20 == pytest.approx(entry["forget_prob"], rel=1e-5)
            parts = checkpoint["utility_rows"]
            for key, values in parts.items():
                assert sum(values) / len(values) == pytest.approx(entry[key], rel=1e-4, abs=1e-9)
            assert len(parts) == 9
    attacks = runs["forget10-npo_rt-seed0"]["attacks"]
    assert set(attacks) == {"int4", "relearn20"} and not runs["forget50-npo_rt-seed0"]["attacks"]
    ending = runs["forget10-npo_rt-seed0"]["checkpoints"][-1]["summary"]["forget_prob"]
    assert attacks["relearn20"]["summary"]["forget_prob"] > ending
    models = json.loads((out / "models.json").read_text())
    assert set(models["retain90"]["attacks"]) == {"int4", "relearn20"} and models["full"]["summary"]["forget_quality"]
    choice = json.loads((out / "choice.json").read_text())
    assert [(tried["method"], tried["chosen"]) for tried in choice] == [("npo_rt", True)]


def test_each_forget_set_is_compared_with_the_model_that_never_saw_it(finished):
    out, work = finished / "out", finished / "work"
    for scenario, retrained in (("forget10", "retain90"), ("forget50", "retain50")):
        run = json.loads((out / "runs" / f"{scenario}-npo_rt-seed0.json").read_text())
        last = work / "runs" / f"{scenario}-npo_rt-seed0" / "eval" / f"step-{run['steps']:06d}.json"
        against = read_log(work / "evaluations" / f"{retrained}-data" / "eval_log_aggregated.json")
        summary = real.TOFU(real.TOFU.Options(data_dir=str(work / "data"))).summarize(read_log(last), against)
        assert run["checkpoints"][-1]["summary"]["forget_quality"] == pytest.approx(summary["forget_quality"], rel=1e-5)


def test_a_second_call_runs_nothing(finished, source, monkeypatch):  # noqa: F811
    before = contents(finished / "out")
    for module, name in ((finetune, "run"), (unlearn, "run"), (real_stages, "relearn_"), (real_stages, "measured")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr("training.commands.session.measured", None)
    real.main(options(source, finished))
    assert contents(finished / "out") == before


def noted(run, seen: list[str]):
    def main(options, *more):
        seen.append(options.out.name)
        return run(options, *more)

    return main


def test_on_another_machine_only_what_has_no_record_is_run(finished, source, tmp_path, monkeypatch):  # noqa: F811
    before = contents(finished / "out")
    for name, content in before.items():
        if "forget50" not in name:
            (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / name).write_bytes(content)
    taught, unlearned = [], []
    for module, seen in ((finetune, taught), (unlearn, unlearned)):
        run = module.main
        monkeypatch.setattr(
            module,
            "main",
            lambda options, *more, run=run, seen=seen: (seen.append(options.out.name), run(options, *more)),
        )
    monkeypatch.setattr(real_stages.evaluate, "main", None)
    real.main(options(source, tmp_path))
    assert taught == ["full"] and unlearned == ["forget50-npo_rt-seed0"]
    assert contents(tmp_path / "out") == before


def test_what_is_missing(finished, source, base, tmp_path):  # noqa: F811
    """No run; a missing model for an attack; a run whose settings differ from the chosen ones."""
    shutil.copytree(finished / "out", tmp_path / "out")
    path = tmp_path / "out/runs/forget10-npo_rt-seed0.json"
    run = json.loads(path.read_text())
    attacks = f"attacks on {path.stem}"
    cases = [({}, []), ({"attacks": {}}, ["full", path.stem, attacks]), ({"lr": 2e-3}, ["full", path.stem])]
    for changes, names in cases:
        path.write_text(json.dumps(run | changes))
        study = real.Study(SMALL, base, str(source), tmp_path / "work", tmp_path / "out", real.Console(quiet=True))
        assert [stage.name for stage in study.missing] == names


@pytest.mark.parametrize("change", [{"max_new_tokens": 4}, {"part": Part(authors=40)}])
def test_records_of_another_study_are_not_mixed_in(finished, source, monkeypatch, change):  # noqa: F811
    before = contents(finished / "out")
    monkeypatch.setitem(real.SIZES, "quick", replace(SMALL, **change))
    with pytest.raises(ValueError, match=f"another {next(iter(change))}; choose another folder"):
        real.main(options(source, finished))
    assert contents(finished / "out") == before


def test_the_report_is_of_the_records_alone(finished, source, tmp_path, monkeypatch):  # noqa: F811
    before = contents(finished / "out")
    made = ("REPORT.md", "answers.md")
    records = tmp_path / "records"
    for name, content in before.items():
        if name.endswith(".json"):
            path = records / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    monkeypatch.setattr(real, "Study", None)
    real.main(real.RealOptions(report_only=True, out=records))
    assert {name: contents(records)[name] for name in made} == {name: before[name] for name in made}


def test_no_path_of_this_machine_is_in_what_is_committed(finished):
    for name, content in contents(finished / "out").items():
        assert str(finished).encode() not in content and b"/tmp/" not in content, name


def test_dry_run_lists_the_stages(source, tmp_path, capsys):  # noqa: F811
    real.main(options(source, tmp_path, dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "retain50" and "attacks on retain90" in lines and not any(tmp_path.iterdir())


def test_costs_get_rows_of_every_kind(finished, source, base, monkeypatch):  # noqa: F811
    seen = {}
    monkeypatch.setattr(real.costs, "measure", lambda *given, **options: seen.update(given=given, **options))
    study = real.Study(SMALL, base, str(source), finished / "work", finished / "out", real.Console(quiet=True))
    real.measure_costs(study, finished / "out", real.Console(quiet=True))
    folders, rows, out, _ = seen["given"]
    assert folders == {} and out.name == "costs.json" and seen["cases"] == ()
    assert [row["question"] for row in rows["idk"]] == [row["question"] for row in rows["forget"]]
    assert {row["answer"] for row in rows["idk"]} <= set(study.benchmark().refusals())
