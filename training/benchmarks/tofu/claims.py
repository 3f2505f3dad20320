"""Claims of the NPO paper about TOFU (arXiv 2404.05868, section 5), compared with the medians of a grid."""

from collections.abc import Mapping
from typing import Any

from training.benchmarks.base import Claim
from training.histories import Histories, at_end, best_while_kept
from training.methods import METHODS

GOOD_QUALITY = 0.05  # a p-value above it: not told apart from the retrained model
KEPT = 0.8  # share of the utility before unlearning that counts as kept
LOST = 0.5
LARGEST_CLAIMED = 30  # % to forget: for more, the paper claims it of larger retain weights only
UTILITY = "model_utility_geometric"


def of_npo(start: Mapping[str, Any], histories: Histories, percent: int) -> list[Claim]:
    """Those whose methods were run; `start`: the summary before unlearning."""
    utility_before = start[UTILITY]
    if not (utility_before or 0) > 0:
        return []  # there is nothing to keep or to lose

    def end(method: str, key: str) -> float:
        return at_end(histories[method], key)

    def values(key: str, *methods: str) -> str:
        return ", ".join(f"{METHODS[m].label} {end(m, key):.3g}" for m in methods)

    found = []
    if "ga" in histories:
        utility = end("ga", UTILITY)
        measured = f"utility {utility_before:.3g} -> {utility:.3g}"
        found.append(
            Claim("GA collapses: it loses the utility of the model", measured, utility < LOST * utility_before)
        )
    if {"ga", "npo"} <= histories.keys():
        for key, text, unit in (
            (UTILITY, "NPO keeps more than GA", "utility at the end"),
            ("retain_rougeL", "NPO still answers what was to be kept where GA no longer does", "ROUGE-L, retain"),
        ):
            holds = end("npo", key) > end("ga", key)
            found.append(Claim(text, f"{values(key, 'ga', 'npo')} ({unit})", holds))
    if "npo_rt" in histories and percent <= LARGEST_CLAIMED:
        quality, utility = (end("npo_rt", k) for k in ("forget_quality", UTILITY))
        found.append(
            Claim(
                f"NPO+RT ends with a forget quality above {GOOD_QUALITY} and keeps the utility",
                f"forget quality {quality:.3g}, utility {utility_before:.3g} -> {utility:.3g}",
                quality > GOOD_QUALITY and utility >= KEPT * utility_before,
            )
        )
        best = {m: best_while_kept(histories[m], "forget_quality", UTILITY, KEPT * utility_before) for m in histories}
        if len(best) > 1:
            found.append(
                Claim(
                    f"NPO+RT alone reaches a forget quality above {GOOD_QUALITY} with {KEPT:.0%} of the utility kept",
                    ", ".join(f"{METHODS[m].label} {q:.3g}" for m, q in best.items()),
                    [m for m, q in best.items() if q > GOOD_QUALITY] == ["npo_rt"],
                )
            )
    return found
