"""Losses of one step by the sources' formulas and by published code where they differ, for training/methods/README.md.

    python -m tests.training.published

Both are those of the commands (`--compat`, `--published_rows`), on a small model, four rows and made-up references.
What has no switch is written out here.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import torch

from tests.training.formulas import Forward, layer_of, loss_of_step, unit_direction
from tests.training.test_unlearn import CONFIG, make_steps, step_gradients
from training.benchmarks.tofu.authors import generate_authors
from training.methods import METHODS
from training.model import build_model
from training.reports import tables
from training.templates import Format
from training.tokenizer import train_tokenizer

HEADINGS = ["method", "by the source, as here", "loss", "published code", "its loss", "option"]


class Case(NamedTuple):
    label: str
    method: str
    settings: dict  # of both
    published: dict  # of published code, beside these
    ours: str
    theirs: str
    option: str


CASES = [
    Case(
        "IDK+RT", "idk_rt", {}, {"compat": "npo-repo"},
        "a token mean of each kind of rows, added", "NPO: one token mean over both", "`--compat npo-repo`",
    ),
    Case(
        "DPO", "dpo", {}, {"compat": "npo-repo"},
        "1/beta", "NPO, OpenUnlearning (IdkDPO): 2/beta", "`--compat npo-repo`",
    ),
    Case(
        "KTO", "kto", {}, {"compat": "npo-repo"},
        "z = beta E[r]", "NPO: 1 + ..., z = E[r] without beta", "`--compat npo-repo`",
    ),
    Case(
        "+KL, the term alone", "npo_kl", {"forget_weight": 0.0}, {"kl_positions": "all"},
        "where the answer is predicted", "all projects: prompts and padding too; here all but padding",
        "`--kl_positions all`",
    ),
    Case(
        "UNDIAL", "undial", {}, {"published_rows": True},
        "KL over the scored tokens",
        "OpenUnlearning: cross-entropy over all positions, on token V - 100 where there is no label",
        "`--published_rows on`",
    ),
    Case(
        "PDU", "pdu", {}, {"published_rows": True},
        "logits that predict a token of the answer", "OpenUnlearning: logits at the token itself",
        "`--published_rows on`",
    ),
    Case(
        "RMU", "rmu_rt", {"layer": 0, "retain_weight": 0.0}, {"published_rows": True},
        "activations that predict a token of the answer", "OpenUnlearning: activations at the token itself",
        "`--published_rows on`",
    ),
]  # fmt: skip


def problem():
    """Steps as the tests of methods have them: generated authors, two layers, made-up references."""
    rows = generate_authors(4, seed=0)
    format = Format(train_tokenizer(rows, vocab_size=500), "plain")
    examples = format.encode(rows)
    corpus = SimpleNamespace(rows=rows, format=format, retain=examples[:-20], forget=examples[-20:])
    models = [build_model(len(format.tokenizer), 64, 2, {}, seed=i) for i in (0, 1)]
    return corpus, models[0], models[1].eval()


def loss_of(name, given) -> float:
    corpus, model, reference = problem()
    settings = METHODS[name].settings(**given)
    config = replace(CONFIG, batch_size=4)
    steps = make_steps(corpus, name, config, settings, reference, packing=False, model=model)
    return step_gradients(model, steps.passes(model, 1))[0].item()


def broadcast_rmu() -> tuple[float, float]:
    """(ours, published) of four sequences: each distance divided by the number of tokens of every sequence."""
    corpus, model, reference = problem()
    settings = METHODS["rmu"].settings(layer=0, published_rows=True)
    steps = make_steps(corpus, "rmu_rt", replace(CONFIG, batch_size=4), settings, reference, model=model)
    truth, exact = loss_of_step(replace(steps, method=replace(steps.method, retain=None)), model, reference, 1)
    rows = Forward(exact, [steps.rows["forget"][i] for i in steps.plan.steps[1].forget])
    target = settings.steering * unit_direction(64, settings.seed)
    mask = (rows.labels != -100).double()
    distances = ((layer_of(rows, settings) - target).square().mean(-1) * mask).sum(1)
    return truth.item(), (distances / mask.sum(1, keepdim=True)).mean().item()


def table() -> str:
    rows = []
    for case in CASES:
        ours, theirs = (loss_of(case.method, {**case.settings, **more}) for more in ({}, case.published))
        rows.append([case.label, case.ours, ours, case.theirs, theirs, case.option])
    ours, theirs = broadcast_rmu()
    text = ("each sequence by its own tokens", "OpenUnlearning: each by those of every one in the batch")
    rows.append(["RMU, several sequences", text[0], ours, text[1], theirs, "none: a mistake"])
    return tables.markdown(HEADINGS, rows, text=len(HEADINGS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
