"""Each fused trainer against one of the same interface that keeps its logits, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from examples import open_unlearning
from examples.open_unlearning import LOSSES, fused
from examples.tiny import PAD, collate, random_rows, tiny_model
from npo_kernels.backends.torch import blocks
from tests.support import TINY

# ---------------------------------------------------------------------------------------------------------------------
# The trainers from their formulas, with logits
# ---------------------------------------------------------------------------------------------------------------------


def predicted(model, batch):
    """((B, T-1, V) log-probabilities, (B, T-1) labels, where there is one)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    return logits[:, :-1].log_softmax(-1), labels, labels != -100


def scored_logps(model, batch):
    """(B, T-1), 0 where there is no label, and their number of each sequence."""
    log_p, labels, scored = predicted(model, batch)
    return log_p.gather(-1, labels.where(scored, 0)[..., None])[..., 0].where(scored, 0.0), scored.sum(1)


def mean_of_tokens(model, batch, weight=lambda p: 1.0):
    logps, num_tokens = scored_logps(model, batch)
    return (weight(logps.detach().exp()) * logps).sum() / num_tokens.sum()


class Trainer:
    """What they share: two parts, one forward each."""

    published_rows: bool | str = False

    def __init__(self, model, gamma=0.7, alpha=1.3, retain_loss_type="NLL", published_rows=False):
        self.model, self.gamma, self.alpha, self.retain_loss_type = model, gamma, alpha, retain_loss_type
        self.published_rows = published_rows
        self.ref_model = copy.deepcopy(model).eval()
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.ref_model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=g))

    def compute_loss(self, model, inputs, return_outputs=False):
        retain = self.compute_retain_loss(model=model, retain_inputs=inputs["retain"])
        return self.gamma * self.forget(model, inputs["forget"]) + self.alpha * retain

    def compute_retain_loss(self, model, retain_inputs):
        if self.retain_loss_type == "NLL":
            return -mean_of_tokens(model, retain_inputs)
        rows = {name: retain_inputs[name] for name in ("input_ids", "attention_mask")}
        log_p, ref_log_p = (m(**rows).logits.log_softmax(-1) for m in (model, self.ref_model))
        ref_log_p = ref_log_p.detach()
        return (ref_log_p.exp() * (ref_log_p - log_p)).sum(-1).mean()


class GradAscent(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        return mean_of_tokens(model, inputs["forget"])


class GradDiff(Trainer):
    def forget(self, model, inputs):
        return mean_of_tokens(model, inputs)


class NPO(Trainer):
    beta = 0.4

    def ratio(self, model, inputs):
        return (scored_logps(model, inputs)[0] - scored_logps(self.ref_model, inputs)[0].detach()).sum(1)

    def forget(self, model, inputs):
        return 2 / self.beta * F.softplus(self.beta * self.ratio(model, inputs)).mean()


class DPO(NPO):
    def forget(self, model, inputs):
        margin = self.ratio(model, inputs["alternate"]) - self.ratio(model, inputs["original"])
        return 2 / self.beta * F.softplus(-self.beta * margin).mean()


class SimNPO(Trainer):
    beta, delta = 1.5, 0.3

    def forget(self, model, inputs):
        logps, num_tokens = scored_logps(model, inputs)
        return 2 / self.beta * F.softplus(-self.beta * (-logps.sum(1) / num_tokens - self.delta)).mean()


class WGA(Trainer):
    beta = 0.3

    def forget(self, model, inputs):
        return mean_of_tokens(model, inputs, lambda p: p**self.beta)


class SatImp(Trainer):
    beta1, beta2 = 0.2, 1.5

    def forget(self, model, inputs):
        return mean_of_tokens(model, inputs, lambda p: p**self.beta1 * (1 - p) ** self.beta2)


class CEU(Trainer):
    ignore_first_n_answer_tokens = 1

    def compute_loss(self, model, inputs, return_outputs=False):
        log_p, labels, scored = predicted(model, inputs["forget"])
        scored = scored & (scored.cumsum(1) > self.ignore_first_n_answer_tokens)
        log_p, labels = log_p[scored], labels[scored]
        target = log_p.detach().scatter(-1, labels[:, None], -torch.inf).softmax(-1)
        return -(target * log_p).sum(-1).mean()


class UNDIAL(Trainer):
    beta = 3.0

    def forget(self, model, inputs):
        log_p, labels, scored = predicted(model, inputs)
        V = log_p.shape[-1]
        lowered = F.one_hot(labels % V if self.published_rows else labels.where(scored, 0), V)
        if self.published_rows:
            assert (-100) % V == V - 100  # where an index of -100 points
        target = (predicted(self.ref_model, inputs)[0].detach() - self.beta * lowered).softmax(-1)
        loss = -(target * log_p).sum(-1)
        return loss.mean() if self.published_rows else loss[scored].mean()


class PDU(Trainer):
    retain_loss_eps, dual_step_size = 0.8, 0.25
    primal_dual, can_update, dual_update_upon = True, True, "step"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.preferences, self.logged = [self.gamma, self.alpha], []

    def log(self, values):
        self.logged.append(values)

    def forget(self, model, inputs):
        z = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        height = (z.max(-1).values - z.mean(-1)).square()
        scored = inputs["labels"] != -100
        rows = {"all": height.flatten(), True: height[scored], False: height[:, :-1][scored[:, 1:]]}
        return rows[self.published_rows].mean()

    def compute_loss(self, model, inputs, return_outputs=False):
        forget = self.forget(model, inputs["forget"])
        retain = self.compute_retain_loss(model, inputs["retain"])
        violation = retain - self.retain_loss_eps
        loss = self.preferences[0] * forget + self.preferences[1] * violation
        values = {"forget_loss": forget.item(), "retain_loss": retain.item()}
        if self.primal_dual and self.can_update and self.dual_update_upon == "step":
            self.preferences[1] = max(0, self.preferences[1] + self.dual_step_size * violation.item())
        if self.primal_dual:
            values["retain_preference"] = self.preferences[1]
        self.log(values)
        return loss


class RMU(Trainer):
    steering_coeff = 2.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_module, self.ref_module = self.model.model.layers[0], self.ref_model.model.layers[0]

    def get_control_vector(self, dim):
        u = torch.rand(1, 1, dim, generator=torch.Generator().manual_seed(3))
        return self.steering_coeff * u / u.norm()

    def distance(self, model, inputs, target):
        squares = (self.output(model, inputs) - target).square().mean(-1)
        scored = inputs["labels"] != -100
        if self.published_rows:  # (B,) by (B, 1)
            return ((squares * scored).sum(1) / scored.sum(1, keepdim=True)).mean()
        return torch.stack([row[mask].mean() for row, mask in zip(squares, scored, strict=True)]).mean()

    def output(self, model, inputs):
        """Of the first layer: what comes before the second."""
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model(**rows, output_hidden_states=True).hidden_states[1]

    def forget(self, model, inputs):
        return self.distance(model, inputs, self.get_control_vector(model.config.hidden_size))

    def compute_retain_loss(self, model, retain_inputs):
        if self.retain_loss_type != "EMBED_DIFF":
            return super().compute_retain_loss(model, retain_inputs)
        return self.distance(model, retain_inputs, self.output(self.ref_model, retain_inputs).detach())


PLAIN = {cls.__name__: cls for cls in (GradAscent, GradDiff, NPO, DPO, SimNPO, WGA, SatImp, CEU, UNDIAL, PDU, RMU)}

# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


def batches(name: str, seed: int = 1):
    """Ragged; with seed 1 the forget rows are the longer ones, with seed 4 the retain rows."""
    forget, retain = collate(random_rows(4, seed=seed)), collate(random_rows(3, seed=seed + 1))
    if name == "DPO":
        forget = {"original": forget, "alternate": collate(random_rows(4, seed=seed + 2))}
    return {"forget": forget, "retain": retain}


def pair(name: str, model=None, **arguments):
    """A fused trainer and its plain counterpart, the same but for float64."""
    cls, model = PLAIN[name], tiny_model() if model is None else model
    exact = cls(model=copy.deepcopy(model), **arguments)
    exact.model.double(), exact.ref_model.double()
    return fused(cls)(model=model, **arguments), exact


def gradients(trainer, loss):
    return torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True)


def check(trainer, exact, inputs, rtol=2e-5, **arguments):
    """Loss and every gradient; of a gradient the largest entry gives the scale."""
    expected = exact.compute_loss(exact.model, inputs)
    loss = trainer.compute_loss(trainer.model, inputs, **arguments)
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=rtol)
    found, wanted = gradients(trainer, loss), gradients(exact, expected)
    assert any(w is not None for w in wanted)
    for (name, _), g, w in zip(trainer.model.named_parameters(), found, wanted, strict=True):
        assert (g is None) == (w is None), name
        if w is not None:
            assert w.abs().max() > 0
            torch.testing.assert_close(g.double(), w, rtol=0, atol=rtol * w.abs().max().item(), msg=name)


RETAIN = {"GradAscent": ["none"], "CEU": ["none"], "RMU": ["NLL", "KL", "EMBED_DIFF"]}
ROWS = {"UNDIAL": [False, True], "PDU": [False, True, "all"], "RMU": [False, True]}
CASES = [
    (name, retain, rows)
    for name in PLAIN
    for retain in RETAIN.get(name, ["NLL", "KL"])
    for rows in ROWS.get(name, [False])
]


def test_the_batches_are_padded_to_other_lengths():
    lengths = {seed: [b["labels"].shape[1] for b in batches("NPO", seed).values()] for seed in (1, 4)}
    assert lengths[1][0] > lengths[1][1] and lengths[4][0] < lengths[4][1]


@pytest.mark.parametrize(
    ("name", "retain", "rows", "seed"),
    # the padding of the other part matters where all positions count
    [(*case, 1) for case in CASES] + [(*case, 4) for case in CASES if case[1] == "KL" or case[2]],
)
def test_loss_and_gradients(name, retain, rows, seed):
    trainer, exact = pair(name, retain_loss_type=retain, published_rows=rows)
    assert type(trainer).__name__ == f"Fused{name}"
    check(trainer, exact, batches(name, seed))


@pytest.mark.parametrize("name", PLAIN)
def test_compute_loss_is_called_in_either_way(name):
    """By newer Trainers with num_items_in_batch, which does not change the mean; and batches may have more columns."""
    trainer, exact = pair(name)
    inputs = batches(name)
    expected = exact.compute_loss(exact.model, inputs)
    if name != "DPO":
        inputs["forget"]["index"] = torch.arange(4)
    if name in ("GradAscent", "CEU"):
        del inputs["retain"]
    if name == "PDU":
        trainer.primal_dual = False
    losses = [trainer.compute_loss(trainer.model, inputs), trainer.compute_unlearn_loss(trainer.model, inputs)]
    losses.append(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(17)))
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True, num_items_in_batch=None)
    assert outputs.loss is loss
    for found in [*losses, loss]:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "retain"), [("PDU", "NLL"), ("PDU", "KL"), ("RMU", "EMBED_DIFF")])
def test_the_retain_loss_alone(name, retain):
    """PDU asks for it after an epoch, without gradients."""
    trainer, exact = pair(name, retain_loss_type=retain)
    rows = batches(name)["retain"]
    with torch.no_grad():
        found, expected = (t.compute_retain_loss(model=t.model, retain_inputs=rows) for t in (trainer, exact))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert not found.requires_grad


def test_without_a_retain_weight_the_retain_rows_are_left_out():
    trainer, exact = pair("UNDIAL", alpha=0.0)
    inputs = batches("UNDIAL")
    expected = exact.compute_loss(exact.model, inputs)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, {"forget": inputs["forget"]}).double(), expected)


def test_the_published_rows_are_others():
    """Else the comparisons above would say nothing about them."""
    for name, choices in ROWS.items():
        inputs, losses = batches(name, seed=4), []
        for rows in choices:
            _, exact = pair(name, published_rows=rows)
            losses.append(exact.compute_loss(exact.model, inputs).item())
        assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-3


@pytest.mark.parametrize("skipped", [0, 2])
def test_ceu_skips_the_first_tokens_of_an_answer(skipped):
    trainer, exact = pair("CEU")
    trainer.ignore_first_n_answer_tokens = exact.ignore_first_n_answer_tokens = skipped
    check(trainer, exact, batches("CEU"))


@pytest.mark.parametrize("name", ["CEU", "UNDIAL", "SatImp", "WGA"])
def test_a_model_that_is_certain(name):
    """Labels that the model gives probabilities up to 0.9999, as memorised answers have."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    trainer, exact = pair(name, model=model)
    exact.ref_model = copy.deepcopy(exact.model)
    trainer.ref_model = copy.deepcopy(trainer.model)
    inputs = batches(name)
    log_p, labels, scored = predicted(exact.model, inputs["forget"])
    labels[scored] = log_p.argmax(-1)[scored]  # a view of the batch
    assert log_p.max(-1).values[scored].exp().max() > 0.9999
    check(trainer, exact, inputs, rtol=1e-4)


def test_ceu_is_finite_where_nothing_is_left_of_1_minus_p():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
    trainer, exact = pair("CEU", model=model)
    inputs = batches("CEU")
    log_p, labels, scored = predicted(exact.model, inputs["forget"])
    labels[scored] = log_p.argmax(-1)[scored]
    loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(trainer, loss))


@pytest.mark.parametrize(
    "attributes",
    [{}, {"can_update": False}, {"dual_update_upon": "epoch"}, {"primal_dual": False}, {"retain_loss_eps": 50.0}],
    ids=str,
)
def test_the_dual_weight_of_pdu_after_two_steps(attributes):
    trainer, exact = pair("PDU")
    for t in (trainer, exact):
        vars(t).update(attributes)
        for step in range(2):
            t.compute_loss(t.model, batches("PDU", seed=step))
    assert trainer.preferences == pytest.approx(exact.preferences, rel=1e-5)
    assert (exact.preferences[1] == exact.alpha) == bool(attributes and "retain_loss_eps" not in attributes)
    assert ("retain_loss_eps" in attributes) == (exact.preferences[1] == 0)
    assert trainer.logged == [pytest.approx(values, rel=1e-5) for values in exact.logged]


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def largest_allocation(run) -> int:
    """Bytes of the largest allocation, in operators and autograd functions, too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events, most = profiler.profiler.kineto_results.experimental_event_tree(), 0
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            most = max(most, event.typed[1].alloc_size)
    return most


@pytest.mark.parametrize(
    ("name", "retain", "rows"),
    [(name, "NLL", False) for name in PLAIN]
    + [("NPO", "KL", False), ("WGA", "KL", False), ("UNDIAL", "KL", True), ("RMU", "EMBED_DIFF", False)],
)
def test_no_logits_exist(name, retain, rows, monkeypatch):
    """Nothing of the size of the logits of scored forget tokens is allocated, with room for the smallest slices."""
    V = 4000
    monkeypatch.setattr(blocks, "BLOCK_V", 500)
    sizes = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=V, pad_token_id=PAD, **sizes)
    trainer, exact = pair(name, LlamaForCausalLM(config), retain_loss_type=retain, published_rows=rows)
    type(trainer).options = {"workspace_mb": TINY}
    inputs = batches(name)
    forget = inputs["forget"]["original"] if name == "DPO" else inputs["forget"]
    logits = 4 * V * (forget["labels"] != -100).sum().item()
    assert largest_allocation(lambda: trainer.compute_loss(trainer.model, inputs).backward()) < 0.5 * logits
    if (name, retain) == ("NPO", "NLL"):  # what would be seen
        assert largest_allocation(lambda: exact.compute_loss(exact.model, inputs).backward()) > 2 * logits


# ---------------------------------------------------------------------------------------------------------------------
# The example itself
# ---------------------------------------------------------------------------------------------------------------------


def test_main_and_other_trainers():
    losses = open_unlearning.main()
    assert losses[-1] < losses[0]
    assert set(LOSSES) == set(PLAIN)
    with pytest.raises(ValueError, match=r"expected one of GradAscent, .*, RMU, got FinetuneTrainer"):
        fused(type("FinetuneTrainer", (), {}))
    with pytest.raises(NotImplementedError, match="expected NLL or KL, got EMBED_DIFF"):
        trainer, _ = pair("NPO", retain_loss_type="EMBED_DIFF")
        trainer.compute_loss(trainer.model, batches("NPO"))
