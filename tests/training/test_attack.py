"""Both attacks from end to end on a model that is small."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.conftest import fit
from training.commands.attack import AttackOptions, main
from training.commands.options import build
from training.config import TrainConfig
from training.relearning import relearn_, split
from training.steps import Batches, FinetuningSteps


def test_relearning_brings_the_rows_back(corpus, model):
    pad = corpus.tokenizer.pad_token_id
    learned = TrainConfig(epochs=1, lr=2e-3, batch_size=8)
    fit(model, FinetuningSteps(corpus.retain, learned, Batches(pad, torch.device("cpu"), packing=False)))
    config = TrainConfig(epochs=3, lr=5e-3, batch_size=4)
    history = relearn_(model, corpus.forget[:8], corpus.forget[8:], pad, config)
    assert [h["step"] for h in history] == list(range(7))
    assert history[-1]["relearned"] > 2 * history[0]["relearned"] > 0
    assert history[-1]["relearned"] > history[-1]["others"]


def test_what_is_relearned_is_a_seeded_share():
    examples = list(range(20))
    relearned, others = split(examples, 0.2, seed=3)
    assert len(relearned) == 4 and sorted(relearned + others) == examples and relearned == sorted(relearned)
    assert split(examples, 0.2, 3)[0] == relearned != split(examples, 0.2, 4)[0]
    assert [len(part) for part in split(examples[:2], 0.001, 0)] == [1, 1]
    with pytest.raises(ValueError, match="expected at least 2 examples of the forget set, got 1"):
        split(examples[:1], 0.5, 0)


@pytest.fixture
def data_dir(tmp_path, corpus) -> Path:
    def write(name, rows):
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))

    rows = [dict(r, paraphrased_answer=f"So: {r['answer']}", perturbed_answer=["no", "none"]) for r in corpus.rows]
    for name in ("retain", "real_authors", "world_facts", "forget10"):
        write(f"{name}_perturbed", rows[-3:])
    write("forget10", corpus.rows[-20:])
    return tmp_path


@pytest.mark.parametrize("attack,stages", {"quantize": ["int8", "int4", "nf4"], "relearn": ["relearned"]}.items())
def test_attacks_from_end_to_end(tmp_path, data_dir, corpus, model, attack, stages):
    model.save_pretrained(tmp_path / "model")
    corpus.tokenizer.save_pretrained(tmp_path / "model")
    chosen = build(
        AttackOptions, attack=attack, model=tmp_path / "model", data_dir=str(data_dir), out=tmp_path / "out", epochs=1,
        max_new_tokens=3, device="cpu",
    )  # fmt: skip
    result = main(*chosen)
    assert main(*chosen) == result  # found
    with pytest.raises(ValueError, match="holds a run with other settings"):
        main(replace(chosen[0], seed=1), chosen[1])
    assert list(result["stages"]) == ["unlearned", *stages]
    assert bool(result["history"]) == (attack == "relearn")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    report = (tmp_path / "out" / "report.md").read_text()
    assert str(tmp_path) not in report + (tmp_path / "out" / "config.json").read_text()
    assert f"{result['stages'][stages[-1]]['forget_prob']:.3g}" in report
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="expected --model"):
        main(*build(AttackOptions, attack="relearn", model=tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="--fraction: expected a share between 0 and 1, got 1"):
        main(*build(AttackOptions, attack="relearn", model=tmp_path, data_dir=tmp_path, fraction=1))
