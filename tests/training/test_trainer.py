"""Accumulation, processes, checkpoints, signals: none of them changes a bit of what is trained."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate.utils import is_tensorboard_available
from peft import LoraConfig, get_peft_model

from npo_kernels.hf import add_fused_unlearning_head
from training import distributed, steps, trainer
from training.config import TrainConfig
from training.model import build_model
from training.run import Schedule, run
from training.steps import Batches, FinetuningSteps
from training.trainer import Checkpoints, Interrupted, Trainer, interruptible

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=2, lr=1e-2, batch_size=10, micro_batch_size=4, seed=1)


def fresh_model(corpus, lora=False):
    model = build_model(len(corpus.tokenizer), hidden_size=64, num_layers=1, special_ids={}, seed=0)
    if lora:  # with dropout, so that the random generators' state counts
        torch.manual_seed(7)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear")
        model = add_fused_unlearning_head(get_peft_model(model, config))
    return model


def trained(corpus, folder=None, kill_at=None, lora=False, save_every=0):
    """(weights, history) of a run; `kill_at`: a step at which it dies without a word."""
    model = fresh_model(corpus, lora)
    job = FinetuningSteps(corpus.retain[:30], CONFIG, Batches(0, CPU, True))
    engine = Trainer(model, CONFIG, len(job))

    def evaluate(step, progress):
        torch.rand(3)  # evaluations may draw numbers
        if step == kill_at:
            raise RuntimeError("killed")
        return {"norm": sum(p.detach().double().square().sum().item() for p in model.parameters())}

    checkpoints = Checkpoints(folder, "key") if folder else None
    history = run(engine, job, Schedule(len(job), 1, save_every), evaluate, label="t", checkpoints=checkpoints)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, history


def assert_equal(run_a, run_b):
    assert run_a[1] == run_b[1]
    assert all(torch.equal(run_a[0][name], weight) for name, weight in run_b[0].items())


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("kill_at", [1, 3, 4, 6])
def test_a_resumed_run_is_the_uninterrupted_one(kill_at, lora, corpus, tmp_path):
    whole = trained(corpus, lora=lora)
    with pytest.raises(RuntimeError, match="killed"):
        trained(corpus, tmp_path, kill_at, lora, save_every=2)
    found = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert found == ([f"checkpoint-{(kill_at - 1) // 2 * 2:06d}"] if kill_at > 2 else [])
    torch.manual_seed(99)  # another process starts elsewhere
    assert_equal(trained(corpus, tmp_path, lora=lora), whole)


def test_a_checkpoint_of_adapters_leaves_the_model_out(corpus, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        trained(corpus, tmp_path, 3, lora=True, save_every=2)
    (saved,) = tmp_path.glob("checkpoint-*/model.safetensors")
    adapters = sum(p.numel() for name, p in fresh_model(corpus, True).named_parameters() if "lora_" in name)
    assert saved.stat().st_size < 4 * adapters + 10_000
    engine = Trainer(fresh_model(corpus, True), CONFIG, 4)
    ddp = {f"module.{name}": None for name, _ in engine.model.named_parameters()}  # the names in its state dict
    engine._without_frozen([], [ddp], "")
    assert ddp and all("lora_" in name for name in ddp)


def test_a_signal_saves_and_the_next_run_goes_on(corpus, tmp_path, monkeypatch):
    whole = trained(corpus)
    step = Trainer.step

    def interrupted(self, passes, number, after_pass):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, passes, number, after_pass)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 3"):
        patch.setattr(Trainer, "step", interrupted)
        trained(corpus, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000003"]
    assert_equal(trained(corpus, tmp_path), whole)


def test_the_second_signal_acts_as_usual(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), interruptible() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped.wait(1)
        os.kill(os.getpid(), signal.SIGINT)
        stopped.wait(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_checkpoint_of_another_run_is_not_taken(corpus, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        trained(corpus, tmp_path, 3, save_every=2)
    job = FinetuningSteps(corpus.retain[:30], CONFIG, Batches(0, CPU, True))
    engine = Trainer(fresh_model(corpus), CONFIG, len(job))
    assert Checkpoints(tmp_path, "another key").load(engine) == (0, None)


def test_a_run_that_dies_while_saving_has_the_checkpoint_before(corpus, tmp_path, monkeypatch):
    def torn(path, value):
        path.write_text("{")
        raise RuntimeError("disk full")

    whole = trained(corpus)
    saves = []

    def write_json(path, value):
        saves.append(path)
        (torn if len(saves) == 2 else original)(path, value)

    original = trainer.write_json
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="disk full"):
        patch.setattr(trainer, "write_json", write_json)
        trained(corpus, tmp_path, save_every=2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002"]
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


@pytest.mark.parametrize("report_to", ["tensorboard", "no_such_tracker"])
def test_an_absent_tracker_says_so(report_to, corpus, tmp_path):
    if report_to == "tensorboard" and is_tensorboard_available():
        pytest.skip("tensorboard is installed")
    with pytest.raises(ValueError, match=report_to):
        Trainer(fresh_model(corpus), CONFIG, 4, report_to=report_to, folder=tmp_path)
