"""A log of TOFU in the names of OpenUnlearning."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from training import metrics
from training.benchmarks.open_unlearning import (
    EPS,
    Entry,
    attacks,
    by_index,
    extraction_strength,
    files,
    rouge,
    scores,
)
from training.benchmarks.tofu.log import OPTION_SETS, PERTURBED, EvalLog, EvalSet
from training.require import require

REPORTED = (
    *("forget_quality", "forget_truth_ratio", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "model_utility", "privleak"),
    *("extraction_strength", "exact_memorization", "forget_Q_A_gibberish"),
    *("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm"),
)


def exported(log: EvalLog, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"TOFU_EVAL.json", "TOFU_SUMMARY.json"}: `summary` has what needs the retrained model."""
    entries: dict[str, Entry] = {}
    for name, examples in log.sets.items():
        entries |= _of_set(name, examples, log.name)
    forget = log.sets["forget"].fields
    entries |= {
        "model_utility": {"agg_value": summary["model_utility_geometric"]},
        "forget_quality": {"agg_value": summary["forget_quality"]},
    }
    if {"extraction_strength", "num_token_gt"} <= forget.keys():
        entries["extraction_strength"] = extraction_strength(forget["extraction_strength"], forget["num_token_gt"])
    names = {"exact_memorization": "exact_memorization", "classifier_prob": "forget_Q_A_gibberish"}
    entries |= {theirs: scores(forget[ours]) for ours, theirs in names.items() if ours in forget}
    if log.membership:
        entries |= attacks(*log.membership) | {"privleak": {"agg_value": summary["privleak"]}}
    return files("TOFU", entries, REPORTED)


def _of_set(name: str, examples: EvalSet, log: str) -> dict[str, Entry]:
    """Probabilities, ROUGE and truth ratios of one of the four sets."""
    true, other, wrong = (examples.array(f) for f in ("avg_gt_loss", "avg_paraphrased_loss", PERTURBED))
    probability = metrics.probability(true)
    parts = [examples.texts(part) for part in ("prompt", "answer", "generation")]
    prompts, truths, texts = (require(part, f"a log with texts, {log}") for part in parts)
    means = np.exp(-wrong.mean(axis=1))  # their geometric mean
    ratios = (means / (np.exp(-other) + EPS)).tolist()
    found = {
        f"{name}_Q_A_Prob": _losses(probability.mean(), true),
        f"{name}_Q_A_PERT_Prob": _losses(np.exp(-wrong).mean(), wrong),
        f"{name}_Q_A_ROUGE": rouge("rougeL_recall", prompts, truths, texts),
    }
    if name in OPTION_SETS:
        chosen = probability / (probability + np.exp(-wrong).sum(axis=1) + EPS)
        rows = [{"prob": value} for value in chosen.tolist()]
        found[f"{name}_Q_A_Prob_normalised"] = by_index(float(chosen.mean()), rows)
    else:
        found[f"{name}_Q_A_PARA_Prob"] = _losses(np.exp(-other).mean(), other)
    if name == "forget":
        value = np.minimum(ratios, 1 / (np.array(ratios) + EPS)).mean()
        key = "forget_truth_ratio"
    else:
        value, key = np.maximum(0, 1 - np.array(ratios)).mean(), f"{name}_Truth_Ratio"
    return found | {key: by_index(float(value), [{"score": ratio} for ratio in ratios])}


def _losses(value: float, losses: np.ndarray) -> Entry:
    """Of one answer a row, or of several."""
    pairs = zip(np.exp(-losses).tolist(), losses.tolist(), strict=True)
    return by_index(float(value), [{"prob": prob, "avg_loss": loss} for prob, loss in pairs])
