"""The graph experiment at a small size: the graph, influence by removal, losses against plain code, and the command."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from training.commands.graph import GraphOptions, main
from training.papers.inpo_graph import figures
from training.papers.inpo_graph.experiment import (
    METHODS,
    Curve,
    Forgetting,
    Method,
    curves,
    forget_loss,
    loss_of,
    measure,
    unlearn,
)
from training.papers.inpo_graph.influence import influence_weights, removal_influence
from training.papers.inpo_graph.report import claims, verdict
from training.papers.inpo_graph.setting import GCN, Graph, Setting, _edges, make_setting

BETA, NODES = 2.0, 100
FEW = 80  # steps of training, of which a small graph needs no more


@pytest.fixture(scope="module")
def setting() -> Setting:
    return make_setting(NODES, seed=3, train_steps=FEW)


@pytest.fixture(scope="module")
def constants(setting) -> Forgetting:
    return Forgetting.of(setting)


@pytest.fixture
def moved(setting) -> GCN:
    """A model on its way: away from the reference, where all log-ratios are 0."""
    rng = torch.Generator().manual_seed(5)
    model = deepcopy(setting.reference).requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return model


def dense(graph: Graph, cut: tuple[int, ...] = ()) -> torch.Tensor:
    """(n, n) S in float64, from the list of edges, without those of the nodes that are cut off."""
    A = torch.zeros(len(graph), len(graph), dtype=torch.float64)
    for i, neighbours in enumerate(graph.neighbours.split(graph.degrees.tolist())):
        A[i, neighbours] = 1
    A[list(cut)] = A[:, list(cut)] = 0
    A += torch.eye(len(graph), dtype=torch.float64)
    scale = A.sum(1).rsqrt()
    return scale[:, None] * A * scale


def plain(S: torch.Tensor, words: torch.Tensor, embedding: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(n, 7) log-probabilities in float64."""
    X = torch.zeros(len(words), len(embedding), dtype=torch.float64)
    X.scatter_add_(1, words, torch.ones_like(words, dtype=torch.float64))
    hidden = S @ torch.relu(S @ (X / words.shape[1]) @ embedding)
    return torch.log_softmax(hidden @ head.T, 1)


def doubled(model: GCN) -> list[torch.Tensor]:
    return [parameter.detach().double().requires_grad_() for parameter in (model.embedding, model.head)]


def gradients(loss: torch.Tensor, model: GCN) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, (model.embedding, model.head))


def test_a_graph_is_its_matrix():
    graph = Graph.of(torch.tensor([[0, 1], [1, 0], [1, 2], [2, 2], [4, 1]]), 5)
    assert graph.degrees.tolist() == [1, 3, 1, 0, 1] and graph.neighbours.tolist() == [1, 0, 2, 4, 1, 1]
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for i, j, a, b in ((0, 1, 2, 4), (1, 2, 4, 2), (1, 4, 4, 2)):
        expected[i, j] = expected[j, i] = (a * b) ** -0.5
    expected += torch.diag(torch.tensor([1 / 2, 1 / 4, 1 / 2, 1, 1 / 2], dtype=torch.float64))
    torch.testing.assert_close(graph.matrix.to_dense().double(), expected)
    place, neighbours = graph.links(torch.tensor([3, 1, 0]))
    assert place.tolist() == [1, 1, 1, 2] and neighbours.tolist() == [0, 2, 4, 1]
    left = graph.without(torch.tensor([1]))
    assert len(left) == 5 and left.degrees.sum() == 0


def test_the_citation_graph_is_what_it_says(setting):
    labels = torch.arange(700) % 7
    graph = Graph.of(_edges(labels, torch.Generator().manual_seed(0)), 700)
    same = labels.repeat_interleave(graph.degrees) == labels[graph.neighbours]
    assert 0.7 < same.float().mean() < 0.9
    assert 3 < graph.degrees.float().mean() < 4.2 and graph.degrees.max() > 15
    parts = torch.cat([setting.forget, setting.retain, setting.test])
    assert parts.sort().values.tolist() == list(range(NODES)) and len(setting.forget) == 6
    torch.testing.assert_close(
        setting.left.matrix.to_dense().double(), dense(setting.graph, (*setting.forget.tolist(),))
    )
    assert measure(setting, setting.retrained)["forget_kl"] == 0 < measure(setting, setting.reference)["forget_kl"]


def test_a_model_that_has_learned_nothing_is_refused():
    with pytest.raises(RuntimeError, match=r"accuracy of 0.95 on the training nodes after 1 steps, got 0\.\d+; take"):
        make_setting(NODES, seed=0, train_steps=1)


def test_influence_is_that_of_brute_force(setting):
    """Of all nodes, with hubs and leaves among them: cut each one off, and run the model on the whole graph again."""
    model, words = setting.reference, setting.words
    found = removal_influence(model, setting.graph, words, torch.arange(NODES))
    embedding, head = (parameter.detach() for parameter in doubled(model))
    before, expected = plain(dense(setting.graph), words, embedding, head).exp(), []
    for node in range(NODES):
        change = (plain(dense(setting.graph, (node,)), words, embedding, head).exp() - before).abs().sum(1) / 2
        expected.append(change.sum() - change[node])
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert found.max() > 10 * found.min()


def test_a_node_without_neighbours_has_no_influence(setting):
    graph = setting.graph.without(setting.forget[:1])
    found = removal_influence(setting.reference, graph, setting.words, setting.forget)
    assert found[0] == 0 and (found[1:] > 0).any()


def test_weights_have_mean_one():
    influence = torch.tensor([0.0, 0.1, 2.5, 0.4])
    weights = influence_weights(influence)
    torch.testing.assert_close(weights, influence / influence.mean())
    assert weights.mean().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="an influence of 0 for every node"):
        influence_weights(torch.zeros(3))


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_plain_code(name, setting, constants, moved):
    """Values, and gradients of all parameters, against float64, dense matrices and the formulas."""
    method, nodes, retain = METHODS[name], setting.forget, setting.retain
    loss = loss_of(method, setting, moved, constants, BETA)
    parameters = doubled(moved)
    whole, left = (plain(dense(graph), setting.words, *parameters) for graph in (setting.graph, setting.left))
    reference = plain(dense(setting.graph), setting.words, *doubled(setting.reference)).detach()
    logp, ref = (x[nodes].gather(1, setting.labels[nodes, None])[:, 0] for x in (whole, reference))
    weights = (
        constants.weights[method.family].double() if method.family in constants.weights else torch.ones(len(nodes))
    )
    terms = logp if method.family == "ga" else weights * 2 / BETA * torch.log1p((logp - ref).exp() ** BETA)
    expected = terms.mean() + (F.nll_loss(left[retain], setting.labels[retain]) if method.retain else 0)
    assert (logp - ref).abs().min() > 1e-4
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(loss, moved), torch.autograd.grad(expected, parameters), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_inpo_and_its_control_have_the_same_weights_on_other_nodes(constants):
    inpo, mixed = constants.weights["inpo"], constants.weights["mixed"]
    assert inpo.mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(inpo.sort().values, mixed.sort().values) and not torch.equal(inpo, mixed)


def test_equal_influence_is_npo(setting, constants, moved):
    """To the bit, whatever the method of the retain term."""
    even = constants._replace(weights={"inpo": influence_weights(torch.full((len(setting.forget),), 0.5))})
    for retain in (False, True):
        inpo, npo = (loss_of(Method(family, retain), setting, moved, even, BETA) for family in ("inpo", "npo"))
        assert torch.equal(inpo, npo)
        assert all(map(torch.equal, gradients(inpo, moved), gradients(npo, moved)))


def test_a_node_of_influence_zero_gets_no_gradient(setting, constants, moved):
    influence = torch.ones(len(setting.forget))
    influence[2] = 0
    some = constants._replace(weights={"inpo": influence_weights(influence)})
    hidden = moved(setting.graph, moved.bags(setting.words))[setting.forget].detach().requires_grad_()
    forget_loss("inpo", hidden, moved.head, setting.labels[setting.forget], some, BETA).backward()
    assert (hidden.grad[2] == 0).all() and (hidden.grad.abs().sum(1) > 0).sum() == len(influence) - 1


def test_npo_tends_to_gradient_ascent(setting, constants, moved):
    """As beta -> 0, and weighted NPO to weighted ascent; the gradients tell, as the loss has a constant that grows."""
    ascent = gradients(loss_of(METHODS["GA"], setting, moved, constants, BETA), moved)
    apart = []
    for beta in (1.0, 0.1, 1e-3):
        npo = gradients(loss_of(METHODS["NPO"], setting, moved, constants, beta), moved)
        apart.append(max((ours - theirs).norm() / theirs.norm() for ours, theirs in zip(npo, ascent, strict=True)))
    assert apart[0] > 5 * apart[1] > 25 * apart[2] and apart[2] < 1e-3


def test_a_step_goes_down_the_loss(setting, constants):
    found = unlearn(setting, METHODS["INPO+RT"], constants, BETA, lr=1e-3, steps=10)
    assert {len(values) for values in found.values()} == {3}
    assert found["forget_probability"][0] > found["forget_probability"][1] > found["forget_probability"][2]
    assert all(not parameter.requires_grad for parameter in setting.reference.parameters())


def test_curves_stop_where_the_retrained_model_is():
    """Between two evaluations by a line; at the end where it is never reached; at the start where it is behind."""
    probability = np.array([[0.9, 0.7, 0.3], [0.9, 0.8, 0.7], [0.5, 0.4, 0.3]])
    values = {"forget_probability": probability, "test_kl": np.array([[0.0, 1.0, 3.0]] * 3)}
    curve = Curve(np.array([0, 5, 10]), values, np.array([0.6, 0.6, 0.6]))
    assert curve.reached().tolist() == [True, False, True]
    at = curve.at_aim()
    np.testing.assert_allclose(at["step"], [6.25, 10, 0])
    np.testing.assert_allclose(at["test_kl"], [1.5, 3, 0])
    np.testing.assert_allclose(at["forget_probability"], [0.6, 0.7, 0.5])
    assert curve.summary()["aim_test_kl"] == 1.5 and curve.summary()["end_test_kl"] == 3


def test_claims_and_verdicts_can_fail():
    summary = {"end_test_accuracy": 0.8, "end_test_kl": 0.1}
    metrics = {
        "before": {"test_accuracy": 0.85},
        "methods": {name: dict(summary) for name in METHODS},
        "per_seed": {name: {"aim_test_kl": [1.0, 2.0, 3.0], "aim_forget_kl": [1.0, 2.0, 3.0]} for name in METHODS},
    }
    assert not any(claim.holds for claim in claims(metrics))  # all methods are the same
    assert "INPO does not beat NPO" in verdict(metrics, "") and "as far from the retrained model" in verdict(
        metrics, ""
    )
    metrics["per_seed"]["INPO"] = {"aim_test_kl": [0.5, 1.5, 4.0], "aim_forget_kl": [1.5, 2.1, 4.0]}
    apart = "closer to the retrained model on test nodes and farther from the retrained model on forget nodes"
    assert verdict(metrics, "") == f"INPO does not beat NPO here: it stops {apart}."
    holding = [claim.text for claim in claims(metrics) if claim.holds]
    assert holding == ["INPO keeps more than NPO", "INPO keeps more than the same weights, mixed"]
    metrics["per_seed"]["INPO"]["aim_forget_kl"] = [0.9, 1.9, 2.9]
    assert "INPO beats NPO here" in verdict(metrics, "") and "does not beat" in verdict(metrics, "+RT")
    metrics["methods"]["GA"] = {"end_test_accuracy": 0.2, "end_test_kl": 5.0}
    assert [c.holds for c in claims(metrics)][:3] == [True, True, False]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_setting, "__defaults__", (FEW,))
    options = GraphOptions(seeds=1, nodes=100, steps=5, lr=3e-3, out=tmp_path / "out", json=True)
    metrics = main(options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and json.loads(lines[-1]) == metrics["methods"]
    assert list(metrics["methods"]) == list(METHODS)
    assert all(math.isfinite(value) for found in metrics["methods"].values() for value in found.values())
    names = {"run.json", "options.yaml", "metrics.json", "config.json", "report.md", "figure.png"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names
    assert main(options) == metrics  # found
    with pytest.raises(ValueError, match="holds a run with other settings"):
        main(replace(options, beta=1.0))
    monkeypatch.setattr(figures, "plot_methods", lambda *_: None)  # which takes most of the time, and is of the same
    main(replace(options, out=tmp_path / "again"))
    for name in ("metrics.json", "config.json", "report.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"{metrics['methods']['INPO+RT']['aim_test_kl']:.4f}" in report and str(tmp_path) not in report
    assert verdict(metrics, "+RT") in " ".join(report.split())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["settings"]["beta"] == 3.0 and config["seeds"] == [1000] and "torch" in config["versions"]


@pytest.mark.parametrize(("given", "message"), [({"steps": 7}, "multiple of 5"), ({"nodes": 10}, "100 nodes")])
def test_what_the_command_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        main(GraphOptions(**given))


def test_curves_are_runs_of_seeds(setting, constants):
    """Which do not touch each other."""
    other = make_setting(100, seed=4, train_steps=FEW)
    of_other = Forgetting.of(other)
    both = curves([setting, other], [constants, of_other], BETA, 1e-3, steps=5)
    assert list(both) == list(METHODS)
    alone = unlearn(other, METHODS["INPO+RT"], of_other, BETA, 1e-3, steps=5)
    assert {name: values[1].tolist() for name, values in both["INPO+RT"].values.items()} == alone
