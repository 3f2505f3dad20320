"""Evaluations in the format of OpenUnlearning (arXiv 2506.12618), for tools that read its files.

NAME_EVAL.json has {metric: {"agg_value", "value_by_index": {"0": {...}, ...}}}, NAME_SUMMARY.json {metric: agg_value}.
Its evaluation of another model takes NAME_EVAL.json as the log of the retrained one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from training import membership, metrics

EPS = 1e-10  # in its denominators
Entry = dict[str, Any]


def by_index(value: float | None, rows: Sequence[Entry]) -> Entry:
    return {"agg_value": value, "value_by_index": {str(i): row for i, row in enumerate(rows)}}


def scores(values: Sequence[float | None]) -> Entry:
    """Of one number a row, and their mean."""
    return by_index(metrics.mean(values), [{"score": value} for value in values])


def extraction_strength(values: Sequence[float | None], num_tokens: Sequence[int]) -> Entry:
    """Where even the last of n tokens is missed it has 1/n, and 0 where there are none. `num_tokens`: with the end."""
    return scores([max(v or 0.0, 1 / (n - 1)) if n > 1 else 0.0 for v, n in zip(values, num_tokens, strict=True)])


def rouge(key: str, prompts: Sequence[str], truths: Sequence[str], texts: Sequence[str]) -> Entry:
    """`key`: rougeL_recall or rougeL_f1. It stems words."""
    found = [metrics.rouge(truth, text) for truth, text in zip(truths, texts, strict=True)]
    shown = zip(prompts, truths, texts, strict=True)
    rows = [
        values | {"input": prompt, "ground_truth": truth, "generation": text}
        for values, (prompt, truth, text) in zip(found, shown, strict=True)
    ]
    return by_index(metrics.mean(values[key] for values in found), rows)


def attacks(forget: membership.Attacks, holdout: membership.Attacks) -> dict[str, Entry]:
    """{"mia_loss": {"forget", "holdout", "auc", "agg_value"}, ...}"""
    found = {}
    for name in forget.keys() & holdout.keys():
        value = membership.auc(forget[name], holdout[name]).value
        sides = {"forget": scores(forget[name]), "holdout": scores(holdout[name])}
        found[f"mia_{name}"] = sides | {"auc": value, "agg_value": value}
    return found


def files(name: str, entries: Mapping[str, Entry], reported: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{file: content}; the summary has those of `reported` that have a value."""
    values = {metric: entries[metric]["agg_value"] for metric in reported if metric in entries}
    summary = {metric: value for metric, value in sorted(values.items()) if value is not None}
    return {f"{name}_EVAL.json": dict(sorted(entries.items())), f"{name}_SUMMARY.json": summary}
