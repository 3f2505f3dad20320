"""What the Markov experiment says about SimNPO's claims, computed from the numbers for any outcome."""

from collections.abc import Callable
from typing import Any

import numpy as np

from training.papers.simnpo_markov.experiment import BATCH, BETA, BUDGET, LR, PUBLISHED_LENGTHS
from training.papers.simnpo_markov.setting import LEAKAGE, LENGTH, NUM_SEQUENCES, TRAIN, TRAIN_BATCH, TRAIN_LR
from training.reports import tables
from training.reports.claims import CONFIDENCE, WORDS, Claim, Difference, filled, versions_sentence

SHORT, LONG = (str(length) for length in PUBLISHED_LENGTHS)
UNSEEN = f"{LENGTH}, unseen"
Outcome = dict[str, list[float]]  # {name: a number a seed}


AUTHORS = (  # off the figures of their repository
    "The authors' two figures (one seed), read at a retain distance of 0.1, forget1 and forget2: length 5, NPO above "
    "0.5 and 0.24, SimNPO 0.5 and above 0.5; unseen, NPO 0.33 and above 1, SimNPO 0.50 and 0.90."
)


def column(metrics: dict[str, Any], case: str, method: str, name: str) -> np.ndarray:
    return np.array(metrics["per_seed"][case][method][name])


def unevenness(metrics: dict[str, Any], case: str, method: str) -> np.ndarray:
    """|forget1 - forget2| of the forget quality where both together are forgotten."""
    return np.abs(column(metrics, case, method, "aim_forget1") - column(metrics, case, method, "aim_forget2"))


def claims(metrics: dict[str, Any]) -> list[Claim]:
    """Each as a difference that is positive where the claim holds, of what was run."""
    found: list[Claim] = []

    def add(text: str, what: str, first: np.ndarray, second: np.ndarray) -> None:
        difference = Difference.of(first - second)
        measured = f"{what}: {first.mean():.3f} and {second.mean():.3f}, difference {difference.words()}, "
        measured += f"above 0 on {(first > second).sum()} of {len(first)} seeds"
        found.append(Claim(text, measured, difference.positive))

    def of(case: str, name: str) -> Callable[[str], np.ndarray]:
        return lambda method: column(metrics, case, method, name)

    cases = metrics["per_seed"]
    if SHORT in cases:
        forget2, forget1 = of(SHORT, "spent_forget2"), of(SHORT, "spent_forget1")
        add(
            f"Short sequences are where NPO fails: of length {SHORT}, SimNPO forgets more of them at the same price",
            "forget2, SimNPO and NPO",
            forget2("SimNPO"),
            forget2("NPO"),
        )
        if LONG in cases:
            long = of(LONG, "spent_forget2")
            add(
                f"That is due to the length: SimNPO's lead on forget2 is larger at {SHORT} than at {LONG}",
                f"lead at {SHORT} and at {LONG}",
                forget2("SimNPO") - forget2("NPO"),
                long("SimNPO") - long("NPO"),
            )
        add(
            "NPO leaves the short sequences behind the long ones",
            "NPO, forget1 and forget2",
            forget1("NPO"),
            forget2("NPO"),
        )
        for case in (SHORT, LONG):
            if case in cases:
                add(
                    f"SimNPO forgets the two chains more evenly (length {case})",
                    "unevenness of NPO and SimNPO",
                    unevenness(metrics, case, "NPO"),
                    unevenness(metrics, case, "SimNPO"),
                )
    for case in (SHORT, LONG):
        for term in ("", "+RT", "+KL"):
            if "NPO" + term in cases.get(case, {}):
                best = of(case, "best_distance")
                add(
                    f"SimNPO{term} comes nearer to the retrained model than NPO{term} (length {case})",
                    f"least forget distance of NPO{term} and SimNPO{term}",
                    best("NPO" + term),
                    best("SimNPO" + term),
                )
    if UNSEEN in cases:
        forget1, forget2 = of(UNSEEN, "spent_forget1"), of(UNSEEN, "spent_forget2")
        add(
            "Reference bias: with forget2 unseen, SimNPO forgets more of forget1 at the same price",
            "forget1, SimNPO and NPO",
            forget1("SimNPO"),
            forget1("NPO"),
        )
        add(
            "Reference bias: NPO drives the unseen forget2 further away, where there is nothing to forget",
            "forget2, NPO and SimNPO",
            forget2("NPO"),
            forget2("SimNPO"),
        )
    return found


def best_of_sweep(metrics: dict[str, Any], family: str, name: str, sign: int) -> tuple[str, np.ndarray]:
    """The setting of a family that is the best of those tried in the mean of the same seeds, which flatters it."""
    runs = {f"{family}, published": metrics["per_seed"][SHORT][family]}
    runs |= {run: found for run, found in metrics["sweep"].items() if run.startswith(f"{family},")}
    best = max(runs, key=lambda run: sign * float(np.mean(runs[run][name])))
    return best, np.array(runs[best][name])


def sweep_claims(metrics: dict[str, Any]) -> list[Claim]:
    """The first claim, with each method at its best learning rate and beta."""
    found = []
    for name, text, sign in (
        ("spent_forget2", "more of the short sequences forgotten at the same price", 1),
        ("best_distance", "nearer to the retrained model", -1),
    ):
        (npo, npo_values), (simnpo, simnpo_values) = (
            best_of_sweep(metrics, family, name, sign) for family in ("NPO", "SimNPO")
        )
        difference = Difference.of(sign * (simnpo_values - npo_values))
        found.append(
            Claim(
                f"Each at its best setting, SimNPO: {text}",
                f"{simnpo} {simnpo_values.mean():.3f}, {npo} {npo_values.mean():.3f}, lead {difference.words()}",
                difference.positive,
            )
        )
    return found


def all_claims(metrics: dict[str, Any]) -> list[Claim]:
    return claims(metrics) + (sweep_claims(metrics) if metrics["sweep"] else [])


def verdict(metrics: dict[str, Any]) -> str:
    """One sentence on the first claim."""
    found = claims(metrics)
    if SHORT not in metrics["per_seed"]:
        return f"Nothing is said about short sequences: --lengths has no {SHORT}."
    return {
        True: "Agrees with the paper: at the same retain distance SimNPO forgets more of the short sequences than NPO.",
        False: "Does not agree with the paper: at the same retain distance NPO forgets at least as much of the short "
        "sequences as SimNPO.",
        None: "Cannot tell: at the same retain distance the methods differ on the short sequences by less than the "
        "seeds allow to say.",
    }[found[0].holds]


def why(cases: list[str]) -> str:
    """What the losses say of it: shares of the first gradient, and weights."""
    lengths = [int(case) for case in cases if case.isdecimal() and int(case) < LENGTH]
    shares = ", ".join(f"{(n - 1) / (n + LENGTH - 2):.0%} of length {n}" for n in lengths)
    sums = f": {shares}, and half of it in SimNPO, which takes means" if lengths else ""
    return (
        "Why: before the first step every sequence has weight 2 sigma(0) = 1 in NPO and adds its predictions up, so "
        f"that forget2 has the share of the gradient that it has of the states{sums}. The reference is no part of "
        "this. Nor does it tell what was never learned from what was: both have log-ratio 0. SimNPO's weight 2 "
        "sigma(beta logp / |s|) does, but by little: about 0.23 for a chain that was learned and 0.17 for one that "
        "was not, as no sequence of these chains is predicted well."
    )


def markdown(metrics: dict[str, Any], config: dict[str, Any]) -> str:
    """report.md, from what metrics.json and config.json hold."""
    seeds, settings = config["seeds"], config["settings"]
    models = metrics["models"]
    sections = [
        "# The SimNPO paper's Markov chains: short sequences, and an unseen part",
        filled(f"**{verdict(metrics)}**"),
        filled(
            f"Three Markov chains on ten states, each with three states of its own that it stays in with probability "
            f"{1 - LEAKAGE:g} (arXiv 2410.07163, synthetic study). A GPT-2 learns retain, forget1 and forget2, and is "
            "made to forget the latter two; sequences of forget2 are shorter than the others. NPO sums over a "
            "sequence, so that a short one has a small part of the gradient, SimNPO takes its mean. Retain distance "
            "and forget quality are KL(chain || model), as the authors' figures have them; forget distance is "
            "KL(retrained || model), 0 for a model that never saw the forget chains; nats a state, on fresh "
            "sequences. Forgetting is too much where the quality is above that of the retrained model, "
            f"{models['aim']:.2f}."
        ),
        "![Forget quality over retain distance](figure.png)",
        "![Forget quality and least distance over the length of forget2](lengths.png)",
        "## What agrees with the paper, and what does not",
        tables.markdown(
            ["", "claim", "measured"], [[WORDS[c.holds], c.text, c.measured] for c in all_claims(metrics)], text=3
        ),
        filled(
            f"Differences are of the same seed, means of {len(seeds)}, in brackets Student's interval of "
            f"{CONFIDENCE:.0%}; *cannot tell*: it has 0 in it. At the same price: where the retain distance has grown "
            f"to {BUDGET:g}. Unevenness: the difference between the forget qualities of the two chains where their "
            "mean is first that of the retrained model. Least distance: the mean of both chains, at the step where it "
            "is least. The authors' figures show the first, the third and the last two; the others are asked here."
        ),
        filled(AUTHORS),
        filled(why(list(metrics["per_seed"]))),
        "## At the same retain distance, and where forgetting is done",
        tables.markdown(HEADINGS, rows(metrics["methods"]), text=2),
        filled(
            "Forgetting is done where the mean of both qualities is first that of the retrained model; a method that "
            f"never gets to a place is taken at its end, after {settings['steps']} steps. Nothing alone stays there: "
            "it has to be stopped within a few steps of AdamW, and goes on to the qualities of the last columns."
        ),
    ]
    if metrics["sweep"]:
        sections += [
            f"## Other learning rates and beta, length {SHORT}",
            tables.markdown(HEADINGS, rows({SHORT: metrics["sweep_means"]}), text=2),
        ]
    sections += [
        "## The models that unlearning is between",
        tables.markdown(
            ["forget2", "model", "retain", "forget1", "forget2"],
            [
                [case, model, *(f"{found[f'{chain}_quality']:.3f}" for chain in NUM_SEQUENCES)]
                for case, of_case in models["cases"].items()
                for model, found in of_case.items()
            ],
            text=2,
        ),
        "KL(chain || model).",
        "## What was run",
        f"    {config['command']}",
        filled(
            f"As published: the chains, {', '.join(f'{n} {chain}' for chain, n in NUM_SEQUENCES.items())} sequences "
            f"of {LENGTH} states, {TRAIN:.0%} to train on; 4 layers of width 128; AdamW at {LR:g}, batches of "
            f"{BATCH}, {settings['steps']} steps, beta {BETA:g}. Not as published: the model is transformers' GPT-2 "
            "(norms before the layers, a final one, no bias in the head); it is trained for "
            f"{settings['train_steps']} batches of {TRAIN_BATCH} at up to {TRAIN_LR:g}, falling to 0, for 625 of 128 "
            "at 5e-4, which leaves the models as near to the chains; seeds are several, and draws are others. Seeds "
            f"{', '.join(map(str, seeds))}, each with its own data, models and batches; float32, distances in float64. "
            + versions_sentence(config["versions"])
        ),
    ]
    return "\n\n".join(sections) + "\n"


HEADINGS = ["forget2", "method", "forget1", "forget2", "step", "retain, done", "forget1, done", "forget2, done"]
HEADINGS += ["least distance", "retain, end", "forget1, end", "forget2, end"]


def rows(methods: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    names = ["spent_forget1", "spent_forget2", "aim_step", "aim_retain", "aim_forget1", "aim_forget2"]
    names += ["best_distance", "end_retain", "end_forget1", "end_forget2"]
    return [
        [case, method, *(f"{found[name]:.1f}" if name.endswith("step") else f"{found[name]:.3f}" for name in names)]
        for case, of_case in methods.items()
        for method, found in of_case.items()
    ]
