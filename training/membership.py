"""Membership inference: can the forget rows be told apart from similar rows that the model has never seen?

Every attack gives a row a score that is high where the row was probably not learned. Attacks and signs are those of
OpenUnlearning (arXiv 2506.12618), which leaves the last scored token, the end of an answer, out of Min-K%, Min-K%++ and
the gradient norm. With the log-probabilities l_t of the n tokens of a row, and means over the 40 % of the tokens with
the smallest values (at least one):

    loss             - sum_t l_t / n                                      Yeom et al. 2018, arXiv 1709.01604
    zlib             loss / bytes of the text that zlib has compressed    Carlini et al. 2021, arXiv 2012.07805
    min_k            - mean l_t                                           Shi et al. 2024, arXiv 2310.16789
    min_k_plus_plus  - mean (l_t - mu_t) / sigma_t                        Zhang et al. 2024, arXiv 2404.02936
    gradnorm         mean over the parameters of ||d loss / d w||         Maini et al. 2024, arXiv 2402.17012
    reference        loss - loss of the retrained model                   Carlini et al. 2021, arXiv 2012.07805

mu_t and sigma_t: mean and deviation of log p_v for v drawn from the model itself.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import optimize, stats

if TYPE_CHECKING:
    from training.scoring import AnswerScores  # imports transformers

SHARE = 0.4  # of the tokens, in Min-K% and Min-K%++: MUSE's
LEAST_VARIANCE = 1e-6
CONFIDENCE = 0.95
RECOGNISES = 0.9  # the AUC of a model that has probably learned the forget rows

Attacks = Mapping[str, Sequence[float]]  # {attack: a score for each row}
OF_A_MODEL = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradnorm")  # that need no other model


def scores(answer: "AnswerScores", text: str) -> dict[str, float]:
    """{"loss", "zlib", "min_k", "min_k_plus_plus"} of one row, 0 where nothing is scored. `text`: what is scored."""
    body = answer.body
    deviation = np.maximum(body.std, math.sqrt(LEAST_VARIANCE))
    return {
        "loss": answer.nll,
        "zlib": answer.nll / len(zlib.compress(text.encode())),
        "min_k": -_least(body.logps),
        "min_k_plus_plus": -_least((body.logps - body.mean) / deviation),
    }


def _least(values: np.ndarray) -> float:
    """Mean of the smallest `SHARE` of the values, at least of one; 0 of none."""
    count = max(1, int(len(values) * SHARE))
    return float(np.sort(values)[:count].mean()) if len(values) else 0.0


def attacks_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The attack scores from one dictionary per row that also has other measures."""
    return {name: [row[name] for row in rows] for name in OF_A_MODEL if rows and name in rows[0]}


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def auc(forget: Sequence[float], holdout: Sequence[float]) -> Interval:
    """Probability that a forget row has a lower score than a holdout row, ties counting one half, with a 95 % interval.

    1: the model tells forget rows from holdout rows; 0.5: it does not. The area under the ROC curve with holdout rows
    as the positives, as OpenUnlearning has it. The interval is Newcombe's (2006, Statistics in Medicine 25, method 5),
    which also holds at 0 and 1 and for single rows. NaN without rows, or where a score is not finite.
    """
    m, n = len(forget), len(holdout)
    if not m or not n or not np.isfinite([*forget, *holdout]).all():
        return Interval(math.nan, math.nan, math.nan)
    ranks = stats.rankdata([*forget, *holdout])
    value = float((ranks[m:].sum() - n * (n + 1) / 2) / (m * n))
    z, half = stats.norm.ppf((1 + CONFIDENCE) / 2), (m + n) / 2 - 1

    def off(theta: float, side: int) -> float:
        spread = theta * (1 - theta) * (1 + half * ((1 - theta) / (2 - theta) + theta / (1 + theta))) / (m * n)
        return theta + side * z * math.sqrt(max(0.0, spread)) - value

    # at 0 and 1 the spread is 0, which is a root, and not the one of a value that is 0 or 1
    low = 0.0 if value == 0 else optimize.brentq(off, 0, min(value, 1 - 1e-12), args=(1,))
    high = 1.0 if value == 1 else optimize.brentq(off, max(value, 1e-12), 1, args=(-1,))
    return Interval(value, float(low), float(high))


def privleak(value: float, retrained: float = 0.5) -> float:
    """PrivLeak (MUSE, arXiv 2407.06460, eq. 2) in percent, of the AUC and that of the retrained model.

    ((1 - AUC) - (1 - AUC_retrained)) / (1 - AUC_retrained) * 100. Far below 0: the forget rows are still recognised;
    far above: they stand out, as less likely than rows that were never seen. NaN where AUC_retrained is 1, which leaves
    nothing to divide by; near 1 it is in the hundreds or thousands for every model (`doubts`).
    """
    return (retrained - value) / (1 - retrained + 1e-10) * 100 if retrained < 1 else math.nan


def doubts(retrained: tuple[Attacks, Attacks] | None) -> list[str]:
    """Reasons to doubt that the scores are of a model that never saw the forget rows, by its AUC of Min-K%."""
    if not retrained or not all("min_k" in some for some in retrained):
        return []
    value = auc(*(some["min_k"] for some in retrained)).value
    if not value >= RECOGNISES:
        return []
    outcome = f"is divided by {1 - value:.3g}" if value < 1 else "would be divided by 0 and is left out"
    return [
        f"--retain_log: its model tells the forget rows from others (AUC of Min-K% {value:.3f}), like a model that has "
        f"learned them, and PrivLeak, a share of 1 - AUC, {outcome}; expected the log of a model that never saw the "
        "forget set"
    ]


def summary(
    forget: Attacks, holdout: Attacks, retrained: tuple[Attacks, Attacks] | None = None
) -> dict[str, float | None]:
    """{"mia_loss", "mia_loss_low", "mia_loss_high", ..., "privleak"}: AUCs with their intervals; None for NaN.

    `retrained`: the scores of the retrained model on the same rows, for the reference attack and PrivLeak, which
    without them takes an AUC of 0.5. It is None where there is none. ValueError where they are of other rows.
    """
    found: dict[str, float | None] = {}
    pairs = {name: (forget[name], holdout[name]) for name in forget.keys() & holdout.keys()}
    before = 0.5
    if retrained and "loss" in pairs:
        sizes, others = ([len(some.get("loss", ())) for some in each] for each in ((forget, holdout), retrained))
        if sizes != others or not all("min_k" in some for some in retrained):
            raise ValueError(
                f"membership attacks: expected scores of the retrained model on the same {sizes[0]} forget and "
                f"{sizes[1]} holdout rows, got {others[0]} and {others[1]}; evaluate it with the same options"
            )
        before = auc(*(some["min_k"] for some in retrained)).value
        pairs["reference"] = tuple(
            np.subtract(own, other["loss"]).tolist() for own, other in zip(pairs["loss"], retrained, strict=True)
        )
    for name in (*OF_A_MODEL, "reference"):
        if name in pairs:
            parts = zip(("", "_low", "_high"), auc(*pairs[name]), strict=True)
            found |= {f"mia_{name}{part}": None if math.isnan(x) else x for part, x in parts}
    value = found.get("mia_min_k")
    leak = math.nan if value is None else privleak(value, before)
    found["privleak"] = None if math.isnan(leak) else leak
    return found
