"""All claims in the order of the report, and those of the NPO paper (arXiv 2404.05868) on collapse.

Each function returns one finding; where records are absent it says so.
"""

import numpy as np

from training.benchmarks.tofu.claims import LOST
from training.pretrained import claims_attacks, claims_reach, claims_short
from training.pretrained.findings import Finding, absent, all_of, by_count
from training.pretrained.outcomes import PROB, SCENARIOS, Arm, Outcomes, middle_and_range, number, seeds_words
from training.pretrained.utility import UTILITY
from training.reports.claims import Claim, Difference

COMPONENTS = {
    f"{of}_{measure}": f"{words} of {where}"
    for of, where in (("retain", "the retain rows"), ("ra", "real authors"), ("wf", "world facts"))
    for measure, words in (("prob", "probability"), ("rougeL", "ROUGE-L"), ("tr", "truth ratio"))
}
LEVELS = (0.5, 0.25, 0.1)  # shares of the forget probability before unlearning


def all_findings(outcomes: Outcomes) -> list[Finding]:
    found = []
    for scenario in SCENARIOS:
        found += [collapse(outcomes, scenario), slower(outcomes, scenario), equal_forgetting(outcomes, scenario)]
    for scenario in SCENARIOS:
        found += [claims_reach.somewhere(outcomes, scenario), claims_reach.at_end(outcomes, scenario)]
        found.append(claims_reach.alone(outcomes, scenario))
    for scenario in SCENARIOS:
        found += [claims_reach.weight_reaches(outcomes, scenario), claims_reach.weight_keeps(outcomes, scenario)]
    found += [claims_short.left_behind(outcomes), claims_short.simnpo_forgets(outcomes), claims_short.lead(outcomes)]
    return found + claims_attacks.relearning(outcomes) + claims_attacks.rounding(outcomes)


def collapse(outcomes: Outcomes, scenario: str) -> Finding:
    """Utility at the end below half of the full model's."""
    key, text = f"collapse, {scenario}", f"GA collapses ({scenario}, NPO paper)"
    arm = outcomes.arm(scenario, "ga")
    if arm is None:
        return absent(key, text, f"GA in {scenario}")
    start, end = (np.array([number(run.checkpoints[i], UTILITY) for run in arm.runs]) for i in (0, -1))
    lost = end < LOST * start
    measured = f"utility {start[0]:.2g} -> {middle_and_range(end)}, below half of it in {lost.sum()} of "
    measured += seeds_words(len(lost)).replace("one seed", "1 seed")
    steps = [
        run.steps[np.argmax(run.path(UTILITY) < LOST * start[0])]
        for run, low in zip(arm.runs, lost, strict=True)
        if low
    ]
    if steps:
        measured += f", from step {np.median(steps):g} of {arm.runs[0].steps[-1]} on"
    holds = by_count(lost)
    return Finding(key, Claim(text, measured, holds), "" if holds else _why_it_stands(arm))


def _why_it_stands(arm: Arm) -> str:
    before, after = number(arm.runs[0].checkpoints[0], PROB), np.median(arm.ends(PROB))
    if after > before / 2:
        return f"GA did little at this learning rate: forget probability {before:.2g} -> {after:.2g}"
    first, last = arm.runs[0].checkpoints[0], arm.runs[0].end
    kept = {words: number(last, key) / number(first, key) for key, words in COMPONENTS.items() if number(first, key)}
    kept = {words: share for words, share in kept.items() if not np.isnan(share)}
    if not kept:
        return f"forget probability {before:.2g} -> {after:.2g}: it forgets and keeps its utility"
    most, least = max(kept, key=kept.__getitem__), min(kept, key=kept.__getitem__)
    return (
        f"forget probability {before:.2g} -> {after:.2g}, yet of the parts of the utility the {most} keeps "
        f"{kept[most]:.0%} and even the {least} {kept[least]:.0%}"
    )


def _paired(outcomes: Outcomes, scenario: str, *methods: str) -> list[Arm] | None:
    """The arms of the methods with the seeds that all of them have."""
    arms = [outcomes.arm(scenario, method) for method in methods]
    if any(arm is None for arm in arms):
        return None
    found = [arm for arm in arms if arm]
    common = set.intersection(*({run.seed for run in arm.runs} for arm in found))
    if not common:
        return None
    return [arm._replace(runs=tuple(run for run in arm.runs if run.seed in common)) for arm in found]


def slower(outcomes: Outcomes, scenario: str) -> Finding:
    """Utility of NPO minus that of GA at the same checkpoint, paired by seed: half-way and at the end.

    The verdict is of those where GA has collapsed: before, there is nothing to slow.
    """
    key = f"slower, {scenario}"
    text = f"NPO slows the collapse: where GA has collapsed, NPO keeps more utility at the same step ({scenario})"
    arms = _paired(outcomes, scenario, "npo", "ga")
    if arms is None:
        return absent(key, text, f"GA and NPO with the same seed in {scenario}")
    (npo, ga), (npo_prob, ga_prob) = ([arm.paths(name) for arm in arms] for name in (UTILITY, PROB))
    last = min(npo.shape[1], ga.shape[1]) - 1
    steps = arms[0].runs[0].steps
    differences = {at: Difference.of(npo[:, at] - ga[:, at]) for at in dict.fromkeys((max(1, last // 2), last))}
    measured = "; ".join(
        f"step {steps[at]}: {np.mean(npo[:, at]):.2f} and {np.mean(ga[:, at]):.2f}, {_words(d, len(npo))}, forget "
        f"probability {np.mean(npo_prob[:, at]):.2g} and {np.mean(ga_prob[:, at]):.2g}"
        for at, d in differences.items()
    )
    verdicts = {at: d.positive for at, d in differences.items() if np.mean(ga[:, at]) < LOST * np.mean(ga[:, 0])}
    holds, cause = all_of(verdicts.values()) if verdicts else None, ""
    if not verdicts:
        cause = "GA keeps more than half of its utility: there is no collapse to slow"
    elif holds is None:
        at = next(at for at, verdict in verdicts.items() if verdict is None)
        cause = f"at step {steps[at]} {_untold(npo[:, at] - ga[:, at])}"
    elif not holds:
        cause = f"NPO too ends at {np.mean(npo[:, last]):.2g}, of {np.mean(npo[:, 0]):.2g} before"
    return Finding(key, Claim(text, "NPO and GA, " + measured, holds), cause)


def _words(difference: Difference, seeds: int) -> str:
    return difference.words() if seeds > 1 else f"{difference.mean:+.3f} (one seed: no interval)"


def _untold(values: np.ndarray) -> str:
    if len(values) == 1:
        return "there is one seed"
    return f"the seeds differ by {values.max() - values.min():.2g}, their mean is {values.mean():+.2g}"


def equal_forgetting(outcomes: Outcomes, scenario: str) -> Finding:
    """Utility of NPO minus that of GA where both have the same forget probability, mean over the levels reached."""
    key = f"equal forgetting, {scenario}"
    text = f"NPO does not merely do less: it keeps more utility at equal forgetting ({scenario})"
    arms = _paired(outcomes, scenario, "npo", "ga")
    if arms is None:
        return absent(key, text, f"GA and NPO with the same seed in {scenario}")
    tables = [np.array([[utility_at(run, share) for share in LEVELS] for run in arm.runs]) for arm in arms]
    npo, ga = tables
    shared = np.isfinite(npo).all(axis=0) & np.isfinite(ga).all(axis=0)
    if not shared.any():
        least = " and ".join(f"{arm.paths(PROB).min(axis=1).max():.2g}" for arm in arms)
        cause = f"the least forget probabilities, NPO and GA, are {least}: above half of that before"
        return Finding(key, Claim(text, "no level of forgetting that both reach", None), cause)
    measured = "NPO and GA, at " + "; ".join(
        f"{share:.0%} of the forget probability: {npo[:, i].mean():.2f} and {ga[:, i].mean():.2f}"
        for i, share in enumerate(LEVELS)
        if shared[i]
    )
    values = (npo - ga)[:, shared].mean(axis=1)
    difference = Difference.of(values)
    measured += f"; mean difference {_words(difference, len(values))}"
    holds = difference.positive
    cause = ""
    if holds is None:
        cause = _untold(values)
    elif not holds:
        cause = f"on the way to these levels GA loses {1 - ga[:, shared].mean() / _start(arms[1]):.0%} of the utility, "
        cause += f"NPO {1 - npo[:, shared].mean() / _start(arms[0]):.0%}"
    return Finding(key, Claim(text, measured, holds), cause)


def _start(arm: Arm) -> float:
    return float(np.mean(arm.paths(UTILITY)[:, 0]))


def utility_at(run, share: float) -> float:
    """Utility where the forget probability first falls to `share` of that before, linear between checkpoints.

    NaN where it never does.
    """
    prob, utility = run.path(PROB), run.path(UTILITY)
    level = share * prob[0]
    below = np.flatnonzero(prob <= level)
    if not len(below) or below[0] == 0:
        return float("nan")
    i = below[0]
    part = (prob[i - 1] - level) / (prob[i - 1] - prob[i])
    return float(utility[i - 1] + part * (utility[i] - utility[i - 1]))
