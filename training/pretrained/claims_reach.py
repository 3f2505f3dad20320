"""Claims of the NPO paper (arXiv 2404.05868, section 5) on what is reached: a forget quality above 0.05 with the
utility of the retain model, here at least 0.9 of it; and what the retain weight of NPO+RT does.

Where 0.9 is in the interval of the utility's share, rows resampled, it cannot be told whether the utility is kept.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from training.benchmarks.tofu.claims import GOOD_QUALITY
from training.methods import METHODS
from training.pretrained import noise
from training.pretrained.findings import Finding, Interval, absent, by_count
from training.pretrained.outcomes import (
    NEAR,
    QUALITY,
    Arm,
    Measure,
    Outcomes,
    Run,
    middle_and_range,
    number,
    reaches,
    row_values,
    seeds_words,
)
from training.pretrained.utility import UTILITY
from training.reports.claims import Claim, Difference

RIVALS = ("ga", "dpo", "idk", "kto", "npo")  # families of the NPO paper
WANTED = f"a forget quality above {GOOD_QUALITY} with {NEAR:.0%} of the retain model's utility"


def somewhere(outcomes: Outcomes, scenario: str) -> Finding:
    """At some checkpoint after the start."""
    key, text = f"reach, {scenario}", f"NPO+RT reaches {WANTED} ({scenario}, NPO paper)"
    arm = outcomes.arm(scenario, "npo_rt")
    if arm is None or not _comparable(outcomes, arm):
        return absent(key, text, f"NPO+RT or the retain model in {scenario}")
    best = arm.best_qualities(outcomes.least_utility(scenario))
    good = reaches(best)
    measured = f"{good.sum()} of {len(good)} seeds; best forget quality {middle_and_range(best)}"
    measured += _ceiling(outcomes, scenario)
    there = [checkpoint for run in arm.runs if (checkpoint := _most_useful(run))]
    share, words = _share(outcomes, scenario, there)
    measured += f"; where it is above {GOOD_QUALITY}, utility at most {words}" if words else ""
    decided = by_count(good)
    holds, cause = _told(decided, share), ""
    if holds is not decided:
        cause = _untold(words)
    elif not holds:
        cause = _cause(outcomes, arm, good) + _longer(outcomes, arm)
    return Finding(key, Claim(text, measured, holds), cause)


def at_end(outcomes: Outcomes, scenario: str) -> Finding:
    """At the last checkpoint."""
    key, text = f"end, {scenario}", f"NPO+RT is still there at the end ({scenario})"
    arm = outcomes.arm(scenario, "npo_rt")
    if arm is None or not _comparable(outcomes, arm):
        return absent(key, text, f"NPO+RT or the retain model in {scenario}")
    quality, utility = arm.ends(QUALITY), arm.ends(UTILITY)
    kept = utility >= outcomes.least_utility(scenario)
    good = reaches(quality) & kept
    measured = (
        f"{good.sum()} of {len(good)} seeds; forget quality {middle_and_range(quality)}, utility "
        f"{middle_and_range(utility)}, of the retain model {outcomes.retain_utility(scenario):.2g}"
    )
    ends = [run.end for run in arm.runs]
    share, words = _share(outcomes, scenario, ends)
    measured += f": {words}" if words else ""
    holds = _told(by_count(good), share if reaches(quality).any() else None)
    cause = ""
    if holds is not by_count(good):
        cause = _untold(words)
    elif not holds:
        failed = [f"the utility in {(~kept).sum()}"] if not kept.all() else []
        failed += [f"the forget quality in {(~reaches(quality)).sum()}"] if not reaches(quality).all() else []
        cause = f"what misses, in seeds: {', '.join(failed)}; {direction(outcomes, arm, ends)}"
        cause += _longer(outcomes, arm)
    return Finding(key, Claim(text, measured, holds), cause)


def alone(outcomes: Outcomes, scenario: str) -> Finding:
    """No other method of the paper reaches it, in the median over its seeds; newer methods are named beside."""
    key, text = f"alone, {scenario}", f"No other method of the NPO paper reaches that ({scenario})"
    arms = [arm for arm in outcomes.main_arms(scenario) if arm.method != "npo_rt"]
    rivals = [arm for arm in arms if METHODS[arm.method].family in RIVALS]
    least = outcomes.least_utility(scenario)
    if not rivals or np.isnan(least):
        return absent(key, text, f"other methods or the retain model in {scenario}")
    best = {arm.method: arm.best_qualities(least) for arm in arms}
    newer = [arm.method for arm in arms if arm not in rivals and reaches(np.median(best[arm.method]))]
    measured = "best forget quality " + ", ".join(
        f"{_label(m)} {f'{np.median(q):.2g}' if np.median(q) else 'none'}" for m, q in best.items()
    )
    found = {arm.method: _attains(outcomes, arm) for arm in rivals}
    there = [_label(method) for method, (attained, _) in found.items() if attained]
    untold = [f"{_label(method)} {words}" for method, (attained, words) in found.items() if attained is None]
    cause = ""
    if there:
        cause = f"{', '.join(there)} reach{'es' * (len(there) == 1)} it too"
        cause += _ceiling(outcomes, scenario)
    elif untold:
        cause = _untold("; ".join(untold))
    elif newer:
        measured += f"; of later papers {', '.join(map(_label, newer))} above {GOOD_QUALITY}"
    return Finding(key, Claim(text, measured, False if there else None if untold else True), cause)


def _attains(outcomes: Outcomes, arm: Arm) -> tuple[bool | None, str]:
    """Whether most seeds reach the forget quality somewhere, with the utility; that utility in words."""
    there = [checkpoint for run in arm.runs if (checkpoint := _most_useful(run))]
    if 2 * len(there) <= len(arm.runs):
        return False, ""
    share, words = _share(outcomes, arm.scenario, there)
    return _told(share is not None and share.mean >= NEAR, share), words


def weight_reaches(outcomes: Outcomes, scenario: str) -> Finding:
    """The largest retain weight of NPO+RT reaches the forget quality where the smallest does not."""
    key, text = f"weight reaches, {scenario}", f"A higher retain weight lets NPO+RT reach {WANTED} ({scenario})"
    arms = _weights(outcomes, scenario)
    least = outcomes.least_utility(scenario)
    if len(arms) < 2 or np.isnan(least):
        return absent(key, text, f"two retain weights of NPO+RT in {scenario}")
    best = [arm.best_qualities(least) for arm in arms]
    measured = "best forget quality " + ", ".join(
        f"weight {arm.retain_weight:g}: {middle_and_range(q)} ({seeds_words(len(q))})"
        for arm, q in zip(arms, best, strict=True)
    )
    low, high = bool(reaches(np.median(best[0]))), bool(reaches(np.median(best[-1])))
    there = [checkpoint for run in arms[-1].runs if (checkpoint := _most_useful(run))]
    share, words = _share(outcomes, scenario, there)
    measured += f"; utility of the largest, where it is above {GOOD_QUALITY}, at most {words}" if words else ""
    decided = None if low and high else high
    holds, cause = _told(decided, share), ""
    if low and high:
        cause = f"weight {arms[0].retain_weight:g} reaches it as well"
    elif holds is not decided:
        cause = _untold(words)
    elif not holds:
        cause = direction(outcomes, arms[-1], _bests(outcomes, arms[-1]))
    return Finding(key, Claim(text, measured, holds), cause + _rates(arms) if not holds else cause)


def weight_keeps(outcomes: Outcomes, scenario: str) -> Finding:
    """Utility at the end of the largest retain weight minus that of the smallest, paired by seed."""
    key, text = f"weight keeps, {scenario}", f"A higher retain weight of NPO+RT keeps more utility ({scenario})"
    arms = _weights(outcomes, scenario)
    if len(arms) < 2:
        return absent(key, text, f"two retain weights of NPO+RT in {scenario}")
    low, high = ({run.seed: number(run.end, UTILITY) for run in arm.runs} for arm in (arms[0], arms[-1]))
    seeds = sorted(low.keys() & high.keys())
    if not seeds:
        return absent(key, text, f"two retain weights of NPO+RT with the same seed in {scenario}")
    values = np.array([high[seed] - low[seed] for seed in seeds])
    difference = Difference.of(values)
    measured = "utility at the end " + ", ".join(
        f"weight {arm.retain_weight:g}: {middle_and_range(arm.ends(UTILITY))}" for arm in arms
    )
    words = difference.words() if len(values) > 1 else f"{difference.mean:+.3f} (one seed: no interval)"
    measured += f"; largest minus smallest {words}"
    cause = ""
    if difference.positive is None:
        cause = "one seed" if len(values) == 1 else f"the seeds differ by {values.max() - values.min():.2g}"
    elif not difference.positive:
        cause = f"the smallest weight loses only {outcomes.retain_utility(scenario) - np.mean([*low.values()]):.2g} "
        cause += "to the retain model: there is little to keep"
    return Finding(key, Claim(text, measured, difference.positive), cause + _rates(arms) if cause else "")


def direction(outcomes: Outcomes, arm: Arm, measures: Iterable) -> str:
    """Whether the truth ratios of a method stay on the full model's side of the retain model's, or went beyond."""
    retain, full = outcomes.retain(arm.scenario), arm.runs[0].checkpoints[0]
    if retain is None:
        return "no retain model to compare with"
    aim, start = (float(np.median(row_values(measure, noise.RATIO))) for measure in (retain, full))
    here = float(np.median([np.median(row_values(measure, noise.RATIO)) for measure in measures]))
    side = "forgets too little" if (here - aim) * (start - aim) > 0 else "goes too far"
    return f"it {side}: median log truth ratio {start:.2f} before, {here:.2f} now, {aim:.2f} of the retain model"


def _bests(outcomes: Outcomes, arm: Arm) -> list:
    least = outcomes.least_utility(arm.scenario)
    return [run.best(least) or run.end for run in arm.runs]


def _comparable(outcomes: Outcomes, arm: Arm) -> bool:
    """Whether there is a retain model's utility, and a forget quality against that model."""
    return bool(np.isfinite(outcomes.retain_utility(arm.scenario)) and np.isfinite(arm.paths(QUALITY)).any())


def _most_useful(run: Run) -> Measure | None:
    """Of the checkpoints after the start that reach the forget quality, that of the most utility."""
    found = [checkpoint for checkpoint in run.checkpoints[1:] if number(checkpoint, QUALITY) > GOOD_QUALITY]
    return max(found, key=lambda checkpoint: number(checkpoint, UTILITY), default=None)


def _share(outcomes: Outcomes, scenario: str, measures: Sequence[Measure]) -> tuple[Interval | None, str]:
    """The utility of the measures as a share of the retain model's, and in words; None where there is none."""
    retain = outcomes.retain(scenario)
    if not measures or retain is None:
        return None, ""
    share = noise.utility_share(measures, retain, outcomes.parts)
    return share, f"{share.mean:.0%} [{share.low:.0%}, {share.high:.0%}] of the retain model's"


def _told(holds: bool | None, share: Interval | None) -> bool | None:
    """None as well where the rows are too few to say whether the utility is kept."""
    return None if share and share.low < NEAR <= share.high else holds


def _untold(words: str) -> str:
    return f"the rows are too few: {NEAR:.0%} is within the interval of the utility, {words}"


def _cause(outcomes: Outcomes, arm: Arm, good: np.ndarray) -> str:
    bests = [run.best(outcomes.least_utility(arm.scenario)) for run in arm.runs]
    missed = [run for run, reached in zip(arm.runs, good, strict=True) if not reached]
    if not any(bests):
        return f"the utility is never kept: at the end {middle_and_range(arm.ends(UTILITY))}"
    return direction(outcomes, arm, [run.best(outcomes.least_utility(arm.scenario)) or run.end for run in missed])


def _longer(outcomes: Outcomes, arm: Arm) -> str:
    """What a run of more epochs came to, if there is one: whether it is time that is missing."""
    longer = outcomes.longer(arm.scenario, arm.method)
    if longer is None:
        return ""
    words = _share(outcomes, arm.scenario, [run.end for run in longer.runs])[1]
    return (
        f"; after {longer.epochs:g} epochs instead of {arm.epochs:g} the forget quality is "
        f"{middle_and_range(longer.ends(QUALITY))}, the utility {words}"
    )


def _ceiling(outcomes: Outcomes, scenario: str) -> str:
    p = noise.ceiling(outcomes, scenario)
    return "" if np.isnan(p) else f"; another seed of the retain model has {p:.2g}"


def _weights(outcomes: Outcomes, scenario: str) -> list[Arm]:
    return [arm for arm in outcomes.weights(scenario, "npo_rt") if arm.retain_weight is not None]


def _rates(arms: list[Arm]) -> str:
    rates = {run.lr for arm in arms for run in arm.runs}
    return f"; the learning rates are not the same: {', '.join(f'{lr:g}' for lr in sorted(rates))}" * (len(rates) > 1)


def _label(method: str) -> str:
    return METHODS[method].label
