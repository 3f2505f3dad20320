"""What the graph experiment says about the claims of INPO and NPO, computed from the numbers for any outcome."""

from typing import Any, NamedTuple

import numpy as np

from training.papers.inpo_graph.setting import FORGET, HOMOPHILY, PARTNERS, TRAIN
from training.reports import tables
from training.reports.claims import Claim, filled, versions_sentence

RUINED = 0.1  # a test accuracy that has fallen by more
DISTANCES = {"forget_kl": "forget", "test_kl": "test"}


class Pair(NamedTuple):
    """One number of two methods at the aim, on the same seeds."""

    first: list[float]
    second: list[float]

    @property
    def wins(self) -> int:
        """Seeds on which the first is lower."""
        return sum(a < b for a, b in zip(self.first, self.second, strict=True))

    @property
    def lower(self) -> bool:
        """Whether the first is lower: in the median, and on more than half of the seeds."""
        return bool(np.median(self.first) < np.median(self.second)) and 2 * self.wins > len(self.first)

    def words(self, first: str, second: str) -> str:
        middles = f"{first} {np.median(self.first):.3g}, {second} {np.median(self.second):.3g}"
        return f"{middles}; lower on {self.wins} of {len(self.first)} seeds"


def compare(metrics: dict[str, Any], first: str, second: str, key: str) -> Pair:
    return Pair(metrics["per_seed"][first][f"aim_{key}"], metrics["per_seed"][second][f"aim_{key}"])


def claims(metrics: dict[str, Any]) -> list[Claim]:
    methods, before = metrics["methods"], metrics["before"]["test_accuracy"]
    ascent = methods["GA"]["end_test_accuracy"]
    found = [
        Claim(
            "Gradient ascent ruins what is to be kept",
            f"test accuracy {before:.3f} before, {ascent:.3f} at the end",
            before - ascent > RUINED,
        )
    ]
    for rt in ("", "+RT"):
        npo, ga = methods["NPO" + rt]["end_test_kl"], methods["GA" + rt]["end_test_kl"]
        measured = f"test distance at the end: NPO{rt} {npo:.3g}, GA{rt} {ga:.3g}"
        found.append(Claim(f"NPO{rt} diverges more slowly than GA{rt}", measured, npo < ga))
    for rt in ("", "+RT"):
        inpo, npo, mixed = "INPO" + rt, "NPO" + rt, "INPO (mixed)" + rt
        kept, forgot = (compare(metrics, inpo, npo, key) for key in ("test_kl", "forget_kl"))
        control = compare(metrics, inpo, mixed, "test_kl")
        found += [
            Claim(f"{inpo} keeps more than {npo}", "test distance: " + kept.words(inpo, npo), kept.lower),
            Claim(f"{inpo} forgets closer than {npo}", "forget distance: " + forgot.words(inpo, npo), forgot.lower),
            Claim(
                f"{inpo} keeps more than the same weights, mixed",
                "test distance: " + control.words(inpo, mixed),
                control.lower,
            ),
        ]
    return found


def verdict(metrics: dict[str, Any], rt: str) -> str:
    """One sentence: does INPO beat NPO here?"""
    inpo, npo = "INPO" + rt, "NPO" + rt
    lower = [text for key, text in DISTANCES.items() if compare(metrics, inpo, npo, key).lower]
    higher = [text for key, text in DISTANCES.items() if compare(metrics, npo, inpo, key).lower]
    found = [
        f"{where} the retrained model on {' and '.join(kinds)} nodes"
        for where, kinds in (("closer to", lower), ("farther from", higher))
        if kinds
    ]
    outcome = "beats" if len(lower) == len(DISTANCES) else "does not beat"
    return f"{inpo} {outcome} {npo} here: it stops {' and '.join(found) or 'as far from the retrained model'}."


def markdown(metrics: dict[str, Any], config: dict[str, Any]) -> str:
    """report.md, from what metrics.json and config.json hold."""
    before, retrained, influence = metrics["before"], metrics["retrained"], metrics["influence"]
    rows = [
        [name, f"{found['reached']:.0%}", f"{found['aim_step']:.0f}"]
        + [f"{found[f'aim_{key}']:.4f}" for key in ("forget_kl", "forget_accuracy", "test_kl", "test_accuracy")]
        + [f"{found[f'end_{key}']:.4f}" for key in ("forget_kl", "retain_kl", "test_kl", "test_accuracy")]
        for name, found in metrics["methods"].items()
    ]
    headings = ["method", "reached", "at step", "forget", "forget acc.", "test", "test acc."]
    headings += ["forget, end", "retain, end", "test, end", "test acc., end"]
    parts = ("forget", "retain", "test")
    models = [
        [name, *(f"{of[f'{part}_{key}']:.3f}" for key in ("accuracy", "probability", "kl") for part in parts)]
        for name, of in (("reference", before), ("retrained", retrained))
    ]
    model_headings = ["model", *(f"{part} {key}" for key in ("acc.", "prob.", "distance") for part in parts)]
    settings = config["settings"]
    sections = [
        "# Influence-aware NPO on a synthetic citation graph",
        filled(f"**{verdict(metrics, '')} {verdict(metrics, '+RT')}**"),
        filled(
            "INPO (arXiv 2510.19479) weights each forget node's NPO term by its influence on the other nodes. **The "
            "weighting is reconstructed**, from the description of the method and not from its formulas: influence is "
            "the summed change of the other nodes' predictions (total variation) when the node is cut off from the "
            "graph, divided by its mean over the forget set. The graph is synthetic; nothing here is a number of that "
            "paper's."
        ),
        filled(
            f"The graph: {settings['nodes']} nodes of 7 classes, {PARTNERS} partners drawn by every node, of its own "
            f"class with probability {HOMOPHILY:g}; {TRAIN:.0%} of the nodes are trained on, {FORGET:.0%} of these "
            "are to be forgotten. Distance is KL(retrained || model) in nats, a mean over nodes: 0 is what retraining "
            f"without the forget nodes would give. Medians of {len(config['seeds'])} seeds."
        ),
        "![Forget and test distance over steps, and test distance over the forget probability](figure.png)",
        "## Claims and numbers",
        tables.markdown(
            ["", "claim", "measured"],
            [["holds" if c.holds else "**does not**", c.text, c.measured] for c in claims(metrics)],
            text=3,
        ),
        filled(
            "Of two methods the lower is the one that is lower in the median and on more than half of the seeds. They "
            "are compared where the mean probability of the forget labels has first fallen to the retrained model's, "
            "as an operator would stop there; a method that never gets there is taken at its end. "
            f"Ruined: a test accuracy that has fallen by more than {RUINED:g}. INPO (mixed) deals the weights of INPO "
            "to the forget nodes at random."
        ),
        filled(
            f"Influence is uneven: weights go from {influence['least']:.2f} to {influence['most']:.2f}, a tenth of the "
            f"nodes has {influence['top_tenth']:.0%} of it, and its correlation with the number of neighbours is "
            f"{influence['degree_correlation']:.2f}."
        ),
        "## All methods",
        tables.markdown(headings, rows),
        "Before unlearning, and the model that unlearning should lead to:",
        tables.markdown(model_headings, models),
        "## What was run",
        f"    {config['command']}",
        filled(
            f"{settings['steps']} full-batch steps of Adam from the reference, lr {settings['lr']:g}, beta "
            f"{settings['beta']:g}, measured every {config['eval_every']}; seeds {', '.join(map(str, config['seeds']))}"
            "; float32. Learning rate and beta are one for all methods; the defaults are the best for NPO+RT, and for "
            "INPO+RT as well, of three pairs that were tried on seed 1000. " + versions_sentence(config["versions"])
        ),
    ]
    return "\n\n".join(sections) + "\n"
