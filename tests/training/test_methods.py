"""Methods on hidden states and a head: where code and papers differ, shares of a batch, limits, settings, records.

A step of every method through a model is in test_unlearn.py.
"""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from npo_kernels import sequence_logprobs
from tests.training import published
from training.methods import METHODS, Method, Settings, method_named, table
from training.objective import Objective, Reference, kl_to_reference
from training.scoring import Scores

H, V, S = 12, 50, 9
ROWS = {"forget": 3, "idk": 3, "retain": 2}


def log_sigmoid_mean(x, beta):
    return -(2 / beta) * logsigmoid(x).mean()


# (sums, counts, ratios) by kind -> loss, as the papers have it
def nll(s, n, kind):
    return -s[kind].sum() / n[kind].sum()


FORGET = {
    "ga": lambda s, n, r, beta: -nll(s, n, "forget"),
    "idk": lambda s, n, r, beta: nll(s, n, "idk"),
    "npo": lambda s, n, r, beta: log_sigmoid_mean(-beta * r["forget"], beta),
    "dpo": lambda s, n, r, beta: log_sigmoid_mean(beta * (r["idk"] - r["forget"]), beta) / 2,
    "kto": lambda s, n, r, beta: log_sigmoid_mean(beta * r["idk"].detach().mean() - beta * r["forget"], beta),
    "simnpo": lambda s, n, r, beta: log_sigmoid_mean(beta * (-s["forget"] / n["forget"] - 0.3), beta),
}
WITH_CODE = [name for name, method in METHODS.items() if method.family in FORGET]  # of the papers' own repositories
NPO_REPO = {
    "dpo": lambda s, n, r, beta: log_sigmoid_mean(beta * (r["idk"] - r["forget"]), beta),
    "kto": lambda s, n, r, beta: 1 + log_sigmoid_mean(r["idk"].detach().mean() - beta * r["forget"], beta),
}


@pytest.fixture
def problem():
    """Hidden states, head and labels of all kinds of rows, and what the reference gave them."""
    g = torch.Generator().manual_seed(0)
    num = sum(ROWS.values())
    labels = torch.randint(V, (num, S), generator=g)
    labels[torch.arange(S) < 1 + torch.arange(num)[:, None] % 5] = -100
    kind_of_row = [kind for kind, count in ROWS.items() for _ in range(count)]
    hidden = torch.randn(num, S, H, generator=g, dtype=torch.float64)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    return hidden, weight, labels, kind_of_row, -30 + 5 * torch.randn(num, generator=g)


def by_kind(values, kind_of_row):
    return {kind: values[[k == kind for k in kind_of_row]] for kind in ROWS}


def expected_loss(name, settings, hidden, weight, labels, kind_of_row, refs):
    logp = (hidden @ weight.T)[:, :-1].log_softmax(-1)
    scored = labels[:, 1:] != -100
    token = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1) * scored
    s, n = by_kind(token.sum(1), kind_of_row), by_kind(scored.sum(1), kind_of_row)
    r = {kind: s[kind] - by_kind(refs, kind_of_row)[kind].double() for kind in ROWS}
    forget, _, keep = name.partition("_")
    if settings.compat == "npo-repo" and name == "idk_rt":
        weighted = settings.forget_weight * s["idk"].sum() + settings.retain_weight * s["retain"].sum()
        return -weighted / (n["idk"].sum() + n["retain"].sum())
    formula = {**FORGET, **NPO_REPO}[forget] if settings.compat == "npo-repo" else FORGET[forget]
    loss = settings.forget_weight * formula(s, n, r, settings.beta)
    return loss + settings.retain_weight * nll(s, n, "retain") if keep == "rt" else loss


def objective_of(name, settings, kind_of_row, refs, **totals):
    rows = {kind: kind_of_row.count(kind) for kind in ROWS}
    scores = {kind: Scores(some, torch.ones(len(some))) for kind, some in by_kind(refs, kind_of_row).items()}
    return Objective(METHODS[name], settings, rows, scores, **totals)


def idk_ratio(hidden, weight, labels, kind_of_row, refs):
    """Mean log-ratio of the IDK rows, which KTO takes from a forward of its own."""
    rows = [i for i, kind in enumerate(kind_of_row) if kind == "idk"]
    return (sequence_logprobs(hidden[rows].float(), weight.float(), labels[rows])[0] - refs[rows]).mean()


def rows_of(name, kind_of_row):
    return [i for i, kind in enumerate(kind_of_row) if kind in METHODS[name].kinds]


@pytest.mark.parametrize("compat", ["paper", "npo-repo"])
@pytest.mark.parametrize("name", WITH_CODE)
def test_value_and_gradients_are_those_of_the_formula(name, compat, problem):
    hidden, weight, labels, kind_of_row, refs = problem
    settings = METHODS[name].settings(gamma=0.3, forget_weight=0.7, retain_weight=1.3, compat=compat)
    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    truth = expected_loss(name, settings, *exact, labels, kind_of_row, refs)
    leaves = [t.detach().float().requires_grad_() for t in exact]
    picked = rows_of(name, kind_of_row)
    objective = objective_of(name, settings, kind_of_row, refs, idk_ratio=idk_ratio(*problem))
    loss = objective(leaves[0][picked], leaves[1], labels[picked])
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    for got, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compat", ["paper", "npo-repo"])
@pytest.mark.parametrize("name", WITH_CODE)
def test_shares_of_a_batch_with_its_totals_add_up_to_it(name, compat, problem):
    """Gradient accumulation, and processes whose gradients are averaged."""
    hidden, weight, labels, kind_of_row, refs = problem
    hidden, weight, settings = hidden.float(), weight.float(), Settings(compat=compat)
    picked, ratio = rows_of(name, kind_of_row), idk_ratio(*problem)
    whole = objective_of(name, settings, kind_of_row, refs, idk_ratio=ratio)(hidden[picked], weight, labels[picked])
    counts = by_kind((labels[:, 1:] != -100).sum(1), kind_of_row)
    totals = {"num_sequences": ROWS["forget"], "num_tokens": {k: c.sum().item() for k, c in counts.items()}}
    totals["idk_ratio"] = ratio
    parts = []
    for share in ([0, 3, 6], [1, 2, 4, 5, 7]):  # one and two of each kind, one retain row each
        mine = [i for i in share if i in picked]
        kinds = [kind_of_row[i] for i in share]
        objective = objective_of(name, settings, kinds, refs[share], **totals)
        parts.append(objective(hidden[mine], weight, labels[mine]))
    torch.testing.assert_close(sum(parts), whole)


def test_at_the_reference_npo_is_its_constant_and_its_gradient_that_of_ascent(problem):
    hidden, weight, labels, kind_of_row, refs = problem
    hidden, weight = hidden.float(), weight.float().requires_grad_()
    rows = rows_of("npo", kind_of_row)
    logps = sequence_logprobs(hidden[rows], weight.detach(), labels[rows])[0]
    objective = objective_of("npo", Settings(beta=0.1), ["forget"] * len(rows), logps)
    loss = objective(hidden[rows], weight, labels[rows])
    torch.testing.assert_close(loss, torch.tensor(2 / 0.1).mul(torch.log(torch.tensor(2.0))))
    (grad,) = torch.autograd.grad(loss, weight)
    ascent = sequence_logprobs(hidden[rows], weight, labels[rows])[0].mean()
    torch.testing.assert_close(grad, torch.autograd.grad(ascent, weight)[0])


@pytest.mark.parametrize("num_positions", [None, 40.0])
def test_the_kl_term_is_the_mean_over_the_positions_of_the_mask(num_positions, problem):
    hidden, weight, labels, *_ = problem
    g = torch.Generator().manual_seed(2)
    ref_hidden, ref_weight = torch.randn(hidden.shape, generator=g), torch.randn(V, H, generator=g)
    mask = labels != -100
    leaf = hidden.clone().requires_grad_()
    logp, ref = ((x @ w.T).log_softmax(-1) for x, w in ((leaf, weight), (ref_hidden.double(), ref_weight.double())))
    kl = (ref.exp() * (ref - logp)).sum(-1)[mask].sum() / (num_positions or mask.sum())
    term = kl_to_reference(Reference(ref_hidden, ref_weight), mask, weight=0.5, num_positions=num_positions)
    mine = hidden.float().requires_grad_()
    loss = term(mine, weight.float(), labels, cu_seqlens=None, shift=True, ignore_index=-100)
    torch.testing.assert_close(loss.double(), 0.5 * kl, rtol=1e-5, atol=0)
    (got,), (wanted,) = torch.autograd.grad(loss, mine), torch.autograd.grad(0.5 * kl, leaf)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-7)


def test_wrong_settings_and_rows_say_so(problem):
    hidden, weight, labels, kind_of_row, refs = problem
    with pytest.raises(ValueError, match="compat: expected one of"):
        Settings(compat="openunlearning")
    with pytest.raises(ValueError, match="kl_positions: expected"):
        Settings(kl_positions="prompt")
    with pytest.raises(ValueError, match=r"NPO\+RT: expected rows .* got 8 sequences"):
        objective_of("npo_rt", Settings(), kind_of_row, refs)(hidden.float(), weight.float(), labels)


READERS = {
    "sequence": lambda rows: rows.logps,
    "token": lambda rows: torch.zeros_like(rows.logps).index_add(0, rows.sequence, rows.token_logps),
    "hidden": lambda rows: torch.zeros_like(rows.logps).index_add(
        0, rows.sequence, (rows.hidden @ WEIGHT.T).log_softmax(-1).gather(1, rows.targets[:, None])[:, 0]
    ),
    "logits": lambda rows: torch.zeros_like(rows.logps).index_add(
        0, rows.sequence, rows.logits.log_softmax(-1).gather(1, rows.targets[:, None])[:, 0]
    ),
}
WEIGHT = torch.randn(V, H, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reads", READERS)
def test_a_method_reads_what_it_asks_for(reads, packed, problem):
    """The same loss from log-probabilities of sequences or tokens, hidden states or logits; with its retain term."""
    hidden, _, labels, kind_of_row, _ = problem
    picked = [i for i, kind in enumerate(kind_of_row) if kind != "idk"]
    hidden, labels = hidden.float()[picked], labels[picked]
    labels[1] = -100  # a row without a scored token
    kinds = [kind_of_row[i] for i in picked]
    num_rows = {kind: kinds.count(kind) for kind in ("forget", "retain")}
    scored = (labels[:, 1:] != -100).sum(1)
    num_scored = {k: int(sum(n for n, kind in zip(scored.tolist(), kinds, strict=True) if kind == k)) for k in num_rows}

    def squared(batch, settings):
        return batch.sequence_mean(READERS[reads](batch.rows("forget")).square())

    method = Method("m", "M", "", "", squared, "#000000", retain="nll", reads=reads)
    objective = Objective(method, Settings(retain_weight=0.3), num_rows, {}, num_scored=num_scored)
    leaf = hidden.clone().requires_grad_()
    logp = (leaf @ WEIGHT.T)[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != -100
    token = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1) * mask
    forget, retain = token.sum(1)[:3], token.sum(1)[3:]
    expected = forget.square()[[0, 2]].mean() - 0.3 * retain.sum() / mask[3:].sum()
    (wanted,) = torch.autograd.grad(expected, leaf)
    mine = hidden.clone().requires_grad_()
    if packed:
        bounds = torch.arange(len(picked) + 1, dtype=torch.int32) * S
        loss = objective(mine.flatten(0, 1), WEIGHT, labels.flatten(), cu_seqlens=bounds)
    else:
        loss = objective(mine, WEIGHT, labels)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(loss, mine)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_records_are_complete():
    """Of every method: names that say the retain term, a formula, a source, a colour; families share the colour."""
    for name, method in METHODS.items():
        family, keep = METHODS[method.family], name.removeprefix(method.family)
        assert method.name == name and method.formula and method.paper and re.fullmatch("#[0-9A-F]{6}", method.colour)
        own = "activations" if method.reads == "activations" else None
        assert method.retain == {"": own, "_rt": "nll", "_kl": "kl"}[keep]
        assert (method.colour == family.colour and method.line_style != family.line_style) or not keep
        assert ("retain" in method.needs) == bool(keep or own) and set(method.kinds) <= set(method.needs)
    families = {method.family: method.colour for method in METHODS.values()}
    assert len(METHODS) == 3 * len(families) > 50 and len(set(families.values())) == len(families)
    assert METHODS["simnpo_rt"].settings().forget_weight == 0.125 and METHODS["simnpo"].settings().beta == 4.5
    assert METHODS["npo"].settings(beta=0.7, gamma=None) == Settings(beta=0.7)


def test_the_readme_has_the_table_of_the_registry():
    page = (Path(__file__).resolve().parents[2] / "training" / "README.md").read_text()
    for names, formula, paper in table():
        cells = [", ".join(f"`{name}`" for name in names.split(", ")), f"`{formula}`".replace("|", "\\|"), paper]
        row = f"| {' | '.join(cells)} |"
        assert row in page, f"the table of methods in training/README.md lacks this row:\n{row}"


def test_the_page_of_methods_has_the_losses_of_published_code():
    """Recomputed: rows with three digits, of the page's own text."""
    page = (Path(__file__).resolve().parents[2] / "training" / "methods" / "README.md").read_text()
    for line in published.table().splitlines():
        assert line in page


def test_the_names_of_open_unlearning_are_known():
    names = {"GradAscent": "ga", "GradDiff": "ga_rt", "NPO": "npo_rt", "SimNPO": "simnpo_rt", "IdkDPO": "dpo_rt",
             "AltPO": "altpo_rt", "RMU": "rmu", "UNDIAL": "undial", "CEU": "ceu", "SatImp": "satimp_rt",
             "WGA": "wga_rt", "PDU": "pdu_rt"}  # fmt: skip
    assert {name: method_named(name).name for name in names} == names
    page = (Path(__file__).resolve().parents[2] / "training" / "methods" / "README.md").read_text()
    assert all(f"| {theirs} | `{ours}` |" in page for theirs, ours in names.items())
