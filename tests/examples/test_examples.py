"""Every example runs and computes what its documentation states."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples import plain_loop, transformers_trainer, trl_dataset
from examples.tiny import collate, tiny_model

ROOT = Path(__file__).resolve().parents[2]
FIRST_NPO = 20 * math.log(2)  # (2/beta) ln 2


def test_plain_loop():
    losses = plain_loop.main()
    assert losses["fused"] == pytest.approx(losses["with logits"], rel=1e-4)
    assert losses["fused"][0] == pytest.approx(FIRST_NPO, rel=1e-5)
    assert losses["fused"][-1] < losses["fused"][0]


# ---------------------------------------------------------------------------------------------------------------------
# transformers.Trainer
# ---------------------------------------------------------------------------------------------------------------------


def logged(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def whole_batches():
    return transformers_trainer.main(batch_size=6, use_cpu=True)


def test_the_trainers_first_loss_is_the_formula():
    trainer = transformers_trainer.main(batch_size=12, epochs=1, use_cpu=True)
    model = tiny_model()
    rows = transformers_trainer.example_rows(model)
    batch = transformers_trainer.collate_rows(rows)
    logps = plain_loop.plain_logps(model, batch).detach()
    torch.testing.assert_close(logps, batch["ref_logps"])
    keep = ~batch["forget"]
    nll = -logps[keep].sum() / (batch["labels"][keep] != -100).sum()
    assert logged(trainer)[0] == pytest.approx(FIRST_NPO + nll.item(), rel=1e-4)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 6), (4, 2)])
def test_accumulated_micro_batches_are_the_whole_batch(batch_size, accumulate, whole_batches):
    """One row at a time, and 4 + 4 + 4 rows where the last step accumulates a single micro-batch."""
    trainer = transformers_trainer.main(batch_size=batch_size, accumulate=accumulate, use_cpu=True)
    expected = whole_batches
    if batch_size == 4:  # steps of 8 and 4 rows
        expected = transformers_trainer.main(batch_size=8, use_cpu=True)
    assert logged(trainer) == pytest.approx(logged(expected), rel=1e-4)
    # Adam divides by the size of the gradient: where it is 0 up to rounding, steps differ
    assert (weights(trainer) - weights(expected)).norm() < 1e-3 * weights(expected).norm()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """2 processes x 2 rows x 2 micro-batches: the 8 rows of a step, then the 4 that are left."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "training/launch/ddp.yaml"]
    command = [sys.executable, *launcher, "-m", "tests.examples.trainer_rank", str(tmp_path / "weights.safetensors")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = transformers_trainer.main(batch_size=8, use_cpu=True)
    trained = load_file(tmp_path / "weights.safetensors")
    assert trained["losses"].tolist() == pytest.approx(logged(expected), rel=1e-4)
    error = sum((trained[name] - p).norm() ** 2 for name, p in expected.model.state_dict().items()) ** 0.5
    start = sum(
        (p - q).norm() ** 2 for p, q in zip(tiny_model().parameters(), expected.model.parameters(), strict=True)
    )
    assert error < 0.02 * start**0.5


def test_the_trainer_refuses_what_needs_logits():
    with pytest.raises(ValueError, match="compute_metrics"):
        transformers_trainer.UnlearningTrainer(tiny_model(), compute_metrics=lambda _: {})


def test_evaluation_returns_the_loss(whole_batches):
    rows = transformers_trainer.example_rows(tiny_model())
    found = whole_batches.evaluate(rows)["eval_loss"]
    assert math.isfinite(found) and found < logged(whole_batches)[0]


# ---------------------------------------------------------------------------------------------------------------------
# TRL's format
# ---------------------------------------------------------------------------------------------------------------------


def test_trl_dataset():
    rows = trl_dataset.precompute(tiny_model(), trl_dataset.ROWS)
    logps = plain_loop.plain_logps(tiny_model(), collate(rows))
    assert [row["ref_logps"] for row in rows] == pytest.approx(logps.tolist(), rel=1e-5)
    assert [row["forget"] for row in rows] == [True, True, False, False]
    losses = logged(trl_dataset.main())
    assert FIRST_NPO < losses[0] < FIRST_NPO + 10 and losses[-1] < losses[0]
