"""Rounded weights: their levels, forgetting trained with them, and evaluation after rounding."""

import json
import math
from contextlib import suppress
from dataclasses import replace
from typing import get_args

import pytest
import torch
from accelerate.utils import DistributedType
from scipy.stats import norm
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from npo_kernels.hf import add_fused_unlearning_head
from tests.training.conftest import fit
from training.checkpoints import Checkpoints
from training.commands import attack, evaluate, grid, unlearn
from training.commands.options import build, parse
from training.config import Rounding, TrainConfig
from training.durable import SharpnessAware
from training.memory import estimate
from training.model import add_adapters, build_model, set_precision
from training.quantization import FORMATS, formats_named, linear_weights, nf4_levels, quantize_, rounded
from training.run import Schedule, run
from training.steps import Batches, FinetuningSteps
from training.trainer import DivergedError, Trainer

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=2, lr=1e-2, batch_size=10, micro_batch_size=4, seed=1, saf_format="int4", saf_rho=0.3)
# arXiv 2305.14314, appendix E
PUBLISHED = (-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0,
             0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0)  # fmt: skip


# ------------------------------------------------------------------ formats


def test_the_levels_of_nf4_are_the_published_ones():
    levels = nf4_levels()
    torch.testing.assert_close(levels, torch.tensor(PUBLISHED, dtype=torch.float64), rtol=0, atol=1e-5)
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    assert levels[8].item() == pytest.approx(norm.ppf(0.5 + (outermost - 0.5) / 8) / norm.ppf(outermost), rel=1e-12)


def uneven(rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 3, rows)[:, None]
    weight[2] = 0
    return weight


@pytest.mark.parametrize(("bits", "name"), [(8, "int8"), (4, "int4")])
def test_integers_are_evenly_spaced_in_their_row(bits, name):
    weight, levels = uneven(7, 33), 2 ** (bits - 1) - 1
    got = FORMATS[name](weight)
    scale = (weight.abs().amax(1, keepdim=True) / levels).clamp(min=1e-30)
    assert ((got - weight).abs() <= 0.5001 * scale).all()  # the nearest
    torch.testing.assert_close(got / scale, (got / scale).round(), rtol=0, atol=1e-4)
    assert (got / scale).abs().amax() <= levels + 1e-4
    torch.testing.assert_close(got.abs().amax(1), weight.abs().amax(1))
    torch.testing.assert_close(FORMATS[name](got), got)
    assert not got[2].any()


@pytest.mark.parametrize("columns", [64, 128, 33, 64 + 7])
def test_nf4_takes_the_nearest_level_of_its_block(columns):
    weight = uneven(5, columns)
    got = FORMATS["nf4"](weight)
    assert got.shape == weight.shape
    for row, rounded_row in zip(weight, got, strict=True):
        for block, taken in zip(row.split(64), rounded_row.split(64), strict=True):
            levels = block.abs().max() * nf4_levels().float()
            nearest = (block[:, None] - levels).abs().min(1).values
            torch.testing.assert_close((taken - block).abs(), nearest, rtol=1e-5, atol=1e-7 * block.abs().max().item())
            assert set(taken.tolist()) <= set(levels.tolist())
    assert torch.equal(FORMATS["nf4"](got), got)


def test_formats_have_their_order():
    """Of normal weights, which NormalFloat is made for."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    int8, int4, nf4 = ((FORMATS[name](weight) - weight).norm().item() for name in ("int8", "int4", "nf4"))
    assert int8 < nf4 / 5 < int4 / 6


def test_formats_are_named_in_one_place():
    assert set(get_args(Rounding)) == {"off", *FORMATS}
    assert formats_named("int4, nf4,int4") == ["int4", "nf4"] and formats_named("") == []
    with pytest.raises(ValueError, match="--rounded: expected formats of int8, int4, nf4, got 'int3'"):
        formats_named("int4,int3")


# ------------------------------------------------------------------ models


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def with_adapters(model, dropout=0.0):
    model = add_adapters(model, rank=4, alpha=8, dropout=dropout, seed=7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return model


def test_the_head_and_what_it_shares_are_left_alone(model):
    before = bits(model)
    quantize_(model, "int4")
    assert changed(model, before) == {name for name in before if name.endswith("proj.weight")}
    model.model.layers[0].self_attn.q_proj.weight = model.lm_head.weight  # whoever shares it
    model.model.layers[0].self_attn.k_proj.weight = model.model.layers[0].self_attn.v_proj.weight
    assert len(linear_weights(model)) == 7 - 2
    untied = build_model(100, hidden_size=64, num_layers=1, special_ids={}, seed=0)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert len(linear_weights(untied)) == 7


def test_of_adapters_the_weights_below_are_rounded(model):
    model = with_adapters(model)
    before = bits(model)
    quantize_(model, "nf4")
    names = changed(model, before)
    assert len(names) == 7 and all(name.endswith("proj.base_layer.weight") for name in names)


def test_a_model_without_linear_layers_says_so(model):
    with pytest.raises(ValueError, match="there is nothing to round"):
        model.model.layers = nn.ModuleList()
        linear_weights(model)


def test_a_linear_layer_that_lies_the_other_way_is_rounded_by_its_outputs():
    """GPT-2's Conv1D."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    layer = gpt2.transformer.h[0].mlp.c_fc
    before = layer.weight.detach().clone()
    with rounded(gpt2, "int4"):
        assert torch.equal(layer.weight, FORMATS["int4"](before.T).T) and not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before) and len(linear_weights(gpt2)) == 4


@pytest.mark.parametrize("format", FORMATS)
def test_inside_weights_are_rounded_and_after_it_they_are_what_they_were(format, model):
    before = bits(model)
    with suppress(RuntimeError), rounded(model, format) as inside:
        assert inside is model
        for name in changed(model, before):
            assert torch.equal(model.get_parameter(name), FORMATS[format](before[name]))
        assert len(changed(model, before)) == 7
        raise RuntimeError
    assert changed(model, before) == set()


# ------------------------------------------------------------------ sharpness-aware forgetting


def job(corpus, **options):
    return FinetuningSteps(corpus.retain[:30], replace(CONFIG, **options), Batches(0, CPU, True))


def gradients_of(model, passes):
    """{name: gradient} where the model is, and the loss."""
    model.zero_grad()
    loss = 0.0
    for inputs, objective, _ in passes:
        part = model(**inputs, fused_unlearning=objective).loss
        part.backward()
        loss += part.item()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, loss


def by_hand(model, passes, format, rho):
    """Gradients and loss at Q(w + rho g / |g|), in two passes without the code under test."""
    if rho:
        g, _ = gradients_of(model, passes)
        length = math.sqrt(sum(v.double().square().sum().item() for v in g.values()))
        with torch.no_grad():
            for name, v in g.items():
                model.get_parameter(name).add_(v * (rho / length))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("proj.weight", "proj.base_layer.weight")):
                p.copy_(FORMATS[format](p))
    return gradients_of(model, passes)


def gradients_of_a_step(model, steps):
    """({name: gradient} as the optimiser sees them, the weights as it does, metrics) of the first step, unclipped."""
    trainer = Trainer(model, replace(steps.config, max_grad_norm=0), len(steps))
    seen = []

    def look(*_):
        seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        seen.append(bits(model))

    trainer.optimizer.optimizer.register_step_pre_hook(look)
    metrics = trainer.step(steps.passes(model, 0))  # which moves nothing: the warm-up begins at 0
    return *seen, metrics


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_a_step_has_the_gradient_at_the_rounded_weights(rho, format, lora, corpus, model):
    model = with_adapters(model) if lora else model
    steps = job(corpus, saf_format=format, saf_rho=rho)
    before = bits(model)
    seen, weights, metrics = gradients_of_a_step(model, steps)
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    passes = steps.passes(model, 0)
    assert len(passes) == 3
    at_w, loss_at_w = gradients_of(model, passes)
    expected, loss = by_hand(model, passes, format, rho)
    assert seen.keys() == expected.keys() and len(seen) == (14 if lora else len(before))
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())
    assert metrics.loss == pytest.approx(loss, rel=1e-5) and metrics.loss != pytest.approx(loss_at_w, rel=1e-6)
    norm = math.sqrt(sum(v.double().square().sum().item() for v in expected.values()))
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    assert any(not torch.allclose(seen[name], at_w[name], rtol=1e-3) for name in seen)


def test_micro_batches_are_the_whole_batch(corpus, model):
    whole, parts = (gradients_of_a_step(model, job(corpus, micro_batch_size=size))[0] for size in (None, 3))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4 * whole[name].abs().max().item())


def test_under_autocast_the_weights_stay_what_they_are(corpus, model):
    set_precision(model, "bf16")
    before = bits(model)
    steps = job(corpus)
    metrics = Trainer(model, steps.config, len(steps)).step(steps.passes(model, 0))
    assert changed(model, before) == set() and math.isfinite(metrics.loss)
    set_precision(model, "fp32")
    _, loss = by_hand(model, steps.passes(model, 0), "int4", 0.3)
    assert metrics.loss == pytest.approx(loss, rel=0.02)


def test_without_a_gradient_nothing_moves(model):
    before = bits(model)
    saf = SharpnessAware(model, "int4", rho=1.0)

    def nothing():
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    with saf.rounded(nothing):
        assert len(changed(model, before)) == 7  # by rounding alone
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("at", [1, 2, 4, 6], ids=lambda at: f"pass {at}")
def test_a_step_that_raises_leaves_the_weights(at, corpus, model):
    """Of three passes to climb, and three at the rounded weights."""
    steps, before = job(corpus), bits(model)
    trainer, count = Trainer(model, steps.config, len(steps)), 0

    def failing(objective):
        def called(*args, **options):
            nonlocal count
            count += 1
            if count == at:
                raise RuntimeError("out of memory")
            return objective(*args, **options)

        return called

    passes = [p._replace(objective=failing(p.objective)) for p in steps.passes(model, 0)]
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.step(passes)
    assert count == at and changed(model, before) == set()


def test_a_loss_that_is_not_finite_stops_with_the_weights_as_they_were(corpus, model):
    steps, before = job(corpus), bits(model)
    passes = [
        p._replace(objective=lambda *a, p=p, **k: p.objective(*a, **k) * math.inf) for p in steps.passes(model, 0)
    ]
    with pytest.raises(DivergedError, match="Lower --lr"):
        Trainer(model, steps.config, len(steps)).step(passes)
    assert changed(model, before) == set()


def test_tokens_are_counted_once(corpus, model):
    steps, counted = job(corpus), []
    metrics = Trainer(model, steps.config, len(steps)).step(steps.passes(model, 0), after_pass=counted.append)
    assert len(counted) == 3 and sum(counted) == metrics.num_tokens


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters with dropout"])
def test_a_resumed_run_is_the_uninterrupted_one(lora, corpus, tmp_path):
    def trained(folder, kill_at=None):
        model = build_model(len(corpus.tokenizer), hidden_size=64, num_layers=1, special_ids={}, seed=0)
        if lora:
            model = add_fused_unlearning_head(with_adapters(model, dropout=0.2))
        steps = FinetuningSteps(corpus.retain[:20], CONFIG, Batches(0, CPU, True))
        engine = Trainer(model, steps.config, len(steps))

        def measure(step, progress):
            if step == kill_at:
                raise RuntimeError("killed")
            return {}

        checkpoints = Checkpoints(folder, "key")
        history = run(engine, steps, Schedule(len(steps), 1, 2), measure, label="t", checkpoints=checkpoints)
        return bits(model), history

    whole = trained(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        trained(tmp_path / "killed", kill_at=3)
    torch.manual_seed(99)
    resumed = trained(tmp_path / "killed")
    assert resumed[1] == whole[1]
    assert all(torch.equal(resumed[0][name], weight) for name, weight in whole[0].items())


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_shards_are_refused(kind, corpus, model, monkeypatch):
    monkeypatch.setattr("training.trainer.Accelerator.distributed_type", kind)
    with pytest.raises(ValueError, match="--saf_format rounds weights that a process holds whole"):
        Trainer(model, CONFIG, 4)


def test_options_that_do_not_fit_say_so(tmp_path):
    with pytest.raises(ValueError, match="--saf_rho: expected 0 or more, got -1"):
        TrainConfig(saf_rho=-1)
    with pytest.raises(ValueError, match="--saf_format: expected one of off, int8, int4, nf4, got 'int3'"):
        TrainConfig(saf_format="int3")
    with pytest.raises(ValueError, match="--rounded: expected --model"):
        evaluate.main(*build(evaluate.EvaluateOptions, from_log=tmp_path / "log.json", rounded="int4"))
    with pytest.raises(ValueError, match="--rounded: expected formats"):
        grid.Grid(*build(grid.GridOptions, benchmark="authors", rounded="int3"))


def test_the_copy_is_in_the_estimate(tmp_path):
    config = LlamaConfig(vocab_size=20_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    same = {"bf16": False, "packing": False, "attn_implementation": None, "gradient_checkpointing": False,
            "with_reference": False, "device": CPU}  # fmt: skip
    linear = sum(w.numel() for w in linear_weights(model))
    for trained, copied in (("all", model.num_parameters()), (4, linear)):
        found, without = (estimate(tmp_path, [9], trained=trained, with_rounding=on, **same) for on in (True, False))
        assert found["copy"] == pytest.approx(4 * copied / 2**30, rel=0.02) and without["copy"] == 0
        assert found["total"] - found["python"] > without["total"] - without["python"]


# ------------------------------------------------------------------ evaluation


@pytest.fixture(scope="module")
def home(corpus, tmp_path_factory):
    """A folder with a `model` that knows four authors a little."""
    home = tmp_path_factory.mktemp("rounded")
    model = build_model(len(corpus.tokenizer), hidden_size=64, num_layers=1, special_ids={}, seed=0)
    fit(model, FinetuningSteps(corpus.retain + corpus.forget, TrainConfig(epochs=3, lr=5e-3), Batches(0, CPU, True)))
    model.save_pretrained(home / "model")
    corpus.tokenizer.save_pretrained(home / "model")
    return home


def of_authors(home, **changed):
    same = {"benchmark": "authors", "authors": 4, "forget_percent": 25, "retain_eval_authors": 1, "device": "cpu"}
    return same | {"model": str(home / "model")} | changed


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["all weights", "adapters"])
def test_a_run_evaluates_its_rounded_model(lora_rank, home, tmp_path):
    """With the numbers of the saved model, rounded: adapters are merged into it before."""
    given = of_authors(home, method="npo", out=tmp_path / "run", epochs=2, lr=5e-3, warmup_epochs=0, eval_steps=0,
                       rounded="int4, nf4", saf_format="int4", lora_rank=lora_rank)  # fmt: skip
    chosen = build(unlearn.UnlearnOptions, **given)
    metrics = unlearn.main(*chosen)
    assert unlearn.main(*chosen) == metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    with pytest.raises(ValueError, match="holds a run with other settings"):
        unlearn.main(replace(chosen[0], rounded="int4"), chosen[1])
    assert list(metrics["attacks"]) == ["int4", "nf4"]
    after = metrics["history"][-1]["forget_prob"]
    table = (tmp_path / "run" / "report.md").read_text().split("## After attacks\n\n")[1].split("\n\n")[0]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| before",
        "| after",
        "| after, int4",
        "| after, nf4",
    ]
    shown = [metrics["history"][0], metrics["history"][-1], *metrics["attacks"].values()]
    for line, summary in zip(table.splitlines()[2:], shown, strict=True):
        assert f" | {summary['forget_prob']:.3g} | {summary['retain_prob']:.3g} |" in line
    for format, summary in metrics["attacks"].items():
        assert summary["forget_prob"] != pytest.approx(after, rel=1e-4)
        assert (tmp_path / "run" / "eval" / f"{format}.json").exists()
    same = {"model": tmp_path / "run" / "model", "out": tmp_path / "evaluation", "rounded": "int4"}
    asked = {k: v for k, v in of_authors(home).items() if k != "model"}
    found = evaluate.main(*build(evaluate.EvaluateOptions, **asked, **same))
    assert found == pytest.approx(metrics["attacks"]["int4"], rel=1e-5)
    if lora_rank:  # saving merges them as well
        given |= {"out": tmp_path / "not saved", "save_model": False}
        assert unlearn.main(*build(unlearn.UnlearnOptions, **given))["attacks"] == metrics["attacks"]
        return
    with pytest.raises(ValueError, match="holds a run with other settings"):
        evaluate.main(*build(evaluate.EvaluateOptions, **asked, **same | {"rounded": "off"}))
    attacked = build(attack.AttackOptions, attack="quantize", **asked, model=same["model"], out=tmp_path / "attack")
    stages = attack.main(*attacked)["stages"]
    for format, summary in metrics["attacks"].items():
        assert summary == pytest.approx(stages[format], rel=1e-5)


def test_a_run_without_formats_has_no_such_table(home, tmp_path):
    metrics = unlearn.main(*build(unlearn.UnlearnOptions, **of_authors(home, method="ga", out=tmp_path, epochs=1)))
    assert metrics["attacks"] == {} and "attacks\n" not in (tmp_path / "report.md").read_text()


def test_shards_are_not_rounded(home, tmp_path, monkeypatch):
    class Sharded(Trainer):
        sharded = property(lambda self: True, lambda self, found: None)

    monkeypatch.setattr(unlearn, "Trainer", Sharded)
    given = of_authors(home, method="ga", out=tmp_path, epochs=1, rounded="int8")
    with pytest.raises(ValueError, match="--rounded: expected one process, or DDP"):
        unlearn.main(*build(unlearn.UnlearnOptions, **given))


def test_a_grid_has_one_table_of_it(home, tmp_path):
    given = of_authors(home, methods="npo", seeds="0,1", retrain=False, epochs=1, finetune_epochs=1, lr=5e-3,
                       warmup_epochs=0, eval_steps=0, rounded="int4", relearn=0.3, out=tmp_path)  # fmt: skip
    runs = grid.main(*build(grid.GridOptions, **given))["runs"]
    report = (tmp_path / "report.md").read_text()
    table = report.split("### After attacks, forget25\n\n")[1].split("\n\n")[0]
    assert table.splitlines()[0] == "| model | forget prob | forget prob, int4 | forget prob, relearned |"
    found = [
        [run["history"][-1], run["attacks"]["int4"], run["attacks"]["relearned"]] for run in runs
    ]  # fmt: skip
    after, rounded_too, relearned = ([some["forget_prob"] for some in each] for each in zip(*found, strict=True))
    assert len(set(after)) == 2  # seeds
    assert f"| NPO | {sum(after) / 2:.3g} | {sum(rounded_too) / 2:.3g} | {sum(relearned) / 2:.3g} |" in table


@pytest.mark.parametrize("method", [{"method": "npo", "train_only": ".*layers.*"}, {"method": "rmu", "layer": 0}],
                         ids=["npo", "rmu"])  # fmt: skip
def test_a_run_relearns_as_the_attack_on_its_model_does(method, home, corpus, tmp_path):
    """All layers, whatever was frozen or cut off. The model that is saved is the one before."""
    model = build_model(len(corpus.tokenizer), hidden_size=64, num_layers=2, special_ids={}, seed=0)
    fit(model, FinetuningSteps(corpus.retain + corpus.forget, TrainConfig(epochs=2, lr=5e-3), Batches(0, CPU, True)))
    model.save_pretrained(tmp_path / "two")
    corpus.tokenizer.save_pretrained(tmp_path / "two")
    given = of_authors(home, out=tmp_path / "run", epochs=2, lr=5e-3, warmup_epochs=0, eval_steps=0, relearn=0.2,
                       relearn_epochs=2, **method) | {"model": str(tmp_path / "two")}  # fmt: skip
    metrics = unlearn.main(*build(unlearn.UnlearnOptions, **given))
    asked = {k: v for k, v in of_authors(home).items() if k != "model"}
    same = {"fraction": 0.2, "epochs": 2, "lr": 5e-3, "batch_size": 32, "model": tmp_path / "run" / "model"}
    stages = attack.main(*build(attack.AttackOptions, attack="relearn", **asked, **same, out=tmp_path / "a"))["stages"]
    assert metrics["attacks"]["relearned"] == pytest.approx(stages["relearned"], rel=1e-5)
    assert metrics["history"][-1]["forget_prob"] == pytest.approx(stages["unlearned"]["forget_prob"], rel=1e-5)
    assert stages["relearned"]["forget_prob"] > 1.02 * stages["unlearned"]["forget_prob"]
    with pytest.raises(ValueError, match="--relearn_epochs, --relearn_lr: expected more than 0, got 0 and None"):
        unlearn.Unlearning(*build(unlearn.UnlearnOptions, **given | {"relearn_epochs": 0}))
    with pytest.raises(ValueError, match="--relearn: expected a share of the forget set, 0 to 1, got 1"):
        unlearn.Unlearning(*build(unlearn.UnlearnOptions, **given | {"relearn": 1.0}))


def test_a_file_may_say_off(tmp_path):
    (tmp_path / "options.yaml").write_text("saf_format: off\n")
    chosen, *_ = parse(unlearn.UnlearnOptions, "p", "", ["--config", str(tmp_path / "options.yaml")])
    assert chosen.saf_format == "off"
