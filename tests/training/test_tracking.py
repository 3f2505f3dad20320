"""What trackers show of a run: every curve, resumed without a step twice, and nothing of the training changed by it."""

import io
import json
import struct
from dataclasses import replace

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from rich.console import Console
from safetensors.torch import load_file

from tests.training.conftest import llama
from tests.training.test_unlearn import make_steps
from training import tracking
from training.checkpoints import MODEL, Checkpoints
from training.config import TrainConfig
from training.interruption import Interrupted
from training.methods import METHODS
from training.observed import Observed
from training.run import Schedule, run
from training.scoring import score
from training.tracking import Tracking, evaluation_names, trackers_of
from training.trainer import Trainer

CONFIG = TrainConfig(epochs=2, lr=1e-3, batch_size=6, micro_batch_size=4, seed=3)
CURVES = {
    *("loss/total", "loss/forget", "loss/retain", "loss_weight/forget", "loss_weight/retain"),
    *(
        "logps/forget",
        "logps/retain",
        "log_ratio/mean",
        "log_ratio/p10",
        "log_ratio/p50",
        "log_ratio/p90",
        "npo/weight",
    ),
    *("train/learning_rate", "train/grad_norm", "train/tokens_per_second", "train/peak_memory_gib"),
}
EVALUATED = {"forget/prob", "retain/rougeL", "eval/forget_quality", "eval/model_utility", "train/epoch"}
SUMMARY = {"forget_prob": 0.9, "retain_rougeL": 0.5, "forget_quality": 0.01, "model_utility": 0.4, "nothing": None}


class Memory(GeneralTracker):
    """Keeps what is logged; fails at a given step."""

    name, requires_logging_directory = "memory", False

    def __init__(self, fails_at=None):
        super().__init__()
        self.logged, self.fails_at, self.finished = [], fails_at, False

    @property
    def tracker(self):
        return self.logged

    def log(self, values, step=None, **kwargs):
        torch.rand(3)  # draws
        if step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True

    def curve(self, name):
        return [(step, values[name]) for step, values in self.logged if name in values]


@pytest.fixture
def memory(monkeypatch):
    """A tracker `memory`, which accelerate offers like its own."""
    made = Memory()

    class Offered(Memory):
        def __new__(cls, project):
            return made  # which is no `Offered`, and so not initialised again

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "memory", Offered)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["memory"])
    return made


def trained(corpus, method="npo_rt", *, tracked=None, checkpoints=None, stop_at=None, dropout=0.0, **config):
    """A run of four steps on a model of one layer: (the model, its steps)."""
    torch.manual_seed(0)
    model, job_config = llama(corpus), replace(CONFIG, **config)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    steps = make_steps(corpus, method, job_config, reference=llama(corpus).eval())
    observed = Observed() if tracked else None
    steps = replace(steps, observed=observed)

    def evaluate(step, display):
        if step == stop_at:
            raise Interrupted
        return {"epoch": step / 2, **SUMMARY}

    trainer = Trainer(model, job_config, len(steps), observed)
    console = Console(file=io.StringIO())
    schedule = Schedule(len(steps), 2, 1 if checkpoints else 0)
    run(trainer, steps, schedule, evaluate, label="x", checkpoints=checkpoints, tracking=tracked, console=console)
    return model, steps


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_every_curve_at_every_step(corpus, memory, tmp_path):
    """The terms and their weights add up to the loss; numbers of rows cover all rows of all micro-batches."""
    _, steps = trained(corpus, tracked=Tracking("memory", tmp_path))
    by_step = {step: set() for step in range(len(steps) + 1)}
    for step, values in memory.logged:
        by_step[step] |= values.keys()
        assert all(isinstance(value, (int, float)) for value in values.values())
        if "loss/total" in values:
            parts = [values[f"loss_weight/{part}"] * values[f"loss/{part}"] for part in ("forget", "retain")]
            assert sum(parts) == pytest.approx(values["loss/total"], rel=1e-5)
            assert (values["loss_weight/forget"], values["loss_weight/retain"]) == (1.3, 0.7)
    assert by_step == {0: EVALUATED, 1: CURVES, 2: CURVES | EVALUATED, 3: CURVES, 4: CURVES | EVALUATED}
    assert memory.finished
    model = llama(corpus)  # as before the first step, whose learning rate is 0
    rows = [steps.rows["forget"][i] for i in steps.plan.steps[0].forget]
    refs = steps.frozen.scores["forget"].logps[steps.plan.steps[0].forget]
    ratio = score(model, rows, 0).logps - refs
    first = memory.logged[1][1]
    assert first["log_ratio/mean"] == pytest.approx(ratio.mean().item(), abs=1e-2)
    assert first["log_ratio/p90"] == pytest.approx(ratio.quantile(0.9).item(), abs=1e-2)
    assert first["npo/weight"] == pytest.approx((2 * torch.sigmoid(0.1 * ratio)).mean().item(), rel=1e-3)
    assert first["logps/forget"] == pytest.approx(score(model, rows, 0).logps.mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_terms_of_every_method_add_up(method, corpus, model, reference):
    """Also where a KL term has its own forward."""
    steps = make_steps(corpus, method, CONFIG, reference=reference, model=model)
    steps = replace(steps, observed=Observed())
    total = 0.0
    for inputs, objective, _ in steps.passes(model, 0):
        total += model(**inputs, fused_unlearning=objective).loss.item()
    found = steps.observed.take()
    terms = ["forget"] + ["retain"] * bool(METHODS[method].retain)
    assert {name for name in found if name.startswith("loss/")} == {f"loss/{term}" for term in terms}
    assert sum(found[f"loss_weight/{term}"] * found[f"loss/{term}"] for term in terms) == pytest.approx(total, rel=1e-4)
    assert ("npo/weight" in found) == (METHODS[method].family in ("npo", "simnpo"))
    assert steps.observed.take() == {}  # and nothing is left for the next step


def test_rounding_does_not_count_the_passes_twice(corpus, memory, tmp_path):
    trained(corpus, tracked=Tracking("memory", tmp_path), saf_format="int8")
    for _, values in memory.logged:
        if "loss/total" in values:
            parts = [values[f"loss_weight/{part}"] * values[f"loss/{part}"] for part in ("forget", "retain")]
            assert sum(parts) == pytest.approx(values["loss/total"], rel=1e-4)


@pytest.mark.parametrize("fails_at", [None, 3])
def test_training_has_the_same_bits_with_and_without(fails_at, corpus, memory, tmp_path):
    """The tracker draws random numbers, and the model has dropout."""
    memory.fails_at = fails_at
    tracked, _ = trained(corpus, tracked=Tracking("memory", tmp_path, say=str), dropout=0.1)
    assert same(tracked, trained(corpus, dropout=0.1)[0])
    assert not same(tracked, trained(corpus)[0])  # dropout counts


def test_a_tracker_that_fails_says_so_twice_and_the_run_goes_on(corpus, memory, tmp_path):
    memory.fails_at, said = 3, []
    trained(corpus, tracked=Tracking("memory", tmp_path, say=said.append))
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith("memory stopped at step 3: OSError: [Errno 28] No space left on device; training")
    assert [step for step, _ in memory.curve("loss/total")] == [1, 2]


def test_a_tracker_that_cannot_start_ends_the_run_before_the_first_step(corpus, memory, monkeypatch, tmp_path):
    def start():
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(memory, "start", start)
    with pytest.raises(ValueError, match="--report_to memory cannot start: RuntimeError: no API key configured; or"):
        trained(corpus, tracked=Tracking("memory", tmp_path))
    assert memory.logged == []


def test_unknown_and_absent_trackers_are_named(monkeypatch):
    assert trackers_of(None) == trackers_of("none") == []
    with pytest.raises(ValueError, match=r"expected none, or some of .*tensorboard.*, got 'tensorbord'"):
        trackers_of("tensorbord")
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ValueError, match="--report_to wandb: the package is not installed; pip install wandb"):
        trackers_of("wandb")


def test_names_of_an_evaluation():
    names = evaluation_names({**SUMMARY, "epoch": 1, "step": 3, "mia_loss": 0.7, "mia_loss_low": 0.5, "privleak": 3.0})
    assert names.keys() == EVALUATED | {"eval/mia_loss", "eval/privleak"}


def test_a_resumed_run_goes_on_with_its_curves(corpus, memory, tmp_path):
    """Interrupted in an evaluation, behind a step that was logged; and its id stays, where a new run gets another."""
    checkpoints = Checkpoints(tmp_path, "key")
    with pytest.raises(Interrupted):
        trained(corpus, tracked=Tracking("memory", tmp_path), checkpoints=checkpoints, stop_at=2)
    first_id = json.loads((tmp_path / tracking.RUN_FILE).read_text())["run"]
    assert load_file(next(tmp_path.glob("checkpoint-*2")) / MODEL)
    trained(corpus, tracked=Tracking("memory", tmp_path), checkpoints=checkpoints)
    assert [step for step, _ in memory.curve("loss/total")] == [1, 2, 3, 4]
    assert [step for step, _ in memory.curve("forget/prob")] == [0, 2, 4]
    assert json.loads((tmp_path / tracking.RUN_FILE).read_text())["run"] == first_id
    Tracking("memory", tmp_path).start(0)
    assert json.loads((tmp_path / tracking.RUN_FILE).read_text())["run"] != first_id


def died_and_resumed(corpus, folder, report_to):
    """A run that is killed after step 3, when step 2 was saved; then the same again, to its end."""
    checkpoints, log = Checkpoints(folder, "key"), Tracking.log

    def killed(self, values, step):
        log(self, values, step)
        if step == 3:
            raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Tracking, "log", killed)
        trained(corpus, tracked=Tracking(report_to, folder, "a run"), checkpoints=checkpoints)
    trained(corpus, tracked=Tracking(report_to, folder, "a run", {"lr": 1e-3}), checkpoints=checkpoints)


def test_tensorboard_shows_every_step_once(corpus, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    died_and_resumed(corpus, tmp_path, "tensorboard")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == CURVES | EVALUATED
    for name in CURVES | EVALUATED:
        steps = [1, 2, 3, 4] if name in CURVES else [0, 2, 4]
        assert [event.step for event in events.Scalars(name)] == steps
    assert [event.value for event in events.Scalars("forget/prob")] == pytest.approx([0.9] * 3)


def records(path):
    """The records in a file of Weights & Biases: a header of 7 bytes, then LevelDB's log format in 32 KiB blocks."""
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record.FromString(parts)
            parts = b""


def test_wandb_offline_has_every_curve(corpus, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    died_and_resumed(corpus, tmp_path, "wandb")
    first, second = (list(records(path)) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    run_id = json.loads((tmp_path / tracking.RUN_FILE).read_text())["run"]
    for session, steps, code in ((first, [0, 1, 2, 3], 1), (second, [3, 4], 0)):
        histories = [record.history for record in session if record.WhichOneof("record_type") == "history"]
        assert [history.step.num for history in histories] == steps
        names = {item.key or "/".join(item.nested_key) for history in histories for item in history.item}
        assert names >= CURVES | EVALUATED
        assert {r.run.run_id for r in session if r.WhichOneof("record_type") == "run"} == {run_id}
        assert [r.exit.exit_code for r in session if r.WhichOneof("record_type") == "exit"] == [code]
