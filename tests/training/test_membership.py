"""Membership attacks against slow versions of their formulas, and intervals against what they promise."""

import math
import zlib

import numpy as np
import pytest
from scipy import stats

from training import membership
from training.scoring import AnswerScores

RNG = np.random.default_rng(0)


def answer(n):
    logps = -RNG.exponential(2.0, n)
    return AnswerScores(logps, -2 - RNG.random(n), RNG.random(n) + 0.1, RNG.random(n) > 0.5)


@pytest.mark.parametrize("n", [2, 3, 7, 30])
def test_scores_are_their_formulas(n):
    row, text = answer(n), "an answer of some words"
    found = membership.scores(row, text)
    lowest = lambda values: -sum(sorted(values)[: max(1, int(0.4 * (n - 1)))]) / max(1, int(0.4 * (n - 1)))  # noqa: E731
    normalized = [(p - m) / s for p, m, s in list(zip(row.logps, row.mean, row.std, strict=True))[:-1]]
    loss = -sum(row.logps) / n
    assert found == pytest.approx(
        {
            "loss": loss,
            "zlib": loss / len(zlib.compress(text.encode())),
            "min_k": lowest(row.logps[:-1]),
            "min_k_plus_plus": lowest(normalized),
        }
    )


@pytest.mark.parametrize("n", [0, 1])
def test_rows_with_nothing_to_score(n):
    found = membership.scores(answer(n), "")
    assert found["min_k"] == found["min_k_plus_plus"] == 0 and math.isfinite(found["zlib"])


def test_a_certain_model_has_finite_scores():
    zeros = np.zeros(5)
    found = membership.scores(AnswerScores(zeros - 1e-9, zeros, zeros, zeros == 0), "text")
    assert all(map(math.isfinite, found.values()))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (12, 7)])
def test_the_auc_counts_pairs(m, n):
    forget, holdout = RNG.integers(0, 6, m).astype(float), RNG.integers(2, 8, n).astype(float)
    pairs = [(f < h) + 0.5 * (f == h) for f in forget for h in holdout]
    found = membership.auc(forget, holdout)
    assert found.value == pytest.approx(np.mean(pairs)) and 0 <= found.low <= found.value <= found.high <= 1


def test_degenerate_aucs():
    assert membership.auc([1.0] * 5, [1.0] * 4).value == 0.5
    apart = membership.auc([0.0] * 40, [1.0] * 40)
    assert apart.value == apart.high == 1 and 0.9 < apart.low < 1
    single = membership.auc([0.0], [1.0])
    assert single.value == 1 and single.low < 0.5  # a pair tells nothing
    for forget, holdout in (([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([math.inf], [1.0])):
        assert all(map(math.isnan, membership.auc(forget, holdout)))


def test_intervals_hold_the_true_value_as_often_as_they_say():
    """Normal scores one deviation apart have an AUC of Phi(1 / sqrt 2)."""
    true = stats.norm.cdf(1 / math.sqrt(2))
    intervals = [membership.auc(RNG.normal(0, 1, 25), RNG.normal(1, 1, 30)) for _ in range(400)]
    covered = np.mean([found.low <= true <= found.high for found in intervals])
    assert 0.92 < covered < 0.985


def test_privleak_has_the_signs_of_muse():
    assert membership.privleak(0.5) == pytest.approx(0.0) and membership.privleak(1.0) == pytest.approx(-100.0)
    assert membership.privleak(0.7, 0.6) == pytest.approx(((1 - 0.7) - (1 - 0.6)) / (1 - 0.6) * 100)
    assert math.isnan(membership.privleak(0.5, 1.0))  # nothing to divide by


def test_a_summary_has_every_attack_there_is():
    forget, holdout = ([membership.scores(answer(9), "text") for _ in range(n)] for n in (6, 5))
    pair = membership.attacks_of(forget), membership.attacks_of(holdout)
    alone = membership.summary(*pair)
    assert {"mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "privleak"} <= alone.keys()
    assert "mia_reference" not in alone and alone["privleak"] == pytest.approx((0.5 - alone["mia_min_k"]) / 0.5 * 100)
    itself = membership.summary(*pair, retrained=pair)
    assert itself["privleak"] == pytest.approx(0.0) and itself["mia_reference"] == 0.5
    broken = membership.summary({"loss": [math.nan], "min_k": [math.nan]}, {"loss": [1.0], "min_k": [1.0]})
    assert broken["mia_loss"] is None and broken["privleak"] is None
    assert membership.summary({}, {})["privleak"] is None
    fewer = tuple({name: values[:1] for name, values in some.items()} for some in pair)
    for other in (fewer, ({}, {}), ({"loss": pair[0]["loss"]}, {"loss": pair[1]["loss"]})):
        with pytest.raises(ValueError, match="expected scores of the retrained model on the same 6 forget and 5"):
            membership.summary(*pair, retrained=other)
