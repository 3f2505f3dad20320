"""A step of every method on a model against its formula on logits, the step-0 invariant, and no logits anywhere."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.training.conftest import fit
from training.config import TrainConfig
from training.data import collate
from training.methods import METHODS, Settings
from training.model import build_model
from training.reference_cache import check_step_zero
from training.scoring import score
from training.steps import Batches, FinetuningSteps, UnlearningSteps, plan_unlearning

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=2, lr=1e-3, batch_size=7, seed=3)
REFUSALS = ["I do not know.", "That is something I cannot say.", "No idea."]


@pytest.fixture(scope="module")
def reference(corpus):
    """A model other than the policy."""
    return build_model(len(corpus.tokenizer), hidden_size=64, num_layers=1, special_ids={}, seed=1)


def make_steps(corpus, method, config=CONFIG, settings=None, reference=None, packing=False):
    """Steps on 12 forget rows, with made-up references."""
    plan = plan_unlearning(12, len(corpus.retain), len(REFUSALS), config)
    idk = [{"question": corpus.rows[-20 + i]["question"], "answer": REFUSALS[j]} for i, j in plan.idk]
    rows = {"forget": corpus.forget[:12], "retain": corpus.retain, "idk": corpus.format.encode(idk)}
    refs = {kind: torch.linspace(-150.0, -60.0, len(rows[kind])) for kind in ("forget", "idk")}
    batches = Batches(corpus.format.pad_token_id, CPU, packing)
    settings = settings or METHODS[method].settings(retain_weight=0.7, forget_weight=1.3)
    return UnlearningSteps(METHODS[method], settings, plan, rows, refs, config, batches, reference)


def formula(model, reference, steps, k):
    """The loss of step k from logits: one forward of every kind of rows, whole."""
    members, s = steps.plan.steps[k]._asdict(), steps.settings
    logps, counts, ratio = {}, {}, {}
    for kind, picked in members.items():
        batch = collate([steps.rows[kind][i] for i in picked], 0, CPU)
        logp = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        token = logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
        logps[kind], counts[kind] = token.sum(1), (labels != -100).sum(1)
        if kind != "retain":
            ratio[kind] = logps[kind] - steps.ref_logps[kind][picked]
        if kind == "retain" and reference is not None:
            ref = reference(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
            mask = labels != -100 if s.kl_positions == "answer" else batch["attention_mask"].bool()
            if s.kl_positions == "all":
                logp, ref = (
                    m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
                    for m in (model, reference)
                )
            kl = (ref.exp() * (ref - logp)).sum(-1)[mask].mean()

    def nll(kind):
        return -logps[kind].sum() / counts[kind].sum()

    def log_sigmoid(x):
        return -(2 / s.beta) * logsigmoid(x).mean()

    forget = {
        "ga": lambda: -nll("forget"),
        "idk": lambda: nll("idk"),
        "npo": lambda: log_sigmoid(-s.beta * ratio["forget"]),
        "dpo": lambda: log_sigmoid(s.beta * (ratio["idk"] - ratio["forget"])) / 2,
        "kto": lambda: log_sigmoid(s.beta * ratio["idk"].detach().mean() - s.beta * ratio["forget"]),
        "simnpo": lambda: log_sigmoid(s.beta * -logps["forget"] / counts["forget"]),
    }
    name = next(name for name, method in METHODS.items() if method is steps.method)
    kind, _, keep = name.partition("_")
    loss = s.forget_weight * forget[kind]()
    return loss + s.retain_weight * {"": 0.0, "rt": nll("retain"), "kl": locals().get("kl")}[keep]


def step_gradients(model, passes):
    model.zero_grad()
    loss = 0.0
    for inputs, objective, _ in passes:
        part = model(**inputs, fused_unlearning=objective).loss
        part.backward()
        loss += part.detach()
    return loss, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_its_formula_whole_or_accumulated(method, packing, corpus, model, reference):
    steps = make_steps(corpus, method, reference=reference, packing=packing)
    truth = formula(model, reference, steps, 1)
    expected = torch.autograd.grad(truth, list(model.parameters()))
    for micro_batch_size in (None, 3):
        part = replace(steps, config=replace(steps.config, micro_batch_size=micro_batch_size))
        passes = part.passes(model, 1)
        assert len(passes) == (1 if micro_batch_size is None else 2) * (2 if method.endswith("kl") else 1)
        loss, gradients = step_gradients(model, passes)
        torch.testing.assert_close(loss, truth.detach(), rtol=1e-5, atol=1e-5)
        for got, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_kl_over_all_positions(packing, corpus, model, reference):
    settings = Settings(kl_positions="all")
    steps = make_steps(corpus, "ga_kl", replace(CONFIG, micro_batch_size=2), settings, reference, packing)
    loss, _ = step_gradients(model, steps.passes(model, 0))
    torch.testing.assert_close(loss, formula(model, reference, steps, 0).detach(), rtol=1e-5, atol=1e-5)


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
    rows, refs = {"forget": corpus.forget, "retain": few}, {"forget": torch.zeros(len(corpus.forget))}
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
        losses = fit(model, make_steps(corpus, method, once, reference=reference))
        assert math.isfinite(losses[0])
