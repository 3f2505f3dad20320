"""What the logistic experiment says about the paper's claims, computed from the numbers for any outcome."""

from typing import Any

from training.papers.npo_logistic.methods import METHODS, SETTINGS
from training.reports import tables
from training.reports.claims import Claim, filled, versions_sentence

Summaries = dict[str, dict[str, float]]  # {method: Curve.summary()}

PAPER = ("GA", "GA+RT", "IDK+RT", "DPO+RT", "NPO", "NPO+RT")  # the methods that the paper compares
PAPER_BEFORE = " (the paper: 1.70 and 0.02, means of its seeds)"
GROWN = 2.0  # a distance that has more than doubled has left
NEAR_THEORY = 0.05  # relative
FIGURES = {
    "figure.png": "Forget and retain distance of all methods over steps",
    "beta.png": "Retain distance of GA, and of NPO for five beta",
    "collapse.png": "Distance from the start over steps, GA and NPO",
}


def claims(summaries: Summaries, start: tuple[float, float]) -> list[Claim]:
    """The paper's statements about figures 1 and 2, each as a comparison of medians."""
    s = {name: summaries[name] for name in PAPER}
    others = [name for name in PAPER if name != "NPO+RT"]

    def values(key: str, names: list[str] | tuple[str, ...]) -> str:
        return ", ".join(f"{name} {s[name][key]:.3g}" for name in names)

    return [
        Claim(
            "Gradient ascent passes through a good model and leaves it again: catastrophic collapse",
            f"forget distance {s['GA']['min_fd']:.3g} at step {s['GA']['min_fd_step']:.0f}, {s['GA']['end_fd']:.3g} "
            f"at the end; retain distance {start[1]:.3g} before, {s['GA']['end_rd']:.3g} at the end",
            s["GA"]["end_fd"] > GROWN * s["GA"]["min_fd"] and s["GA"]["end_rd"] > GROWN * start[1],
        ),
        Claim(
            "A retain term slows gradient ascent down but does not prevent the collapse",
            values("end_rd", ("GA", "GA+RT")) + f"; before: {start[1]:.3g} (retain distance)",
            s["GA+RT"]["end_rd"] < s["GA"]["end_rd"] and s["GA+RT"]["end_rd"] > GROWN * start[1],
        ),
        Claim(
            "NPO alone keeps far more than gradient ascent alone",
            values("end_rd", ("GA", "NPO")) + " (retain distance)",
            s["NPO"]["end_rd"] * GROWN < s["GA"]["end_rd"],
        ),
        Claim(
            "NPO+RT forgets best of all methods",
            values("end_fd", PAPER) + " (forget distance at the end)",
            s["NPO+RT"]["end_fd"] <= min(s[name]["end_fd"] for name in others),
        ),
        Claim(
            "NPO+RT keeps best of all methods",
            values("end_rd", PAPER) + " (retain distance at the end)",
            s["NPO+RT"]["end_rd"] <= min(s[name]["end_rd"] for name in others),
        ),
        Claim(
            "IDK+RT and DPO+RT stay behind NPO+RT in forgetting",
            values("end_fd", ("IDK+RT", "DPO+RT", "NPO+RT")) + " (forget distance at the end)",
            s["NPO+RT"]["end_fd"] < min(s["IDK+RT"]["end_fd"], s["DPO+RT"]["end_fd"]),
        ),
    ]


def beta_claim(summaries: Summaries) -> Claim:
    """Proposition 1 and figure 3: NPO becomes gradient ascent as beta -> 0, at one learning rate."""
    distances = [summary["end_rd"] for summary in summaries.values()]
    return Claim(
        "NPO tends to gradient ascent as beta tends to 0: the retain distance falls from GA's as beta grows",
        ", ".join(f"{name} {summary['end_rd']:.3g}" for name, summary in summaries.items()),
        distances == sorted(distances, reverse=True),
    )


def collapse_claim(name: str, measured: float, theory: float) -> Claim:
    """Theorem 2, for one of `collapse.diverge`."""
    if name == "GA":
        text = f"GA diverges linearly: exponent {theory:g}"
    else:
        text = f"{name}, diverges logarithmically: sqrt(n)/beta = {theory:.3g} a unit of log t"
    return Claim(text, f"{measured:.4g} over the last decade", abs(measured / theory - 1) < NEAR_THEORY)


def beyond_the_paper(summaries: Summaries) -> str:
    """One sentence on the methods that the paper does not compare here."""
    best = summaries["NPO+RT"]
    better = [
        name
        for name, summary in summaries.items()
        if name not in PAPER and summary["end_fd"] < best["end_fd"] and summary["end_rd"] < best["end_rd"]
    ]
    others = ", ".join(name for name in summaries if name not in PAPER)
    if not better:
        return f"Of the methods that the paper does not compare ({others}), none ends closer on both than NPO+RT."
    return f"Of the methods that the paper does not compare ({others}), these end closer on both than NPO+RT: " + (
        ", ".join(better) + "."
    )


def spread(per_seed: dict[str, dict[str, list[float]]]) -> str:
    """How far the seeds are apart, which medians do not show."""
    ranges = [f"{name} {min(x):.2g} to {max(x):.2g}" for name in PAPER for x in [per_seed[name]["end_fd"]]]
    return f"Seeds differ; forget distance at the end: {', '.join(ranges)}."


def all_claims(metrics: dict[str, Any]) -> list[Claim]:
    found = claims(metrics["methods"], (metrics["before"]["fd"], metrics["before"]["rd"]))
    if metrics["beta"]:
        found.append(beta_claim(metrics["beta"]))
    return found + [collapse_claim(name, **rate) for name, rate in metrics["collapse"].items()]


def markdown(metrics: dict[str, Any], config: dict[str, Any]) -> str:
    """report.md, from what metrics.json and config.json hold."""
    alpha, seeds = config["alpha"], config["seeds"]
    settings = SETTINGS[alpha]
    rows = [
        [name, _number(settings[METHODS[name].family][0]), _number(settings[METHODS[name].family][1])]
        + [f"{summary[key]:.4f}" for key in ("end_fd", "end_rd", "min_fd")]
        + [f"{summary['min_fd_step']:.0f}", f"{summary['rd_at_min_fd']:.4f}"]
        for name, summary in metrics["methods"].items()
    ]
    headings = ["method", "lr", "beta", "forget, end", "retain, end", "forget, least", "at step", "retain there"]
    apart = "far apart" if alpha else "the same cloud, with opposite labels"
    before = metrics["before"]
    shown = {name: text for name, text in FIGURES.items() if name == "figure.png" or metrics[name.removesuffix(".png")]}
    sections = [
        f"# The NPO paper's logistic experiment, alpha = {alpha}",
        filled(
            f"Forget and retain questions are {apart} (arXiv 2404.05868, section 4, appendix D). Forget distance and "
            "retain distance are E KL(retrained || model), in nats, on fresh points of each cloud: 0 is what "
            f"retraining without the forget set would give. Medians of {len(seeds)} seeds. Before unlearning: forget "
            f"{before['fd']:.4f}, retain {before['rd']:.4f}" + (PAPER_BEFORE if alpha else "") + "."
        ),
        "\n\n".join(f"![{text}]({name})" for name, text in shown.items()),
        "## What agrees with the paper, and what does not",
        tables.markdown(
            ["", "claim", "measured"],
            [["agrees" if c.holds else "**does not**", c.text, c.measured] for c in all_claims(metrics)],
        ),
        filled(
            "A model has collapsed here, and a distance is far below another, where the factor is more than "
            f"{GROWN:g}; a rate agrees within {NEAR_THEORY:.0%}. {beyond_the_paper(metrics['methods'])} "
            + spread(metrics["per_seed"])
        ),
        "## All methods",
        tables.markdown(headings, rows),
        filled(
            "KTO, SimNPO and the KL variants of DPO and KTO are not in the paper's comparison; where its table 1 has "
            "no learning rate and beta for a method, it has NPO's, untuned. An answer is one token here, so SimNPO's "
            "length normalisation does nothing, and what is left is NPO without a reference."
        ),
        "## What was run",
        f"    {config['command']}",
        filled(
            f"{config['steps']} full-batch gradient steps from the reference, evaluated every 25; seeds "
            f"{', '.join(map(str, seeds))}; float64. Draws differ from those of the paper's code, so single seeds do "
            "not compare with it. Rate of collapse: gradient steps to t = 10^4, gradient flow to 10^12. "
            + versions_sentence(config["versions"])
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
