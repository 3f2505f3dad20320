"""Accumulation, processes, checkpoints, signals: none of them changes a bit of what is trained."""

import errno
import itertools
import os
import pickle
import random
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from npo_kernels.hf import add_fused_unlearning_head
from training import checkpoints, distributed, interruption, steps
from training.checkpoints import Checkpoints
from training.config import TrainConfig
from training.interruption import Interrupted, check, interruptible
from training.model import build_model
from training.run import Schedule, run
from training.steps import Batches, FinetuningSteps
from training.store import DamagedError, StorageError, seal
from training.trainer import Trainer

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=2, lr=1e-2, batch_size=10, micro_batch_size=4, seed=1)


def fresh_model(corpus, lora=False):
    model = build_model(len(corpus.tokenizer), hidden_size=64, num_layers=1, special_ids={}, seed=0)
    if lora:  # with dropout, so that the random generators' state counts
        torch.manual_seed(7)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear")
        model = add_fused_unlearning_head(get_peft_model(model, config))
    return model


def trained(corpus, folder=None, kill_at=None, lora=False, save_every=0, drawing=lambda step: torch.rand(3)):
    """(weights, history) of a run; `kill_at`: a step at which it dies without a word; `drawing`: in evaluations."""
    model = fresh_model(corpus, lora)
    job = FinetuningSteps(corpus.retain[:30], CONFIG, Batches(0, CPU, True))
    engine = Trainer(model, CONFIG, len(job))

    def evaluate(step, progress):
        drawing(step)
        if step == kill_at:
            raise RuntimeError("killed")
        return {"norm": sum(p.detach().double().square().sum().item() for p in model.parameters())}

    kept = Checkpoints(folder, "key") if folder else None
    history = run(engine, job, Schedule(len(job), 1, save_every), evaluate, label="t", checkpoints=kept)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, history


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_equal(run_a, run_b):
    assert run_a[1] == run_b[1]
    assert all(torch.equal(run_a[0][name], weight) for name, weight in run_b[0].items())


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("kill_at", [1, 3, 4, 6])
def test_a_resumed_run_is_the_uninterrupted_one(kill_at, lora, corpus, tmp_path):
    whole = trained(corpus, lora=lora)
    with pytest.raises(RuntimeError, match="killed"):
        trained(corpus, tmp_path, kill_at, lora, save_every=2)
    assert names(tmp_path) == [f"checkpoint-{step:06d}" for step in range(2, kill_at, 2)]
    torch.manual_seed(99)  # another process starts elsewhere
    assert_equal(trained(corpus, tmp_path, lora=lora), whole)


def test_the_last_step_is_saved_for_what_comes_after_it(corpus, tmp_path):
    """The model's files and the attacks, which may be stopped as well: no step is done again."""
    whole = trained(corpus, tmp_path, save_every=2)
    assert names(tmp_path)[-1] == f"checkpoint-{whole[1][-1]['step']:06d}"
    assert_equal(trained(corpus, tmp_path, kill_at=whole[1][-1]["step"], save_every=2), whole)  # nothing is evaluated


def test_a_checkpoint_of_adapters_leaves_the_model_out(corpus, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        trained(corpus, tmp_path, 3, lora=True, save_every=2)
    (saved,) = tmp_path.glob("checkpoint-*/model.safetensors")
    with safe_open(saved, framework="pt") as file:
        assert set(file.keys()) == {n for n, _ in fresh_model(corpus, True).named_parameters() if "lora_" in n}


def test_a_signal_saves_and_the_next_run_goes_on(corpus, tmp_path, monkeypatch):
    whole = trained(corpus)
    step = Trainer.step

    def interrupted(self, passes, number, after_pass):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, passes, number, after_pass)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="by SIGINT after step 2"):
        patch.setattr(Trainer, "step", interrupted)
        trained(corpus, tmp_path)
    assert names(tmp_path) == ["checkpoint-000002"]
    assert_equal(trained(corpus, tmp_path), whole)


def test_the_second_signal_acts_as_usual(request, monkeypatch):
    """But not at once: a launcher passes on what all processes have been sent anyway."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt) as raised, interruptible():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            check()
        monkeypatch.setattr(interruption, "REPEATED", 0.0)
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(raised.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_at_once_but_not_within_training(number, code):
    reached = []
    with pytest.raises(Interrupted) as raised, interruptible(at_once=True):
        with interruptible():
            signal.raise_signal(number)
            reached.append("the end of the block")
        reached.append("no more")
    assert reached == ["the end of the block"] and raised.value.exit_code == code
    with pytest.raises(Interrupted), interruptible(at_once=True):
        signal.raise_signal(number)
        reached.append("no more")
    assert len(reached) == 1


def test_a_checkpoint_of_another_run_is_not_taken(corpus, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        trained(corpus, tmp_path, 3, save_every=2)
    job = FinetuningSteps(corpus.retain[:30], CONFIG, Batches(0, CPU, True))
    engine = Trainer(fresh_model(corpus), CONFIG, len(job))
    assert Checkpoints(tmp_path, "another key").load(engine) == (0, None, [])


@pytest.mark.parametrize("where", ["evaluation", "pass", "first evaluation", "last evaluation"])
def test_a_signal_outside_of_the_end_of_a_step_loses_nothing(where, corpus, tmp_path, monkeypatch):
    """The current step or evaluation is repeated with the same bits: dropout, and the random draws of an evaluation."""
    whole = trained(corpus, lora=True)
    at = {"evaluation": 3, "pass": 3, "first evaluation": 0, "last evaluation": 6}[where]
    evaluated = []

    def drawing(step):
        torch.rand(3), random.random(), np.random.rand()
        if step == at and where != "pass":
            signal.raise_signal(signal.SIGTERM)
            check()
        evaluated.append(step)

    def backward(self, passes, after_pass=lambda num_tokens: None):
        loss = original(self, passes, after_pass)
        if len(evaluated) == at + 1:
            signal.raise_signal(signal.SIGTERM)
            check()
        return loss

    original = Trainer._backward
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as raised:
        if where == "pass":
            patch.setattr(Trainer, "_backward", backward)
        trained(corpus, tmp_path, lora=True, drawing=drawing)
    assert names(tmp_path) == ([f"checkpoint-{at:06d}"] if at else [])
    assert raised.value.step == (at or None) and raised.value.exit_code == 143
    torch.manual_seed(99)
    again = []
    assert_equal(trained(corpus, tmp_path, lora=True, drawing=again.append), whole)
    assert again == list(range(at + (where == "pass"), 7))


def test_what_an_evaluation_draws_changes_no_step(corpus):
    """Finished blocks of an evaluation are not computed again, and would draw nothing then."""
    draws = trained(corpus, lora=True, drawing=lambda step: torch.rand(1 + step))
    assert_equal(trained(corpus, lora=True, drawing=lambda step: None), draws)


def test_a_checkpoint_has_no_pickle(corpus, tmp_path, monkeypatch):
    """Files of two kinds; saved and loaded with pickle disabled."""

    def none(*_, **__):
        raise AssertionError("pickle")

    whole = trained(corpus, lora=True)
    with monkeypatch.context() as patch:
        for owner, name in ((torch, "save"), (torch, "load"), (pickle, "dumps"), (pickle, "loads"), (pickle, "load")):
            patch.setattr(owner, name, none)
        with pytest.raises(RuntimeError, match="killed"):
            trained(corpus, tmp_path, 5, lora=True, save_every=2)
        files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
        assert files == {".json", ".safetensors"}
        torch.manual_seed(99)
        assert_equal(trained(corpus, tmp_path, lora=True), whole)


def test_a_damaged_checkpoint_is_never_taken(corpus, tmp_path, tried, capsys):
    """Any file of it truncated, absent, or with one bit changed: the one before goes on, with the bits of a whole run.
    Where both are damaged that is an error."""
    whole = trained(corpus)
    origin = tmp_path / "origin"
    with pytest.raises(RuntimeError, match="killed"):
        trained(corpus, origin, 5, save_every=2)
    files = [path.name for path in (origin / "checkpoint-000004").iterdir()]
    assert set(files) == {
        "model.safetensors", "optimizer.safetensors", "random-0.safetensors", "numbers.json", "progress.json"
    }  # fmt: skip
    draw = random.Random(0)
    engine = Trainer(fresh_model(corpus), CONFIG, 6)
    for number, (name, harm) in enumerate(itertools.product(files, HARMS)):
        folder = tmp_path / f"{number}"
        shutil.copytree(origin, folder)
        HARMS[harm](folder / "checkpoint-000004" / name, draw)
        step, _, (note,) = Checkpoints(folder, "key").load(engine)
        assert step == 2 and "checkpoint-000004 is damaged" in note.replace("/progress.json", "")
        assert "going on from checkpoint-000002" in note and names(folder) == ["checkpoint-000002"]
        HARMS[harm](folder / "checkpoint-000002" / name, draw)
        with pytest.raises(DamagedError, match=r"no checkpoint in .* is whole .* remove them"):
            Checkpoints(folder, "key").load(engine)
    tried("damaged checkpoints", 2 * len(files) * len(HARMS))
    HARMS["a bit"](origin / "checkpoint-000004" / "model.safetensors", draw)
    assert_equal(trained(corpus, origin), whole)
    assert "resuming after step 2" in capsys.readouterr().err


def truncated(path, draw):
    os.truncate(path, draw.randrange(path.stat().st_size))


def flipped(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


HARMS = {"truncated": truncated, "a bit": flipped, "absent": lambda path, draw: path.unlink()}


def test_a_run_that_dies_while_saving_has_the_checkpoint_before(corpus, tmp_path, monkeypatch):
    whole = trained(corpus)
    saves = []

    def full(folder, name, **record):
        saves.append(folder)
        if len(saves) == 2:
            (folder / name).write_text("{")
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(folder, name, **record)

    message = "checkpoint of step 4 was not saved, the newest one is of step 2: .* No space left .* free space"
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=message):
        patch.setattr(checkpoints, "seal", full)
        trained(corpus, tmp_path, save_every=2)
    assert names(tmp_path) == ["checkpoint-000002"]
    assert_equal(trained(corpus, tmp_path), whole)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_shares_of_a_step_are_its_gradient(num_processes, corpus, monkeypatch):
    """Averaged over processes, as wrappers do it, with shares so small that some have nothing."""
    model = fresh_model(corpus)
    job = FinetuningSteps(
        corpus.retain[:7], replace(CONFIG, batch_size=7, micro_batch_size=None), Batches(0, CPU, True)
    )

    def gradient(micro_batch_size, rank, n):
        monkeypatch.setattr(distributed, "index", lambda: rank)
        monkeypatch.setattr(distributed, "count", lambda: n)
        job.config = replace(job.config, micro_batch_size=micro_batch_size)
        model.zero_grad()
        passes = job.passes(model, 0)
        for inputs, objective, _ in passes:
            model(**inputs, fused_unlearning=objective).loss.backward()
        return len(passes), torch.cat([p.grad.flatten() for p in model.parameters()])

    _, whole = gradient(None, 0, 1)
    counts, parts = zip(*(gradient(2, rank, num_processes) for rank in range(num_processes)), strict=True)
    assert len(set(counts)) == 1  # or processes would wait for each other for ever
    torch.testing.assert_close(sum(parts) / num_processes, whole, rtol=1e-4, atol=1e-6)


def test_the_schedule_is_the_papers(corpus):
    """Warm-up over the first epoch, then linear decay to 0."""
    job = FinetuningSteps(corpus.retain[:40], CONFIG, Batches(0, CPU, True))
    rates = []
    Trainer(fresh_model(corpus), CONFIG, len(job)).train(job, after_step=lambda m: rates.append(m.lr))
    assert rates == pytest.approx([1e-2 * x for x in (0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25)])


def test_matrices_decay_and_norms_do_not(corpus):
    model = fresh_model(corpus)
    groups = Trainer(model, replace(CONFIG, weight_decay=0.5), 4).optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert found == {name: 0.0 if "norm" in name else 0.5 for name in found}
    assert set(found.values()) == {0.0, 0.5}


def test_metrics_are_of_the_whole_step(corpus):
    model = fresh_model(corpus)
    job = FinetuningSteps(corpus.retain[:10], CONFIG, Batches(0, CPU, True))
    inputs, objective, _ = steps.FinetuningSteps(
        corpus.retain[:10], replace(CONFIG, micro_batch_size=None), Batches(0, CPU, True)
    ).passes(model, 0)[0]
    loss = model(**inputs, fused_unlearning=objective).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    metrics = Trainer(model, CONFIG, len(job)).step(job.passes(model, 0))
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
