"""Long work reports progress without a terminal: at the start, during a long step, and at the end."""

import io
import re
import threading
import time

import pytest
import torch
from rich.console import Console

from training import progress
from training.checkpoints import Checkpoints
from training.config import TrainConfig
from training.data import Example
from training.model import build_model
from training.run import Schedule, run
from training.steps import Batches, FinetuningSteps
from training.trainer import Trainer


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.02)
    monkeypatch.setattr(progress, "INTERVAL", 0.1)
    return Console(file=io.StringIO(), width=40)


def lines(console):
    return console.file.getvalue().splitlines()


def test_a_line_comes_while_nothing_moves(console):
    with progress.progress(console) as display:
        task = display.add_task("NPO", total=4, unit="steps", note="")
        time.sleep(0.5)  # one long step
        display.update(task, advance=1, note="loss 2.500, 412 tokens/s")
        time.sleep(0.3)
    said = lines(console)
    assert len(said) >= 4  # of a width that would break them
    assert re.fullmatch(r"\[\d\d:\d\d:\d\d\] NPO: 0/4 steps", said[0])
    assert "NPO: 1/4 steps, loss 2.500, 412 tokens/s" in said[-1]


def test_what_has_ended_is_told_once(console):
    with progress.progress(console) as display:
        for name, total in (("first", 1), ("second", 2)):
            display.add_task(name, total=total, unit="rows")
        display.advance(display.task_ids[0])
        time.sleep(0.5)
    said = lines(console)
    assert sum("first: 1/1 rows, 0:00:00 in all" in line for line in said) == 1
    assert said[0].count("|") == 1 and "first" not in said[-1] and "second: 0/2 rows" in said[-1]


def test_what_cannot_be_seen_starts_no_thread(console):
    before = threading.active_count()
    for quiet, more in ((True, 0), (False, 1)):
        console.quiet = quiet
        with progress.progress(console) as display:
            display.add_task("x", total=1)
            assert threading.active_count() == before + more
    assert threading.active_count() == before


CONFIG = TrainConfig(epochs=1, lr=1e-2, batch_size=2)


def made_up_run(console, schedule, checkpoints=None, die_at=None):
    """Of five steps on a model of nothing."""
    model = build_model(30, hidden_size=64, num_layers=1, special_ids={}, seed=0)
    rows = [Example([1, 2 + i, 5], [-100, 2 + i, 5]) for i in range(10)]
    job = FinetuningSteps(rows, CONFIG, Batches(0, torch.device("cpu"), packing=False))

    def evaluate(step, display):
        if step == die_at:
            raise RuntimeError("killed")
        return {}

    trainer = Trainer(model, CONFIG, len(job))
    return run(trainer, job, schedule, evaluate, label="Toy", checkpoints=checkpoints, console=console)


def test_a_run_says_step_loss_rate_and_time_left(console):
    made_up_run(console, Schedule(5, 0, 0))
    last = lines(console)[-1]
    assert re.search(r"Toy: 5/5 steps, loss \d\.\d{3}, \d+ tokens/s, 0:00:\d\d in all$", last)


def test_checkpoints_come_by_time_as_well(console, tmp_path):
    for minutes, expected in ((1e-9, ["checkpoint-000002", "checkpoint-000003"]), (60.0, [])):
        folder = tmp_path / str(minutes)
        with pytest.raises(RuntimeError, match="killed"):
            made_up_run(console, Schedule(5, 1, 0, minutes), Checkpoints(folder, "key"), die_at=4)
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == expected
    assert not Schedule(5, 0, 0, 10.0).saves(3, minutes=9.9) and Schedule(5, 0, 0, 10.0).saves(3, minutes=10.0)
    assert not Schedule(5, 0, 1, 10.0).saves(5, minutes=99.0)  # the end of a run saves its model
