"""MUSE's metrics of a model, from its measures row by row; also in OpenUnlearning's format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training import membership, metrics
from training.benchmarks import open_unlearning
from training.benchmarks.base import ITSELF
from training.benchmarks.muse.sets import Sets
from training.store import fingerprint, unhashed

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")
MEMORISED = ("exact_memorization", "extraction_strength")
NEEDED = {  # fields of a row, by set
    "forget_verbmem": ("prompt", "gt", "generation", "rougeL_f1", "num_tokens", *MEMORISED),
    "forget_knowmem": ("question", "answer", "generation", "rougeL_f1"),
    "retain_knowmem": ("question", "answer", "generation", "rougeL_f1"),
    "forget_privleak": (*ATTACKS, "document"),
    "holdout_privleak": (*ATTACKS, "document"),
}
KNOWN = {"forget_verbmem": ("prompt", "gt"), "forget_knowmem": ("question", "answer")}  # what identifies a row
KNOWN["retain_knowmem"] = KNOWN["forget_knowmem"]

Measures = Mapping[str, Sequence[Mapping[str, Any]]]


def summary(measures: Measures, retrained: Measures | None = None) -> dict[str, Any]:
    """{"forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "forgotten", "extraction_strength",
    "exact_memorization", "forget_repetition", "forget_ngram_entropy", "mia_loss", ..., "privleak"}.

    Means over rows of values in [0, 1], but for the entropy (in bits) and privleak (in percent, from -100): with AUC
    1 where the forget set is plainly what was learned, ((1 - AUC) - (1 - AUC_r)) / (1 - AUC_r), AUC_r of the retrained
    model, 0.5 without one. forgotten: 1 - (VerbMem + KnowMem of the forget set) / 2.
    """
    if retrained is not None and _documents(retrained) != _documents(measures):
        raise ValueError(
            "--retain_log: expected an evaluation of the retrained model on the same documents, got one of others; "
            "evaluate it with the same --data_dir and --eval_rows"
        )
    rouge = {f"{which}_ROUGE": float(np.mean([row["rougeL_f1"] for row in measures[which]])) for which in KNOWN}
    memorised = (rouge["forget_verbmem_ROUGE"] + rouge["forget_knowmem_ROUGE"]) / 2
    texts = [row["generation"] for row in measures["forget_verbmem"]]
    return {
        **rouge,
        "forgotten": 1.0 - memorised,
        "extraction_strength": metrics.mean(row["extraction_strength"] for row in measures["forget_verbmem"]),
        "exact_memorization": metrics.mean(row["exact_memorization"] for row in measures["forget_verbmem"]),
        "forget_repetition": metrics.mean(map(metrics.repetition, texts)),
        "forget_ngram_entropy": metrics.mean(map(metrics.ngram_entropy, texts)),
        "forget_classifier_prob": metrics.mean(row.get("classifier_prob") for row in measures["forget_verbmem"]),
        **membership.summary(*_attacks(measures), retrained=None if retrained is None else _attacks(retrained)),
    }


def doubts(measures: Measures, retrained: Measures) -> list[str]:
    """Reasons to doubt that `retrained` are measures of a model trained without the forget set."""
    same = all(measures[which] == retrained[which] for which in ("forget_privleak", "holdout_privleak"))
    return [ITSELF] * same + membership.doubts(_attacks(retrained))


def headline(result: Mapping[str, Any]) -> str:
    known = " and ".join(f"{result[f'{part}_knowmem_ROUGE']:.3f} ({part})" for part in ("forget", "retain"))
    text = f"VerbMem {result['forget_verbmem_ROUGE']:.3f}, KnowMem {known}"
    if result["mia_min_k"] is not None:
        low, high = result["mia_min_k_low"], result["mia_min_k_high"]
        text += f", AUC of Min-K% {result['mia_min_k']:.3f} [{low:.3f}, {high:.3f}]"
    return text + ("" if result["privleak"] is None else f", PrivLeak {result['privleak']:+.1f} %") + "."


def read_measures(path: Path) -> dict[str, Any]:
    """ValueError if the file is not an evaluation of MUSE."""
    try:
        measures = unhashed(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as reason:
        raise ValueError(
            f"{path}: expected an evaluation of --benchmark muse, got no JSON ({reason}); evaluate the model again"
        ) from None
    sets = measures if isinstance(measures, dict) else {}
    for which, needed in NEEDED.items():
        rows = sets.get(which)
        if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
            raise ValueError(
                f"{path}: expected an evaluation of --benchmark muse, an object with the sets {', '.join(NEEDED)}, "
                f"each a list of rows; {which} is not; evaluate the model with training.evaluate --benchmark muse"
            )
        for number, row in enumerate(rows, 1):
            absent = [field for field in needed if field not in row]
            if absent:
                raise ValueError(f"{path}: {which}, row {number}: expected {', '.join(needed)}, {absent[0]} is absent")
    return measures


def check_measures(measures: Measures, sets: Sets) -> None:
    """ValueError if the measures are of other rows."""
    for which, count in sets.sizes().items():
        rows = measures[which]
        found: list[Any]
        expected: list[Any]
        if which in KNOWN:
            found = [tuple(row[field] for field in KNOWN[which]) for row in rows]
            expected = [tuple(getattr(row, field) for field in KNOWN[which]) for row in getattr(sets, which)]
        else:
            found = [row["document"] for row in rows]
            expected = [fingerprint(text) for text in getattr(sets, which)]
        if found != expected:
            raise ValueError(
                f"--start_log: expected measures of the {count} rows of {which} that are evaluated, got {len(rows)} "
                "that are not theirs; evaluate the model with the same --data_dir and --eval_rows"
            )


def exported(measures: Measures, result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"MUSE_EVAL.json", "MUSE_SUMMARY.json"} in the names of OpenUnlearning; its ROUGE stems and is of whole texts."""
    entries: dict[str, open_unlearning.Entry] = {}
    for which, (asked, true) in KNOWN.items():
        columns = ([row[key] for row in measures[which]] for key in (asked, true, "generation"))
        entries[f"{which}_ROUGE"] = open_unlearning.rouge("rougeL_f1", *columns)
    memorised = {key: [row[key] for row in measures["forget_verbmem"]] for key in (*MEMORISED, "num_tokens")}
    entries["exact_memorization"] = open_unlearning.scores(memorised["exact_memorization"])
    entries["extraction_strength"] = open_unlearning.extraction_strength(
        memorised["extraction_strength"], memorised["num_tokens"]
    )
    if result["forget_classifier_prob"] is not None:
        classified = [row["classifier_prob"] for row in measures["forget_verbmem"]]
        entries["forget_gibberish"] = open_unlearning.scores(classified)
    entries |= open_unlearning.attacks(*_attacks(measures)) | {"privleak": {"agg_value": result["privleak"]}}
    return open_unlearning.files("MUSE", entries, list(entries))


def _attacks(measures: Measures) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """({attack: scores of the forget set}, the same of the holdout set)"""
    forget, holdout = (membership.attacks_of(measures[which]) for which in ("forget_privleak", "holdout_privleak"))
    return forget, holdout


def _documents(measures: Measures) -> list[str]:
    return [row["document"] for which in ("forget_privleak", "holdout_privleak") for row in measures[which]]
