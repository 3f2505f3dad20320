"""A step of every method on a model against its formula in float64, the step-0 invariant, and no logits anywhere."""

import math
from dataclasses import replace

import pytest
import torch

from tests.training.conftest import fit, llama
from tests.training.formulas import FORGET, SETTINGS, loss_of_step
from training.config import TrainConfig
from training.dual import DualWeight
from training.layers import LayerTap
from training.methods import METHODS, Reference, Settings
from training.reference_cache import check_step_zero
from training.scoring import Scores, score
from training.steps import Batches, FinetuningSteps, plan_unlearning
from training.unlearning import Frozen, UnlearningSteps

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=2, lr=1e-3, batch_size=7, seed=3)
REFUSALS = ["I do not know.", "That is something I cannot say.", "No idea."]


@pytest.fixture
def model(corpus):
    return llama(corpus, num_layers=2)


def make_steps(corpus, method, config=CONFIG, settings=None, reference=None, packing=False, model=None):
    """Steps on 12 forget rows, with made-up references; `model`: that will be run, for methods on activations."""
    record = METHODS[method]
    plan = plan_unlearning(12, len(corpus.retain), len(REFUSALS), config)
    idk = [{"question": corpus.rows[-20 + i]["question"], "answer": REFUSALS[j]} for i, j in plan.idk]
    rows = {"forget": corpus.forget[:12], "retain": corpus.retain, "idk": corpus.format.encode(idk)}
    rows["alternate"] = rows["idk"]
    settings = settings or record.settings(retain_weight=0.7, forget_weight=1.3, **SETTINGS.get(record.family, {}))
    scores = {kind: made_up(rows[kind]) for kind in ("forget", "idk", "alternate")}
    head = None
    if record.teacher and not record.taught_by_model(settings):
        scores = {"forget": score(reference, rows["forget"], 0, per_token="hidden")}
        head = Reference(torch.empty(0), reference.lm_head.weight.detach())
    tap = frozen_tap = None
    if record.reads == "activations":
        alone = record.retain == "activations"
        tap = LayerTap(model, settings.layer, "training" if alone else None)
        frozen_tap = LayerTap(reference, settings.layer, "always" if alone else None)
    dual = DualWeight(settings, len(plan.steps) // config.epochs, CPU) if record.dual and record.retain else None
    frozen = Frozen(scores, reference, head, frozen_tap)
    batches = Batches(corpus.format.pad_token_id, CPU, packing)
    return UnlearningSteps(record, settings, plan, rows, frozen, config, batches, tap, dual)


def made_up(examples):
    """Reference log-probabilities out of the air."""
    counts = torch.tensor([sum(label != -100 for label in e.labels[1:]) for e in examples])
    total = int(counts.sum())
    return Scores(torch.linspace(-150.0, -60.0, len(examples)), counts, torch.linspace(-9.0, -0.1, total))


def step_gradients(model, passes):
    model.train()
    model.zero_grad()
    loss = 0.0
    for inputs, objective, _ in passes:
        part = model(**inputs, fused_unlearning=objective).loss
        part.backward()
        loss += part.detach()
    return loss, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def check_step(steps, model, reference, k, retain_weight=None):
    """Loss and gradients of all parameters, against the formula in float64."""
    truth, exact = loss_of_step(steps, model, reference, k, retain_weight)
    expected = torch.autograd.grad(truth, list(exact.parameters()), allow_unused=True)
    loss, gradients = step_gradients(model, steps.passes(model, k))
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-6)
    largest = max(g.abs().max() for g in expected if g is not None).item()
    assert largest > 0, "the formula has no gradient here; choose constants in SETTINGS of tests/training/formulas.py"
    for got, wanted in zip(gradients, expected, strict=True):
        wanted = torch.zeros_like(got, dtype=torch.float64) if wanted is None else wanted
        torch.testing.assert_close(got.double(), wanted, rtol=2e-4, atol=2e-5 * largest)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_its_formula(method, corpus, model, reference):
    """Every family padded and packed, whole and accumulated: alone, with the NLL, with KL."""
    packing, micro = {"": (False, None), "_rt": (True, 2), "_kl": (False, 2)}[
        method.removeprefix(METHODS[method].family)
    ]
    config = replace(CONFIG, batch_size=4, micro_batch_size=micro)
    steps = make_steps(corpus, method, config, reference=reference, packing=packing, model=model)
    assert len(steps.passes(model, 1)) == (micro or 1) * (2 if method.endswith("kl") else 1)
    check_step(steps, model, reference, 1)


def test_every_family_has_its_formula():
    assert FORGET.keys() == {method.family for method in METHODS.values()}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", ["ga_kl", "rmu", "adaptive_rmu_kl"])
def test_all_positions(method, packing, corpus, model, reference):
    """KL terms and activations at every token except padding."""
    settings = METHODS[method].settings(kl_positions="all", layer=0 if "rmu" in method else None)
    config = replace(CONFIG, micro_batch_size=2)
    check_step(make_steps(corpus, method, config, settings, reference, packing, model), model, reference, 0)


@pytest.mark.parametrize("method", ["undial", "undial_rt", "pdu_rt", "rmu_rt"])
def test_published_rows(method, corpus, model, reference):
    """The positions of OpenUnlearning's code, padding and prompts of UNDIAL included."""
    settings = METHODS[method].settings(published_rows=True)
    check_step(make_steps(corpus, method, CONFIG, settings, reference, False, model), model, reference, 1)
    if method == "undial":
        with pytest.raises(ValueError, match="expected --packing off"):
            steps = make_steps(corpus, method, CONFIG, settings, reference, True, model)
            step_gradients(model, steps.passes(model, 0))


def test_a_frozen_teacher_gives_what_its_cached_hidden_states_give(corpus, model, reference):
    cached = make_steps(corpus, "undial_rt", reference=reference)
    settings = METHODS["undial_rt"].settings(teacher="model", retain_weight=0.7, forget_weight=1.3)
    for packing in (False, True):
        frozen = make_steps(corpus, "undial_rt", settings=settings, reference=reference, packing=packing)
        assert frozen.frozen.head is None
        (loss, gradients), (other, others) = (step_gradients(model, s.passes(model, 1)) for s in (cached, frozen))
        torch.testing.assert_close(loss, other)
        for one, two in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_step_zero_holds_for_the_reference_itself_in_either_layout(corpus, model):
    refs = score(model, corpus.forget, 0).logps
    for packing in (True, False):
        result = check_step_zero(model, corpus.forget, refs, Batches(0, CPU, packing), batch_size=6, beta=0.1)
        assert result["loss"] == pytest.approx(20 * math.log(2), abs=1e-3)
        assert result["max_abs_log_ratio"] < 1e-3


def test_step_zero_catches_misplaced_references(corpus, model):
    refs = score(model, corpus.forget, 0).logps
    alternating = 0.01 * (-1.0) ** torch.arange(len(refs))  # the mean loss stays, the ratios do not
    for wrong in (refs.roll(1), refs + 0.01, refs + alternating):
        with pytest.raises(ValueError, match="expected \\(2/beta\\) ln 2"):
            check_step_zero(model, corpus.forget, wrong, Batches(0, CPU, True), batch_size=6, beta=0.1)


def test_fewer_retain_than_forget_rows(corpus, model):
    few = corpus.retain[:8]
    plan = plan_unlearning(len(corpus.forget), len(few), 0, CONFIG)
    rows, refs = {"forget": corpus.forget, "retain": few}, Frozen({"forget": made_up(corpus.forget)})
    steps = UnlearningSteps(METHODS["npo_rt"], Settings(), plan, rows, refs, CONFIG, Batches(0, CPU, True))
    losses = fit(model, steps)
    assert len(losses) == 6 and all(map(math.isfinite, losses))


def test_micro_batches_are_of_similar_length_and_pairs_stay_together(corpus):
    """Sorted by length where they are padded; a refusal goes with its question."""
    steps = make_steps(corpus, "dpo_rt", replace(CONFIG, micro_batch_size=2))
    members = steps.plan.steps[0]._asdict()
    parts = steps._parts(members)
    partner = dict(zip(members["forget"], members["idk"], strict=True))
    for forget, idk in zip(parts["forget"], parts["idk"], strict=True):
        assert [partner[i] for i in forget] == idk
    for kind in ("forget", "retain"):
        assert sorted(i for part in parts[kind] for i in part) == sorted(members[kind])
    lengths = [len(corpus.retain[i].input_ids) for part in parts["retain"] for i in part]
    assert lengths == sorted(lengths)
    packed = make_steps(corpus, "dpo_rt", replace(CONFIG, micro_batch_size=2), packing=True)
    assert [i for part in packed._parts(members)["retain"] for i in part] == members["retain"]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("reads", ["token", "hidden", "logits"])
def test_whatever_a_method_reads_a_step_through_the_model_is_the_same(reads, packing, corpus, model):
    """Three rows at a time, with a retain term: how a batch of both kinds is cut into its tokens."""

    def squared(batch, settings):
        rows = batch.rows("forget")
        logps = rows.logps
        if reads == "token":
            logps = torch.zeros_like(rows.logps).index_add(0, rows.sequence, rows.token_logps)
        elif reads != "sequence":
            logits = rows.hidden @ model.lm_head.weight.T if reads == "hidden" else rows.logits
            token = logits.log_softmax(-1).gather(1, rows.targets[:, None])[:, 0]
            logps = torch.zeros_like(rows.logps).index_add(0, rows.sequence, token)
        return batch.sequence_mean(logps.square())

    plain = replace(METHODS["ga_rt"], loss=lambda batch, _: batch.sequence_mean(batch.rows("forget").logps.square()))
    steps = replace(make_steps(corpus, "ga_rt", replace(CONFIG, micro_batch_size=3), packing=packing), method=plain)
    loss, gradients = step_gradients(model, steps.passes(model, 1))
    got, of_tokens = step_gradients(
        model, replace(steps, method=replace(plain, loss=squared, reads=reads)).passes(model, 1)
    )
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-5)
    for one, other in zip(of_tokens, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


def test_no_logits_are_formed(corpus, model, reference, monkeypatch):
    def refuse(*_):
        raise AssertionError("the head was applied")

    for each in (model, reference):
        monkeypatch.setattr(each.lm_head, "forward", refuse)
    once = replace(CONFIG, epochs=1)
    fit(model, FinetuningSteps(corpus.retain[:8], once, Batches(0, CPU, True)))
    for method in METHODS:
        losses = fit(model, make_steps(corpus, method, once, reference=reference, model=model))
        assert math.isfinite(losses[0])
