"""The logistic experiment at a small size: losses against their formulas, limits, rates, and the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from training.commands.synthetic import SyntheticOptions, main
from training.papers.npo_logistic import experiment
from training.papers.npo_logistic.collapse import diverge
from training.papers.npo_logistic.experiment import Curve, Run, beta_runs, curves, method_runs, unlearn
from training.papers.npo_logistic.methods import METHODS, SETTINGS, Outputs
from training.papers.npo_logistic.report import PAPER, claims
from training.papers.npo_logistic.setting import Setting, bernoulli_kl, make_setting


@pytest.fixture(scope="module")
def setting() -> Setting:
    return make_setting(1, seed=3, pretrain_steps=4000)


def test_the_clouds_lean_to_opposite_labels(setting):
    """P(own label) = E sigma(z + 1), z ~ N(0, 1)."""
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    expected = torch.sigmoid(z + 1).mean().item()
    assert (setting.retain_signs == -1).double().mean().item() == pytest.approx(expected, abs=0.05)
    assert (setting.forget_signs == 1).double().mean().item() == pytest.approx(expected, abs=0.1)
    assert setting.idk_signs.mean().abs() < 0.2


def test_the_models_are_stationary_points(setting):
    """Of the logistic loss of their own data, by autograd, and not of each other's."""

    def gradient(theta, features, signs):
        theta = theta.clone().requires_grad_()
        loss = torch.nn.functional.softplus(-signs * (features @ theta)).mean()
        return torch.autograd.grad(loss, theta)[0].norm().item()

    both = torch.cat([setting.retain, setting.forget]), torch.cat([setting.retain_signs, setting.forget_signs])
    assert gradient(setting.retrained, setting.retain, setting.retain_signs) < 1e-2
    assert gradient(setting.reference, *both) < 1e-2
    assert gradient(setting.retrained, *both) > 5e-2
    forget, retain = setting.distances(setting.retrained[:, None])
    assert forget.item() == retain.item() == 0
    forget, retain = setting.distances(setting.reference[:, None])
    assert forget > 10 * retain > 0


def test_bernoulli_kl():
    p, q = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    a, b = (torch.distributions.Bernoulli(logits=x) for x in (p, q))
    torch.testing.assert_close(bernoulli_kl(p, q), torch.distributions.kl_divergence(a, b))


def test_methods_are_their_formulas(setting):
    theta = setting.reference + 0.1 * torch.linspace(-1, 1, 128, dtype=torch.float64)
    o, ref = (Outputs(setting, setting.forget @ t, setting.retain @ t) for t in (theta, setting.reference))
    beta, ls = 0.7, torch.nn.functional.logsigmoid

    def logp(output, signs):
        p = torch.sigmoid(output.forget_logits)
        return torch.log(torch.where(signs > 0, p, 1 - p))

    y, y_idk = setting.forget_signs, setting.idk_signs
    r, r_idk = (logp(o, s) - logp(ref, s) for s in (y, y_idk))
    z = torch.distributions.kl_divergence(
        *(torch.distributions.Bernoulli(logits=x.forget_logits) for x in (o, ref))
    ).mean()
    forget = {
        "ga": logp(o, y).mean(),
        "idk": -logp(o, y_idk).mean(),
        "npo": -2 / beta * ls(-beta * r).mean(),
        "simnpo": -2 / beta * ls(-beta * logp(o, y)).mean(),
        "dpo": -2 / beta * ls(beta * (r_idk - r)).mean(),
        "kto": -2 / beta * ls(beta * (z - r)).mean(),
    }
    retain = {
        None: 0.0,
        "RT": -ls(setting.retain_signs * o.retain_logits).mean(),
        "KL": torch.distributions.kl_divergence(
            *(torch.distributions.Bernoulli(logits=x.retain_logits) for x in (ref, o))
        ).mean(),
    }
    for method in METHODS.values():
        torch.testing.assert_close(method.loss(o, ref, beta), forget[method.family] + retain[method.retain])


def test_runs_side_by_side_are_runs_alone(setting):
    runs = method_runs(1)
    together = unlearn(setting, list(runs.values()), steps=50)
    for i in (0, 6, 11):
        alone = unlearn(setting, [list(runs.values())[i]], steps=50)
        np.testing.assert_allclose([x[i] for x in together], [x[0] for x in alone], rtol=1e-9)


def test_a_step_is_one_of_gradient_descent(setting):
    method, lr, beta = METHODS["NPO+RT"], 5e-3, 1.0
    theta = setting.reference.clone().requires_grad_()
    ref = Outputs(setting, setting.forget @ setting.reference, setting.retain @ setting.reference)
    loss = method.loss(Outputs(setting, setting.forget @ theta, setting.retain @ theta), ref, beta)
    (gradient,) = torch.autograd.grad(loss, theta)
    expected = setting.distances((theta - lr * gradient).detach()[:, None])
    forget, retain = unlearn(setting, [Run(method, lr, beta)], steps=1, eval_every=1)
    np.testing.assert_allclose([forget[0, 1], retain[0, 1]], [x.item() for x in expected], rtol=1e-10)


def test_npo_tends_to_gradient_ascent(setting):
    """Proposition 1: at one learning rate and one number of steps, NPO with a small beta is where GA is."""
    found = curves([setting], beta_runs(), steps=1500)
    ends = [curve.retain[0, -1] for curve in found.values()]
    assert ends == sorted(ends, reverse=True) and ends[0] > 2 * ends[-1]
    tiny = unlearn(setting, [Run(METHODS["NPO"], experiment.BETA_LR, 1e-6)], steps=200)
    ascent = unlearn(setting, [Run(METHODS["GA"], experiment.BETA_LR, None)], steps=200)
    np.testing.assert_allclose(tiny, ascent, rtol=1e-4)


def test_collapse_rates_are_those_of_the_theorem():
    ascent, *npo = diverge(steps=3000)
    assert ascent.measured == pytest.approx(1.0, abs=1e-4)
    assert ascent.distance[-1] == pytest.approx(ascent.steps[-1] / 64**0.5, rel=1e-4)
    assert [d.theory for d in npo] == [80, 8, 1.6]
    for d in npo:
        assert d.measured == pytest.approx(d.theory, rel=0.02)


def test_gradient_flow_goes_where_the_steps_go():
    for flow, steps in zip(diverge(steps=1000, until=20_000), diverge(steps=20_000, until=0), strict=True):
        assert flow.distance[-1] == pytest.approx(steps.distance[-1], rel=1e-3)


def test_margins_follow_the_model():
    """The recursion on margins is gradient descent on theta, for orthonormal rows."""
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.normal(size=(512, 64)))[0].T
    margins = np.random.default_rng(0).normal(size=64)  # as `diverge` draws them
    labels = torch.from_numpy(rng.choice([-1.0, 1.0], 64))
    X = torch.from_numpy(rows)
    theta = X.T @ (labels * torch.from_numpy(margins))
    start, ref = X @ theta, torch.nn.functional.logsigmoid(labels * (X @ theta))
    for _ in range(300):
        theta.requires_grad_()
        logp = torch.nn.functional.logsigmoid(labels * (X @ theta))
        loss = 2 * torch.nn.functional.softplus(logp - ref).mean()
        theta = (theta - torch.autograd.grad(loss, theta)[0]).detach()
    (_, npo) = diverge(betas=(1.0,), steps=300, until=0)
    assert npo.distance[-1] == pytest.approx((X @ theta - start).norm().item(), rel=1e-9)


def test_summaries_are_medians():
    forget = np.array([[3.0, 1.0, 2.0], [9.0, 8.0, 700.0], [5.0, 6.0, 4.0]])
    curve = Curve(np.array([0, 25, 50]), forget, forget / 10)
    assert curve.summary() == {"end_fd": 4.0, "end_rd": 0.4, "min_fd": 4.0, "min_fd_step": 25.0, "rd_at_min_fd": 0.4}


def test_claims_can_fail():
    good = {"end_fd": 0.01, "end_rd": 0.01, "min_fd": 0.01, "min_fd_step": 1.0}
    summaries = {name: dict(good) for name in PAPER}
    assert sum(c.holds for c in claims(summaries, (1.0, 0.01))) == 2  # nobody is better than NPO+RT
    summaries["NPO+RT"].update(end_fd=0.02, end_rd=0.02)
    assert not any(c.holds for c in claims(summaries, (1.0, 0.01)))


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_setting, "__defaults__", (4000,))
    options = SyntheticOptions(alpha=0, seeds=2, steps=50, out=tmp_path / "out", json=True)
    metrics = main(options)
    lines = capsys.readouterr().out.splitlines()
    printed = json.loads(lines[-1])
    assert len(lines) == 1 and printed == metrics["methods"]
    assert list(printed) == list(METHODS) and {"GA", "NPO+RT", "KTO+KL", "SimNPO+RT"} < set(printed)
    for summary in printed.values():
        assert {"end_fd", "end_rd", "min_fd"} <= summary.keys() and all(map(math.isfinite, summary.values()))
        # the first step starts from there; one rounding may lie between the two ways to compute it
        assert summary["min_fd"] <= metrics["before"]["fd"] * (1 + 1e-12)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "run.json", "options.yaml", "metrics.json", "config.json", "report.md", "figure.png", "collapse.png"
    }  # fmt: skip
    assert main(options) == metrics  # found
    with pytest.raises(ValueError, match="holds a run with other settings"):
        main(replace(options, seeds=1))
    capsys.readouterr()
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"{printed['NPO+RT']['end_fd']:.4f}" in report and str(tmp_path) not in report
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["runs"]["NPO"] == {"lr": SETTINGS[0]["npo"][0], "beta": 10.0} and "torch" in config["versions"]


def test_a_model_that_has_not_converged_is_refused():
    with pytest.raises(RuntimeError, match=r"gradient norm below 0.01 after 10 steps, got 0\.\d+; take more"):
        make_setting(1, seed=0, pretrain_steps=10)
