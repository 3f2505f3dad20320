"""The generated pages of the site: `python -m docs.generate` writes docs/methods.md and docs/benchmarks.md.

They are committed, and tests/docs/test_generated.py fails when a page differs from what this module would write.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from docs import measurements
from training.methods import METHODS, Method, Settings

FOLDER = Path(__file__).parent
MADE = "<!-- Made by `python -m docs.generate`: edit docs/generate.py or docs/measurements.py, not this page. -->\n\n"
RETAIN = {
    None: "none",
    "nll": "negative log-likelihood",
    "kl": "KL divergence from the reference",
    "activations": "distance to the frozen model's activations",
}
PAPER = re.compile(r"arXiv (\d{4}\.\d{5})")
NOTATION = """\
`p` is the model's probability of a scored token, `logp_s` the sum of the log-probabilities of a sequence `s`
with `|y_s|` scored tokens, and `r_s = logp_s - ref_logp_s` its log-ratio against the reference model. `r_tok`
is the same for one token, and `r_idk` and `r_alternate` are the log-ratios of the refusal and of the alternate
answer. `mean_s` is over the sequences of a step, `mean_tok` over its scored tokens. `sg[...]` has no gradient.
`z` is a logit, except in KTO, where it is beta times the mean log-ratio of the refusals, without a gradient.
`h_t` is the output of the steered layer, `u` a fixed random unit vector, `c` the length of the target, and `H`
the hidden size."""

ROWS = """\
Rows: `forget` are the rows to forget, `retain` the rows to keep, `idk` the questions to forget with a refusal
as the answer, and `alternate` the same questions with another plausible answer. The cost is the number of
matrix products with the head, forward and backward together."""


def methods_page() -> str:
    families: dict[str, list[Method]] = {}
    for method in METHODS.values():
        families.setdefault(method.family or method.name, []).append(method)
    parts = [
        "# Methods",
        f"`training` has {len(METHODS)} methods in {len(families)} families. `--method NAME` of\n"
        "`training.unlearn` and `--methods NAMES` of `training.grid` select them. A method minimises",
        "    forget_weight * (forget term) + retain_weight * (retain term)",
        "The forget term is the formula below. [methods/README.md](../training/methods/README.md) describes where\n"
        "published code differs from the papers, and what was reconstructed. [Extending](extending.md) shows how to\n"
        "add a method.",
        "## Notation\n\n" + NOTATION,
        ROWS,
        *map(_family, families.values()),
    ]
    return MADE + "\n\n".join(parts) + "\n"


def _family(methods: list[Method]) -> str:
    first = methods[0]
    source = PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", first.source)
    rows = [
        [f"`{m.name}`", RETAIN[m.retain], ", ".join(m.needs), _reference(m), _settings(m), m.cost.split(";")[0]]
        for m in methods
    ]
    heading = ["`--method`", "retain term", "rows", "of the reference model", "settings", "cost"]
    aliases = [f"`{alias}` for `{m.name}`" for m in methods for alias in m.aliases]
    parts = [f"## {first.label}", f"Source: {source}.", f"    {first.formula}", measurements.table(heading, rows)]
    if aliases:
        parts.append(f"Other names: {', '.join(aliases)}.")
    return "\n\n".join(parts)


def _reference(method: Method) -> str:
    """What is kept of the reference model."""
    kept = []
    if method.reference:
        kept.append(f"cached, one number per {'token' if method.reads == 'token' else 'sequence'}")
    if method.teacher:
        kept.append("cached hidden states of the answers")
    if method.needs_frozen_model(method.settings()):
        kept.append("the model, run in every step")
    return " and ".join(kept) or "nothing"


def _settings(method: Method) -> str:
    """The paper's, where they differ from the defaults; beta and gamma where the formula has them."""
    shown = dict(method.defaults)
    for name in ("beta", "gamma"):
        if re.search(rf"\b{name}\b", method.formula):
            shown.setdefault(name, getattr(Settings(), name))
    return ", ".join(f"{name} {value:g}" for name, value in shown.items()) or "defaults"


PAGES: dict[str, Callable[[], str]] = {
    "methods.md": methods_page,
    "benchmarks.md": lambda: MADE + measurements.page(),
}


def main() -> Iterator[str]:
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
        yield name


if __name__ == "__main__":
    print(*main())
