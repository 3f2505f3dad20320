"""What the families of methods have of their own: limits, certain models, the dual weight, the top K, memory."""

import math
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from npo_kernels.core import plan
from tests.training.conftest import fit, llama
from tests.training.test_unlearn import CONFIG, CPU, check_step, made_up, make_steps, step_gradients
from training import dual as dual_module
from training.checkpoints import Checkpoints
from training.dual import DualWeight
from training.methods import METHODS, Batch, Head, Reference, Rows, Settings
from training.methods.distillation import teacher_entropy
from training.methods.distribution import log_top_mass
from training.methods.representation import direction
from training.model import build_model
from training.scoring import score
from training.steps import Batches, FinetuningSteps
from training.trainer import Trainer

H, V = 16, 60


@pytest.fixture
def model(corpus):
    return llama(corpus, num_layers=2)


def tokens(logps, counts, **more):
    """Rows of given token log-probabilities."""
    counts = torch.tensor(counts)
    sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    sums = torch.zeros(len(counts), dtype=logps.dtype).index_add(0, sequence, logps)
    return Batch({"forget": Rows(counts, sums, token_logps=logps, sequence=sequence, **more)})


def gradient(name, logps, counts, settings=None, **more):
    leaf = logps.clone().requires_grad_()
    method = METHODS[name]
    loss = method.loss(tokens(leaf, counts, **more), settings or method.settings())
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


LOGPS = torch.tensor([-0.001, -2.0, -0.4, -7.0, -1.1, -0.2])
COUNTS = [2, 0, 1, 3]
MEAN = torch.full((6,), 1 / 6)


def test_limits_are_gradient_ascent():
    """beta -> 0, and at the reference; the mean over tokens, or over sequences of means."""
    _, ascent = gradient("ga", LOGPS, COUNTS)
    torch.testing.assert_close(ascent, MEAN)
    small = {"beta": 1e-7}
    torch.testing.assert_close(gradient("wga", LOGPS, COUNTS, Settings(**small))[1], MEAN)
    torch.testing.assert_close(gradient("satimp", LOGPS, COUNTS, Settings(beta2=0.0, **small))[1], MEAN)
    wga, satimp = (gradient(name, LOGPS, COUNTS, Settings(beta=2.0, beta2=0.0)) for name in ("wga", "satimp"))
    assert wga[0] == satimp[0] and torch.equal(wga[1], satimp[1])
    for beta in (0.1, 3.0):
        loss, grad = gradient("tnpo", LOGPS, COUNTS, Settings(beta=beta), ref_token_logps=LOGPS)
        assert loss == pytest.approx(2 / beta * math.log(2), rel=1e-6)
        torch.testing.assert_close(grad, MEAN)
    _, grad = gradient("tnpo", LOGPS, COUNTS, Settings(**small), ref_token_logps=LOGPS - 3.0)
    torch.testing.assert_close(grad, MEAN)
    of_sequences = torch.tensor([1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9])  # three of the four have tokens
    torch.testing.assert_close(gradient("catnip", LOGPS, COUNTS, Settings(**small))[1], of_sequences)


def test_catnip_weighs_a_token_by_twice_its_probability_at_beta_1():
    _, grad = gradient("catnip", LOGPS, COUNTS, Settings(beta=1.0))
    of_sequences = torch.tensor([1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9])
    torch.testing.assert_close(grad, 2 * LOGPS.exp() * of_sequences)


def test_ceu_is_finite_for_a_model_that_is_certain_and_where_nothing_is_left():
    """Its gradient is that of -log(1 - p) up to p / (1 - p); 1 - p of 1e-9 has all its digits."""
    logps = torch.tensor([-1e-9, -1e-30, -0.0, -30.0])
    entropy = torch.tensor([1e-8, 1e-28, 0.0, 3.0])
    loss, grad = gradient("ceu", logps, [4], Settings(skip_tokens=0), statistics={"entropy": entropy})
    assert math.isfinite(loss) and grad.isfinite().all()
    torch.testing.assert_close(grad[:2], torch.tensor([1e9, 1e30]) / 4, rtol=1e-5, atol=0)
    for skip, left in ((1, [1, 2, 4]), (3, []), (9, [])):
        counts, numbers = [3, 2], torch.tensor([-0.5, -1.0, -2.0, -0.7, -3.0])
        statistics = {"entropy": torch.full((5,), 2.0)}
        loss, grad = gradient("ceu", numbers, counts, Settings(skip_tokens=skip), statistics=statistics)
        assert grad.nonzero().flatten().tolist() == left and (loss == 0) == (not left)


def test_ceu_of_a_certain_model_is_its_formula(corpus, model, reference):
    """After memorisation most tokens have 1 - p below 1e-3: plain float32 loses the gradient there."""
    config = replace(CONFIG, epochs=40, lr=5e-3, batch_size=12)
    fit(model, FinetuningSteps(corpus.forget[:12], config, Batches(0, CPU, False)))
    assert score(model, corpus.forget[:12], 0).answer_probability.median() > 0.9
    check_step(make_steps(corpus, "ceu_rt", reference=reference), model, reference, 0)


def test_skipping_all_tokens_gives_no_gradient_through_the_model(corpus, model, reference):
    steps = make_steps(corpus, "ceu", settings=Settings(skip_tokens=500), reference=reference)
    loss, gradients = step_gradients(model, steps.passes(model, 0))
    assert loss == 0 and all((g == 0).all() for g in gradients)


def test_undial_of_a_model_that_is_its_teacher(corpus, model):
    """shift -> 0: nothing to learn. The entropy of the shifted teacher is what the cross-entropy has beside the KL."""
    steps = make_steps(corpus, "undial", settings=Settings(beta=1e-6), reference=model.eval())
    loss, gradients = step_gradients(model, steps.passes(model, 0))
    assert abs(loss) < 1e-6 and max(g.abs().max() for g in gradients) < 1e-5
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=g) for n in (7, V))
    labels = torch.randint(V, (7,), generator=g)
    z = (hidden @ weight.T).double() - 3.0 * torch.nn.functional.one_hot(labels, V)
    rows = Rows(torch.tensor([7]), hidden=hidden, targets=labels)
    found = teacher_entropy(rows, Head(weight), Reference(hidden, weight), 3.0)
    torch.testing.assert_close(found.double(), -(z.softmax(-1) * z.log_softmax(-1)).sum(-1), rtol=1e-4, atol=1e-5)


def test_the_direction_is_of_the_seed_and_steering_ends_there():
    assert torch.equal(direction(H, 3), direction(H, 3)) and not torch.equal(direction(H, 3), direction(H, 4))
    assert direction(H, 3).norm().item() == pytest.approx(1.0)
    counts, sequence = torch.tensor([1, 3]), torch.tensor([0, 1, 1, 1])
    target = 2.0 * direction(H, 0)
    h = torch.stack([target, target, target, target + 1.0]).requires_grad_()
    rows = Rows(counts, sequence=sequence, activations=h, ref_activations=7.0 * torch.eye(H)[:4])
    loss = METHODS["rmu"].loss(Batch({"forget": rows}), Settings(steering=2.0))
    assert loss.item() == pytest.approx(1 / 6)  # one token of three of one sequence of two, 1 in every dimension
    far = METHODS["adaptive_rmu"].loss(Batch({"forget": rows}), Settings(steering=2.0 / 7.0))
    assert far.item() == pytest.approx(1 / 6, rel=1e-5)  # the same length, from activations of length 7


@pytest.mark.parametrize("name", ["wga_rt", "ceu_rt", "pdu_rt", "undial_rt", "rmu", "dipo_kl"])
def test_optimiser_steps_do_not_depend_on_accumulation(name, corpus, reference):
    """Six steps of AdamW: losses and final weights, with whole batches and with micro-batches of two."""
    before = [p.detach().clone() for p in llama(corpus, num_layers=2).parameters()]

    def run(micro_batch_size):
        start = llama(corpus, num_layers=2)
        settings = METHODS[name].settings(dual_warmup_epochs=0.0, retain_weight=1.0)
        config = replace(CONFIG, batch_size=5, micro_batch_size=micro_batch_size)
        return fit(start, make_steps(corpus, name, config, settings, reference, model=start)), list(start.parameters())

    (whole, weights), (cut, others) = run(None), run(2)
    assert len(whole) == 6 and cut == pytest.approx(whole, rel=1e-4)
    moved = [(one - start).norm() for one, start in zip(weights, before, strict=True)]
    assert max(moved) > 0.01
    for one, other, distance in zip(weights, others, moved, strict=True):
        assert (one - other).norm() <= 0.02 * distance


# ------------------------------------------------------------------ DiPO


def plain_top_mass(hidden, head, top_k):
    z = head.logit_scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z.log_softmax(-1).topk(top_k).values.logsumexp(-1)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("top_k", [1, 5, V - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mass_of_the_top_k_and_its_gradients(dtype, top_k, softcap, monkeypatch):
    """In chunks of two rows; no worse than twice plain code in the same dtype, against float64."""
    monkeypatch.setattr("training.methods.distribution.default_workspace", lambda device: 4 * 3 * 2 * V)
    g = torch.Generator().manual_seed(1)
    shapes = ((7, H), (V, H), (V,))
    exact = [torch.randn(*shape, generator=g).to(dtype).double() for shape in shapes]
    upstream = torch.randn(7, generator=g)

    def run(function, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        head = Head(leaves[1], leaves[2], 0.7, softcap)
        out = function(leaves[0], head, top_k)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    truth = run(plain_top_mass, exact)
    plain, ours = (run(f, [t.to(dtype) for t in exact]) for f in (plain_top_mass, log_top_mass))
    assert ours[0].dtype == torch.float32 and [t.dtype for t in ours[1:]] == [dtype] * 3
    for found, usual, wanted in zip(ours, plain, truth, strict=True):
        floor = 1e-6 * wanted.abs().max()
        assert (found - wanted).abs().max() <= 2 * (usual - wanted).abs().max() + floor


def test_dipo_at_its_ends():
    """A shift -> 0 makes both distributions the model's own; a bad top_k is refused."""
    hidden, head = torch.randn(5, H), Head(torch.randn(V, H))
    rows = Rows(torch.tensor([2, 3]), sequence=torch.tensor([0, 0, 1, 1, 1]), hidden=hidden, head=head)
    loss = METHODS["dipo"].loss(Batch({"forget": rows}), Settings(beta=0.5, shift=1e-4))
    assert loss.item() == pytest.approx(4 * math.log(2), rel=1e-3)
    for top_k in (V, V + 1):
        with pytest.raises(ValueError, match=f"top_k: expected 1 to {V - 1}"):
            METHODS["dipo"].loss(Batch({"forget": rows}), Settings(top_k=top_k))
    empty = log_top_mass(hidden[:0].requires_grad_(), head, 3)
    assert empty.shape == (0,)


# ------------------------------------------------------------------ PDU


def test_the_retain_weight_follows_the_whole_step_however_it_is_cut(corpus, model, reference):
    """Three steps by hand; with micro-batches the same; from a checkpoint the same; before the warm-up nothing."""
    settings = Settings(epsilon=0.5, dual_lr=0.1, retain_weight=2.0)

    def weights(micro_batch_size, stop=None, **given):
        config = replace(CONFIG, micro_batch_size=micro_batch_size)
        steps = make_steps(corpus, "pdu_rt", config, replace(settings, **given), reference)
        seen = []
        for k in range(3):
            if k == stop:
                resumed = make_steps(corpus, "pdu_rt", config, replace(settings, **given), reference)
                resumed.dual.load_state_dict(steps.dual.state_dict())
                steps = resumed
            passes = steps.passes(model, k)
            seen.append(steps.dual.weight)
            step_gradients(model, passes)
        return seen, steps

    whole, steps = weights(None)
    nll = METHODS["ga_rt"]
    expected = [2.0]
    for k in range(2):
        rows = [steps.rows["retain"][i] for i in steps.plan.steps[k].retain]
        scores = score(model, rows, 0)
        mean = -(scores.logps.sum() / scores.num_tokens.sum()).item()
        expected.append(expected[-1] + 0.1 * (mean - 0.5))
    assert nll.retain == "nll" and whole == pytest.approx(expected, rel=1e-5) and whole[1] > 2.0
    assert weights(2)[0] == pytest.approx(whole, rel=1e-6)
    assert weights(None, stop=2)[0] == whole and weights(2, stop=1)[0] == weights(2)[0]
    assert weights(None, dual_warmup_epochs=1.0)[0] == [2.0, 2.0, 2.0]  # of two steps an epoch
    published = weights(2, dual_update="micro_batch")[0]
    assert published[1] > whole[1] + 0.1  # four updates a step, not one
    low = weights(None, epsilon=100.0)[0]
    assert low[1:] == [0.0, 0.0]  # never below


def test_the_dual_weight_weighs_kl_as_well(corpus, model, reference):
    settings = Settings(epsilon=0.5, dual_lr=0.1, retain_weight=2.0)
    steps = make_steps(corpus, "pdu_kl", settings=settings, reference=reference)
    step_gradients(model, steps.passes(model, 0))
    passes = steps.passes(model, 1)
    assert steps.dual.weight > 2.0
    check_step(make_steps(corpus, "pdu_kl", settings=settings, reference=reference), model, reference, 1)
    loss, _ = step_gradients(model, passes)
    fresh = make_steps(corpus, "pdu_kl", settings=settings, reference=reference)
    plain, _ = step_gradients(model, fresh.passes(model, 1))
    assert loss > plain


def test_processes_agree_on_the_dual_weight(monkeypatch):
    """Of shares with other sums and counts: the weight is that of the sum over processes."""
    shares = [(torch.tensor(12.0), torch.tensor(4)), (torch.tensor(3.0), torch.tensor(1)), (torch.tensor(0.0), 0)]
    monkeypatch.setattr(dual_module.distributed, "total", lambda seen: torch.tensor([15.0, 5.0]))
    weights = []
    for total, count in shares:
        dual = DualWeight(Settings(epsilon=1.0, dual_lr=0.5, retain_weight=1.0), 4, CPU)
        dual.begin_step(0)
        dual.observe(total, torch.as_tensor(count))
        dual.begin_step(1)
        weights.append(dual.weight)
    assert weights == [1.0 + 0.5 * (3.0 - 1.0)] * 3


def test_a_primal_dual_run_is_resumed_with_its_weight(corpus, model, reference, tmp_path):
    """Through the trainer's checkpoints, bit for bit."""

    def trainer_of(steps, start):
        torch.manual_seed(0)
        found = Trainer(start, steps.config, len(steps))
        found.states["dual"] = steps.dual
        return found

    def fresh():
        start = build_model(len(corpus.tokenizer), hidden_size=64, num_layers=1, special_ids={}, seed=0)
        return start, make_steps(
            corpus, "pdu_rt", settings=Settings(dual_lr=0.3, retain_weight=1.0), reference=reference
        )

    whole, steps = fresh()
    trainer_of(steps, whole).train(steps)
    half, first = fresh()
    checkpoints, trainer = Checkpoints(tmp_path, "key"), trainer_of(first, half)

    class EnoughError(Exception):
        pass

    def stop_after_two(metrics):
        if metrics.step == 2:
            checkpoints.save(trainer, 2, None)
            raise EnoughError

    with pytest.raises(EnoughError):
        trainer.train(first, after_step=stop_after_two)
    rest, second = fresh()
    trainer = trainer_of(second, rest)
    done, *_ = checkpoints.load(trainer)
    assert second.dual.weight == first.dual.weight != 1.0
    trainer.train(second, first_step=done)
    assert second.dual.weight == steps.dual.weight
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))


# ------------------------------------------------------------------ memory


def largest_allocation(run) -> int:
    """Bytes of the largest tensor that was made, in custom operators as well, which dispatch modes do not look into."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    most, pending = 0, list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        tag, fields = event.typed
        if tag == torch._C._profiler._EventType.Allocation:
            most = max(most, fields.alloc_size)
    return most


@pytest.mark.parametrize("family", dict.fromkeys(method.family for method in METHODS.values()))
def test_a_fused_step_makes_no_tensor_of_tokens_by_vocabulary(family, corpus, monkeypatch):
    """With a workspace of a twentieth of the logits. The gradient of the head is as large as it is."""
    vocab_size = 2**15
    monkeypatch.setitem(plan.DEFAULT_WORKSPACE_MB, "cpu", 2)
    big, other = (build_model(vocab_size, 64, 1, {}, seed=i) for i in (0, 1))
    name = f"{family}_kl" if family == "npo" else f"{family}_rt"
    steps = make_steps(corpus, name, replace(CONFIG, batch_size=12), reference=other.eval(), model=big)
    scored = sum(label != -100 for i in steps.plan.steps[0].forget for label in steps.rows["forget"][i].labels[1:])
    logits = scored * vocab_size * 4
    assert largest_allocation(lambda: step_gradients(big, steps.passes(big, 0))) < logits / 3


def test_made_up_references_are_cut_by_rows(corpus):
    scores = made_up(corpus.forget)
    ends = scores.num_tokens.cumsum(0)
    picked = scores.rows([3, 0], CPU)
    wanted = [scores.token_logps[ends[2] : ends[3]], scores.token_logps[: ends[0]]]
    assert torch.equal(picked.token_logps, torch.cat(wanted)) and picked.hidden is None
    assert torch.equal(picked.logps, scores.logps[[3, 0]])
