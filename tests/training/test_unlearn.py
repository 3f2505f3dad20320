"""The methods against their formulas, the step-0 invariant, the retain rows, and no logits anywhere."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from training import unlearn as unlearn_module
from training.data import collate
from training.finetune import finetune
from training.scoring import score
from training.unlearn import METHODS, Pair, check_step_zero, unlearn

CPU = torch.device("cpu")


@pytest.fixture
def pair(corpus):
    pad = corpus.tokenizer.pad_token_id
    refs = torch.linspace(-120.0, -60.0, 4)
    return Pair(collate(corpus.forget[:4], pad, CPU), collate(corpus.retain[3:7], pad, CPU), refs)


def answer_logps(model, batch):
    """(B,) sums and counts from the model's logits."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    tokens = -F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return tokens.sum(1), (labels != -100).sum(1)


def test_methods_are_their_formulas(model, pair):
    logps, counts = answer_logps(model, pair.forget)
    retain_logps, retain_counts = answer_logps(model, pair.retain)
    npo = (2 / 0.3) * F.softplus(0.3 * (logps - pair.ref_logps)).mean()
    expected = {
        "npo_rt": npo - 0.7 * retain_logps.sum() / retain_counts.sum(),
        "ga": logps.sum() / counts.sum(),
    }
    assert expected.keys() == METHODS.keys()
    for name, formula in expected.items():
        loss = METHODS[name].loss(model, pair, 0.3, 0.7)
        torch.testing.assert_close(loss, formula, rtol=1e-5, atol=1e-5)
        ours, theirs = (torch.autograd.grad(x, model.lm_head.weight, retain_graph=True)[0] for x in (loss, formula))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_step_zero_holds_for_the_reference_itself(corpus, model):
    pad = corpus.tokenizer.pad_token_id
    refs = score(model, corpus.forget, pad).logps
    result = check_step_zero(model, corpus.forget, refs, pad, batch_size=6, beta=0.1)
    assert result["loss"] == pytest.approx(20 * math.log(2), abs=1e-3)
    assert result["max_abs_log_ratio"] < 1e-3


def test_step_zero_catches_misplaced_references(corpus, model):
    pad = corpus.tokenizer.pad_token_id
    refs = score(model, corpus.forget, pad).logps
    alternating = 0.01 * (-1.0) ** torch.arange(len(refs))  # the mean loss stays, the ratios do not
    for wrong in (refs.roll(1), refs + 0.01, refs + alternating):
        with pytest.raises(RuntimeError, match="expected \\(2/beta\\) ln 2"):
            check_step_zero(model, corpus.forget, wrong, pad, batch_size=6, beta=0.1)


def settings(**changed):
    return {"epochs": 3, "lr": 1e-3, "batch_size": 6, "beta": 0.1, "retain_weight": 1.0, "seed": 4, **changed}


def test_retain_rows_are_drawn_anew_each_epoch(corpus, model, monkeypatch):
    def drawn_rows():
        rows = []

        def record(model, pair, beta, retain_weight):
            rows.append([tuple(ids[ids > 0].tolist()) for ids in pair.retain["input_ids"]])
            assert len(rows[-1]) == len(pair.forget["input_ids"]) == len(pair.ref_logps)
            return sum(p.sum() for p in model.parameters()) * 0.0

        monkeypatch.setitem(unlearn_module.METHODS, "ga", replace(METHODS["ga"], loss=record))
        refs = torch.zeros(len(corpus.forget))
        list(unlearn(model, "ga", corpus.forget, corpus.retain, refs, 0, **settings()))
        return [[row for batch in rows[e * 4 : e * 4 + 4] for row in batch] for e in range(3)]

    epochs = drawn_rows()
    known = {tuple(e.input_ids) for e in corpus.retain}
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == len(corpus.forget) and set(epoch) <= known
    assert set(epochs[0]) != set(epochs[1]) != set(epochs[2])
    assert epochs == drawn_rows()


def test_fewer_retain_than_forget_rows(corpus, model):
    few = corpus.retain[:8]
    refs = torch.zeros(len(corpus.forget))
    losses = list(unlearn(model, "npo_rt", corpus.forget, few, refs, 0, **settings(epochs=1)))
    assert len(losses) == 1 and math.isfinite(losses[0])


def test_no_logits_are_formed(corpus, model, monkeypatch):
    def refuse(*_):
        raise AssertionError("the head was applied")

    monkeypatch.setattr(model.lm_head, "forward", refuse)
    pad = corpus.tokenizer.pad_token_id
    refs = score(model, corpus.forget, pad).logps
    finetune(model, corpus.retain[:8], pad, epochs=1, lr=1e-3, batch_size=4, seed=0)
    for method in METHODS:
        (loss,) = unlearn(model, method, corpus.forget, corpus.retain, refs, pad, **settings(epochs=1))
        assert math.isfinite(loss)
