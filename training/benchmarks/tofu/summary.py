"""TOFU's metrics of a model, from its evaluation log: twelve components, model utility, forget quality."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from training import membership, metrics
from training.benchmarks.base import ITSELF
from training.benchmarks.tofu.log import OPTION_SETS, PERTURBED, EvalLog, EvalSet, require_same_questions

UTILITY_SETS = ("retain", "ra", "wf")
UTILITY_PARTS = tuple(f"{name}_{measure}" for name in UTILITY_SETS for measure in ("prob", "rougeL", "tr"))
NAMES = {"retain": "retain", "ra": "real authors", "wf": "world facts", "forget": "forget"}
MEASURES = {  # of a set, and their headings
    "prob": "Prob",
    "rougeL": "ROUGE-L",
    "tr": "TR",
    "tr_arithmetic": "TR (a)",
    "exact_memorization": "EM",
    "extraction_strength": "ES",
    "repetition": "repeat",
    "ngram_entropy": "entropy",
    "compression_ratio": "zlib",
    "classifier_prob": "fluent",
}
KNOWN = 0.9  # mean probability of answers that were probably learned
PER_EXAMPLE_EXTRAS = (
    "exact_memorization",
    "extraction_strength",
    "classifier_prob",
)  # in the logs that `training.evaluate` writes


def summary(log: EvalLog, retain_log: EvalLog | None = None) -> dict[str, Any]:
    """{"model_utility_geometric", "model_utility_arithmetic", "forget_quality", "retain_prob", ..., "forget_tr", ...}.

    Means over the examples of a set; `*_tr` with the geometric truth ratio, `*_tr_arithmetic` with the other one. The
    forget quality is None without the log of a model that was retrained without the forget set.
    """
    result: dict[str, Any] = {
        "model_utility_geometric": None,
        "model_utility_arithmetic": None,
        "forget_quality": forget_quality(log, retain_log) if retain_log else None,
    }
    for name, examples in log.sets.items():
        result |= {
            f"{name}_prob": float(_probability(name, examples).mean()),
            f"{name}_rougeL": float(examples.array("rougeL_recall").mean()),
            f"{name}_tr": float(_truth_ratio(name, examples, "geometric").mean()),
        }
    arithmetic = {
        f"{name}_tr": float(_truth_ratio(name, examples, "arithmetic").mean()) for name, examples in log.sets.items()
    }
    result["model_utility_geometric"] = _utility(result)
    result["model_utility_arithmetic"] = _utility(result | arithmetic)
    result |= {f"{key}_arithmetic": value for key, value in arithmetic.items()}
    for name, examples in log.sets.items():
        result |= _extras(name, examples)
    if log.membership:
        result |= membership.summary(*log.membership, retrained=retain_log.membership if retain_log else None)
    return result


def utility_rows(log: EvalLog) -> dict[str, np.ndarray]:
    """{"retain_prob": (rows,), ...}: the nine numbers of the geometric model utility are the means of these."""
    found = {}
    for name in UTILITY_SETS:
        examples = log.sets[name]
        found[f"{name}_prob"] = _probability(name, examples)
        found[f"{name}_rougeL"] = examples.array("rougeL_recall")
        found[f"{name}_tr"] = _truth_ratio(name, examples, "geometric")
    return found


def by_set(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(headings, rows): one row a set; a measure that the log does not allow is None."""
    return ["set", *MEASURES.values()], [
        [label, *(result.get(f"{name}_{key}") for key in MEASURES)] for name, label in NAMES.items()
    ]


def headline(result: Mapping[str, Any]) -> str:
    quality = result["forget_quality"]
    text = (
        f"Model utility {result['model_utility_geometric']:.4f} (geometric truth ratio; arithmetic "
        f"{result['model_utility_arithmetic']:.4f}). Forget quality: "
        + ("no --retain_log to compare with." if quality is None else f"p = {quality:.4g}.")
    )
    if result.get("mia_min_k") is not None:
        low, high = result["mia_min_k_low"], result["mia_min_k_high"]
        text += f" Membership by Min-K%: AUC {result['mia_min_k']:.3f} [{low:.3f}, {high:.3f}]"
        text += "." if result["privleak"] is None else f", PrivLeak {result['privleak']:.1f} %."
    return text


def forget_quality(log: EvalLog, retain_log: EvalLog) -> float:
    """p-value of the exact KS test between the geometric truth ratios of two logs of the same forget set."""
    require_same_questions(log, retain_log)
    return metrics.forget_quality(*(_log_ratio(x.sets["forget"], "geometric") for x in (log, retain_log)))


def doubts(log: EvalLog, retain_log: EvalLog) -> list[str]:
    """Reasons to doubt that the retain log is of a model trained without the forget set."""
    ours, theirs = log.sets["forget"], retain_log.sets["forget"]
    found = []
    if all(np.array_equal(ours.array(field), theirs.array(field)) for field in ("avg_paraphrased_loss", PERTURBED)):
        found.append(ITSELF)
    known = float(_probability("forget", theirs).mean())
    if known >= KNOWN:
        found.append(
            f"--retain_log: its model gives the forget answers a probability of {known:.3f}, like a model that has "
            "learned them, so that forget quality is high where nothing was forgotten; expected the log of a model "
            "that never saw the forget set"
        )
    return found + membership.doubts(retain_log.membership)


def _probability(name: str, examples: EvalSet) -> np.ndarray:
    if name in OPTION_SETS:
        return metrics.option_probability(examples.array("avg_gt_loss"), examples.array(PERTURBED))
    return metrics.probability(examples.array("avg_gt_loss"))


def _truth_ratio(name: str, examples: EvalSet, mean: metrics.Mean) -> np.ndarray:
    score = metrics.truth_ratio_forgotten if name == "forget" else metrics.truth_ratio_kept
    return score(_log_ratio(examples, mean))


def _log_ratio(examples: EvalSet, mean: metrics.Mean) -> np.ndarray:
    return metrics.log_truth_ratio(examples.array("avg_paraphrased_loss"), examples.array(PERTURBED), mean)


def _utility(components: dict[str, float]) -> float:
    return metrics.model_utility([components[part] for part in UTILITY_PARTS])


def _extras(name: str, examples: EvalSet) -> dict[str, float | None]:
    """Metrics beyond TOFU's, if the log has the fields for them."""
    extras = {f: metrics.mean(examples.fields[f]) for f in PER_EXAMPLE_EXTRAS if f in examples.fields}
    texts = examples.texts("generation")
    if texts:
        for measure in (metrics.repetition, metrics.ngram_entropy, metrics.compression_ratio):
            extras[measure.__name__] = metrics.mean(measure(text) for text in texts)
    return {f"{name}_{key}": value for key, value in extras.items()}
