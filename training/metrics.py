"""The metrics of unlearning, as pure functions on arrays and strings. N examples, K perturbed answers each.

A loss here is the mean negative log-likelihood a token of one answer, in nats: nll = -log P(a|q) / |a|, <eos> counted,
so that exp(-nll) = P(a|q)^(1/|a|) is the geometric mean of the token probabilities.

Sources: TOFU (Maini et al. 2024, arXiv 2401.06121, section 2.2), which NPO (Zhang et al. 2024, arXiv 2404.05868) takes
over; exact memorisation: Tirumala et al. 2022, arXiv 2205.10770; extraction strength as in OpenUnlearning (Dorna et al.
2025, arXiv 2506.12618).
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

Mean = Literal["geometric", "arithmetic"]
Array = np.ndarray


def probability(nll: ArrayLike) -> Array:
    """(N,) P(a|q)^(1/|a|) = exp(-nll), in [0, 1]: Probability on what a model was trained on (TOFU, section 2.2.1)."""
    return np.exp(-np.asarray(nll, dtype=np.float64))


def option_probability(
    nll: ArrayLike,  # (N,) of the true answer
    perturbed_nll: ArrayLike,  # (N, K) of the wrong ones
) -> Array:
    """(N,) p / (p + sum_k p_k) with p = exp(-nll), in [0, 1]: Probability on real authors and world facts (TOFU).

    A softmax over the K + 1 answers, which also holds where every p is too small for a float64.
    """
    return special.softmax(-np.column_stack([nll, perturbed_nll]).astype(np.float64), axis=1)[:, 0]


def log_option_probability(nll: ArrayLike, perturbed_nll: ArrayLike) -> Array:
    """(N,) its logarithm, which is finite where the probability itself is too small for a float64."""
    return special.log_softmax(-np.column_stack([nll, perturbed_nll]).astype(np.float64), axis=1)[:, 0]


def log_truth_ratio(
    paraphrased_nll: ArrayLike,  # (N,) of the paraphrased answer, or of the answer itself where there is none
    perturbed_nll: ArrayLike,  # (N, K)
    mean: Mean,
) -> Array:
    """(N,) log R, where R = mean_k P(perturbed_k|q)^(1/|.|) / P(paraphrased|q)^(1/|.|) (TOFU, eq. 1).

    The papers take the arithmetic mean over k. All published log files and leaderboards take the geometric one,
    exp(mean_k log p_k), and Forget Quality is always computed with it. As a logarithm, because a model that gradient
    ascent has ruined gives ratios beyond any float.
    """
    paraphrased, perturbed = (np.asarray(x, dtype=np.float64) for x in (paraphrased_nll, perturbed_nll))
    if mean == "geometric":
        return paraphrased - perturbed.mean(axis=1)
    if mean == "arithmetic":
        return paraphrased + special.logsumexp(-perturbed, axis=1) - np.log(perturbed.shape[1])
    raise ValueError(f'mean: expected "geometric" or "arithmetic", got {mean!r}')


def truth_ratio_kept(log_ratio: ArrayLike) -> Array:
    """(N,) max(0, 1 - R), in [0, 1]: high where the truth is likelier than what is wrong. Retain, real, world sets."""
    return -np.expm1(np.minimum(log_ratio, 0.0))


def truth_ratio_forgotten(log_ratio: ArrayLike) -> Array:
    """(N,) min(R, 1/R), in [0, 1]: high where the truth is as likely as what is wrong. The forget set."""
    return np.exp(-np.abs(log_ratio))


def rouge(reference: str, generated: str, use_stemmer: bool = True) -> dict[str, float]:
    """{"rouge1_recall", "rougeL_recall", "rougeL_f1"} in [0, 1] (Lin 2004).

    Recall: share of the reference's words that are generated, which does not punish what is said beyond it; rouge1
    counts all words, in any order, rougeL those in the longest common subsequence. TOFU (section 2.2.1) reports
    rougeL_recall with stemmed words, MUSE (arXiv 2407.06460, section 3) rougeL_f1 without a stemmer.
    """
    found = _rouge(use_stemmer).score(reference, generated)
    one, longest = found["rouge1"], found["rougeL"]
    return {"rouge1_recall": one.recall, "rougeL_recall": longest.recall, "rougeL_f1": longest.fmeasure}


@cache
def _rouge(use_stemmer: bool):
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk: half a second that reading a log need not take

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=use_stemmer)


def model_utility(components: Sequence[float]) -> float:
    """Harmonic mean, in [0, 1], of Probability, ROUGE-L and Truth Ratio on the retain, real-author and world-fact sets.

    Nine numbers (TOFU, section 2.2.1); 0 if any of them is 0.
    """
    values = np.asarray(components, dtype=np.float64)
    return float(stats.hmean(values)) if (values != 0).all() else 0.0  # scipy warns of the division


def forget_quality(log_ratio: ArrayLike, retain_log_ratio: ArrayLike) -> float:
    """p-value of the two-sided, exact Kolmogorov-Smirnov test on the forget set's truth ratios (TOFU, section 2.2.2).

    Of the unlearned model against a model that never saw the forget set. Above 0.05: not told apart. The smallest value
    that N against N examples can give is 2 / C(2N, N), so values of different N do not compare. Ranks decide, so log R
    serves as well as R, and R as well as 1/R.
    """
    return float(stats.ks_2samp(log_ratio, retain_log_ratio, alternative="two-sided", method="exact").pvalue)


def exact_memorization(hits: ArrayLike) -> float | None:
    """Share of answer tokens, in [0, 1], that are the most likely ones after the true tokens before them (EM).

    `hits[t]`: whether the t-th is. None where there are none.
    """
    hits = np.asarray(hits, dtype=bool)
    return float(hits.mean()) if len(hits) else None


def extraction_strength(hits: ArrayLike) -> float | None:
    """1 - k/n, in [0, 1], for the fewest k true tokens of n after which all others are the most likely ones (ES).

    1: the question alone suffices. 0: even the last token is missed (OpenUnlearning's code gives 1/n there). None where
    there are no tokens.
    """
    hits = np.asarray(hits, dtype=bool)
    missed = np.flatnonzero(~hits)
    if not len(hits):
        return None
    return 1.0 - float(missed[-1] + 1) / len(hits) if len(missed) else 1.0


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values there are; None where there are none."""
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def repetition(text: str, n: int = 4) -> float:
    """seq-rep-n = 1 - distinct / all n-grams of words and punctuation marks, in [0, 1) (Welleck et al. 2020,
    arXiv 1908.04319).

    Human text has about 0; a model stuck in a loop about 1. Texts of fewer than n + 1 such words have none to repeat.
    """
    grams = _grams(text, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def ngram_entropy(text: str) -> float:
    """2/3 H_2 + 4/3 H_3, in bits, with the entropy H_n of the n-grams of the text (Zhang et al. 2018, arXiv 1809.05972;
    with these weights the fluency of ROME, Meng et al. 2022, arXiv 2202.05262).

    Low where few phrases come again and again; it grows with the length of a text. 0 where there is no pair of words.
    """
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = np.array([*Counter(_grams(text, n)).values()], dtype=np.float64)
        total += weight * float(stats.entropy(counts, base=2)) if len(counts) else 0.0
    return total


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    """n-grams of words and punctuation marks."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def compression_ratio(text: str) -> float:
    """UTF-8 bytes / zlib bytes. English answers: 1 to 2; loops, also within a "word": far above; random letters: below.

    The measure that Whisper (Radford et al. 2022, arXiv 2212.04356, section 4.5) uses to find degenerate output.
    """
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw)) if raw else 1.0
