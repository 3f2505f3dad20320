"""bfloat16 is arithmetic, not storage: weights and moments stay float32, and small updates are kept."""

import pytest
import torch

from tests.training.conftest import fit
from training.config import TrainConfig
from training.model import autocast, autocast_dtype, build_model, set_precision, skips_other_rows
from training.scoring import score
from training.steps import Batches, FinetuningSteps
from training.trainer import Trainer

CPU = torch.device("cpu")


def test_auto_is_float32_on_a_cpu(model):
    assert autocast_dtype(model) is None
    assert autocast_dtype(set_precision(model, "bf16")) is torch.bfloat16
    with autocast(model):
        assert torch.is_autocast_enabled("cpu")
    assert autocast_dtype(set_precision(model, "fp32")) is None


def test_scores_in_bf16_are_near_and_not_the_same(corpus, model):
    plain = score(model, corpus.forget, 0).logps
    low = score(set_precision(model, "bf16"), corpus.forget, 0).logps
    assert 0 < (low - plain).abs().max() < 0.02 * plain.abs().max()


def test_small_updates_are_kept_by_float32_weights_alone(corpus):
    """AdamW moves a weight by about lr a step: 1e-5 is lost on nearly all weights of this size in bfloat16."""
    config = TrainConfig(
        epochs=1, lr=1e-5, batch_size=10, warmup_epochs=0.0, lr_scheduler_type="constant", weight_decay=0.0
    )
    changed = {}
    for storage in (torch.float32, torch.bfloat16):
        model = build_model(len(corpus.tokenizer), hidden_size=64, num_layers=1, special_ids={}, seed=0)
        set_precision(model.to(storage), "bf16")
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "proj" in name}
        fit(model, FinetuningSteps(corpus.retain[:20], config, Batches(0, CPU, packing=False)))
        after = dict(model.named_parameters())
        assert all(p.dtype == storage for p in after.values())
        moved = sum((after[name] != old).sum().item() for name, old in before.items())
        changed[storage] = moved / sum(old.numel() for old in before.values())
    assert changed[torch.float32] > 0.98
    assert changed[torch.bfloat16] < 0.1


def test_moments_are_float32_under_autocast(corpus, model):
    config = TrainConfig(epochs=1, lr=1e-3, batch_size=10)
    job = FinetuningSteps(corpus.retain[:10], config, Batches(0, CPU, packing=False))
    trainer = Trainer(set_precision(model, "bf16"), config, len(job))
    trainer.train(job)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert moments and all(value.dtype == torch.float32 for value in moments)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"lr_scheduler_type": "constant", "warmup_epochs": 0.0}, [1, 1, 1, 1]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, [0, 0.5, 1, 1]),
        ({"warmup_steps": 0.25}, [0, 1, 2 / 3, 1 / 3]),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 0.0}, [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules_are_those_of_transformers(changed, expected, corpus, model):
    config = TrainConfig(epochs=2, lr=1e-2, batch_size=10, **changed)
    job, rates = FinetuningSteps(corpus.retain[:20], config, Batches(0, CPU, packing=False)), []
    Trainer(model, config, len(job)).train(job, after_step=lambda metrics: rates.append(metrics.lr))
    assert rates == pytest.approx([1e-2 * x for x in expected], rel=1e-4, abs=1e-9)


def test_accumulation_steps_say_the_same_as_micro_batches(corpus, model):
    counts = []
    for changed in ({"micro_batch_size": 3}, {"gradient_accumulation_steps": 4}, {}):
        config = TrainConfig(epochs=1, lr=1e-3, batch_size=10, **changed)
        job = FinetuningSteps(corpus.retain[:10], config, Batches(0, CPU, packing=False))
        counts.append([len(inputs["input_ids"]) for inputs, *_ in job.passes(model, 0)])
    assert counts == [[3, 3, 3, 1], [3, 3, 3, 1], [10]]


def test_rows_are_packed_where_attention_skips_the_others():
    found = {name: skips_other_rows(name) for name in (None, "sdpa", "eager", "flash_attention_2", "flex_attention")}
    assert found == {None: False, "sdpa": False, "eager": False, "flash_attention_2": True, "flex_attention": True}
    assert skips_other_rows("kernels-community/flash-attn3")
