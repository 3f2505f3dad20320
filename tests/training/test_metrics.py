"""The metrics against their definitions, written out, and at the ends of their ranges."""

import math

import numpy as np
import pytest

from training import metrics

RNG = np.random.default_rng(0)
NLL, PERTURBED = RNG.uniform(0.1, 6, 7), RNG.uniform(0.1, 6, (7, 3))


def test_option_probability_is_the_share_of_the_answer():
    p, wrong = np.exp(-NLL), np.exp(-PERTURBED)
    np.testing.assert_allclose(metrics.option_probability(NLL, PERTURBED), p / (p + wrong.sum(1)), rtol=1e-14)


def test_option_probability_of_answers_that_underflow():
    (value,) = metrics.option_probability([2000.0], [[2000.0, 2000.0, 2000.0]])
    assert value == pytest.approx(0.25)


def test_truth_ratios_are_wrong_over_right():
    right, wrong = np.exp(-NLL), np.exp(-PERTURBED)
    geometric = wrong.prod(1) ** (1 / 3) / right
    arithmetic = wrong.mean(1) / right
    np.testing.assert_allclose(np.exp(metrics.log_truth_ratio(NLL, PERTURBED, "geometric")), geometric, rtol=1e-13)
    np.testing.assert_allclose(np.exp(metrics.log_truth_ratio(NLL, PERTURBED, "arithmetic")), arithmetic, rtol=1e-13)
    assert (arithmetic > geometric).all()
    with pytest.raises(ValueError, match="or \"arithmetic\", got 'median'"):
        metrics.log_truth_ratio(NLL, PERTURBED, "median")


def test_truth_ratio_scores():
    ratios = np.array([0.25, 1.0, 4.0])
    np.testing.assert_allclose(metrics.truth_ratio_kept(np.log(ratios)), [0.75, 0, 0], atol=1e-15)
    np.testing.assert_allclose(metrics.truth_ratio_forgotten(np.log(ratios)), [0.25, 1, 0.25], rtol=1e-15)


@pytest.mark.filterwarnings("error")
def test_a_ruined_model_has_metrics():
    log_ratio = metrics.log_truth_ratio([4000.0, 1.0], [[1.0, 2.0], [4000.0, 5000.0]], "arithmetic")
    assert metrics.truth_ratio_kept(log_ratio).tolist() == [0.0, 1.0]
    assert metrics.truth_ratio_forgotten(log_ratio).tolist() == [0.0, 0.0]
    assert metrics.model_utility([0.5] * 8 + [0.0]) == 0.0


def test_model_utility_is_the_harmonic_mean():
    values = [0.2, 0.9, 0.5]
    assert metrics.model_utility(values) == pytest.approx(3 / sum(1 / v for v in values), rel=1e-15)


@pytest.mark.parametrize("n", [40, 200, 300])
def test_forget_quality_reaches_the_floor_of_the_exact_test(n):
    apart = metrics.forget_quality(np.arange(n), n + np.arange(n))
    assert apart == pytest.approx(2 / math.comb(2 * n, n), rel=1e-9, abs=0)
    assert metrics.forget_quality(np.arange(n), np.arange(n)) == 1.0


def test_forget_quality_is_invariant_to_monotone_maps():
    a, b = RNG.normal(size=40), RNG.normal(0.4, size=40)
    expected = metrics.forget_quality(a, b)
    assert 1e-4 < expected < 1
    assert metrics.forget_quality(np.exp(-a), np.exp(-b)) == pytest.approx(expected, rel=1e-12)


def test_rouge_recall_divides_by_the_reference():
    found = metrics.rouge("the author wrote seven novels", "She said: seven novels the author has written.")
    precision, recall = 2 / 8, 2 / 5
    f1 = 2 * precision * recall / (precision + recall)
    assert found == pytest.approx({"rouge1_recall": 4 / 5, "rougeL_recall": recall, "rougeL_f1": f1})
    assert metrics.rouge("two novels", "two, and a novel, and more")["rougeL_recall"] == 1.0  # stems
    assert metrics.rouge("two novels", "two, and a novel, and more", use_stemmer=False)["rougeL_recall"] == 0.5
    assert set(metrics.rouge("", "said").values()) == set(metrics.rouge("said", "").values()) == {0.0}


def test_extraction_strength_and_exact_memorization():
    cases = {(1, 1, 1, 1): (1.0, 1.0), (0, 1, 1, 1): (0.75, 0.75), (1, 0, 1, 1): (0.5, 0.75), (1, 1, 1, 0): (0.0, 0.75)}
    for hits, (strength, memorized) in (cases | {(0,): (0.0, 0.0), (1,): (1.0, 1.0), (): (None, None)}).items():
        assert metrics.extraction_strength(hits) == strength
        assert metrics.exact_memorization(hits) == memorized


def test_the_mean_is_of_what_there_is():
    assert metrics.mean([1.0, None, 2.0]) == 1.5 and metrics.mean([None]) is None and metrics.mean([]) is None


def test_ngram_entropy_is_that_of_the_counts():
    text = "a b a b a c"  # pairs: ab 2, ba 2, ac 1; triples: aba 2, bab 1, bac 1
    pairs = -sum(p * np.log2(p) for p in (2 / 5, 2 / 5, 1 / 5))
    triples = -sum(p * np.log2(p) for p in (2 / 4, 1 / 4, 1 / 4))
    assert metrics.ngram_entropy(text) == pytest.approx(2 / 3 * pairs + 4 / 3 * triples)
    assert metrics.ngram_entropy("") == metrics.ngram_entropy("one") == metrics.ngram_entropy("no no no no") == 0.0
    assert metrics.ngram_entropy("one two") == 0.0 and metrics.ngram_entropy("one two three") == pytest.approx(2 / 3)


def test_repetition_and_compression_tell_loops_and_noise_from_text():
    text = "Jaime Vasquez was born on the 25th of February in the year 1958, and has written true crime ever since."
    loop, stuck = "the book is the book is " * 20, "also" * 60
    noise = "".join(RNG.choice(list("abcdefghijklmnopqrstuvwxyz0123456789 "), 200))
    assert metrics.repetition(text) == 0.0 and metrics.repetition(loop) > 0.9
    assert metrics.repetition("!" * 50) > 0.9 and metrics.repetition("") == metrics.repetition("one two") == 0.0
    assert metrics.compression_ratio(noise) < 1.4 < 8 < min(map(metrics.compression_ratio, (loop, stuck)))
    assert 0.9 < metrics.compression_ratio(text) < 2
