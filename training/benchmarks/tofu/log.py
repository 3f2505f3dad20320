"""TOFU's evaluation logs (eval_log_aggregated.json): everything that the metrics need, per example.

Two layouts are published. A log is {file name of a set: {field: per example}}, where "per example" is a list (`lists`,
NPO's) or an object with the keys "0" to "N-1" in any order (`indexed`, TOFU's). Losses are in nats, `avg_*` a token:

    avg_gt_loss, gt_loss, num_token_gt                              of the true answer
    avg_paraphrased_loss, paraphrased_loss, num_token_paraphrased   of the paraphrased one (or the true one)
    average_perturb_loss, perturb_loss, num_token_perturb           K numbers, of the perturbed ones
    rouge1_recall, rougeL_recall, generated_text                    the last is [prompt, generation, true answer]
    truth_ratio, normalized_gt_loss                                 `indexed` only; both follow from the others

A log that is not of this kind, or two that do not belong together, raise `LogError`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from training import metrics
from training.store import DamagedError, hashed, unhashed, write_text

Layout = Literal["lists", "indexed"]

SETS = {
    "retain": "eval_log.json",
    "ra": "eval_real_author_wo_options.json",
    "wf": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
MEMBERSHIP = "membership_inference"  # beside them, in the logs that `training.evaluate` writes
OPTION_SETS = ("ra", "wf")  # three wrong options instead of a paraphrased and five perturbed answers
MEASURED = ("avg_gt_loss", "avg_paraphrased_loss", "rougeL_recall")  # fields without which there are no metrics,
PERTURBED = "average_perturb_loss"  # and the one that holds K numbers an example
PRODUCTS = {
    "avg_gt_loss": ("gt_loss", "num_token_gt"),
    "avg_paraphrased_loss": ("paraphrased_loss", "num_token_paraphrased"),
}
# float32 losses are written; dividing them again leaves less than this
ROUNDING = 1e-5
LARGEST = float(np.log(np.finfo(np.float64).max))


class LogError(ValueError):
    """An invalid log. The message has the value received, the value expected, and what to do."""


@dataclass(frozen=True)
class EvalSet:
    """One of the four sets: {field: one entry an example}, in the order of the questions."""

    fields: dict[str, list]

    def __len__(self) -> int:
        return len(self.fields["avg_gt_loss"])

    def array(self, field: str) -> np.ndarray:
        """(N,), or (N, K) for what belongs to the perturbed answers."""
        return np.asarray(self.fields[field], dtype=np.float64)

    def texts(self, part: Literal["prompt", "generation", "answer"]) -> list[str] | None:
        """One part of `generated_text`; None if the log has none."""
        index = ("prompt", "generation", "answer").index(part)
        return [entry[index] for entry in self.fields["generated_text"]] if "generated_text" in self.fields else None


class Membership(NamedTuple):
    """{attack: one score a row} of the membership attacks, of forget rows and of rows that nobody has learned."""

    forget: dict[str, list[float]]
    holdout: dict[str, list[float]]


@dataclass(frozen=True)
class EvalLog:
    """The four sets by their short names (`SETS`), and what to call the log in messages."""

    name: str
    layout: Layout
    sets: dict[str, EvalSet]
    membership: Membership | None = None  # published logs have none


def read_log(path: Path) -> EvalLog:
    """A validated log of either layout."""
    if not path.is_file():
        raise LogError(f"{path}: no such file; expected an evaluation log (eval_log_aggregated.json)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LogError(
            f"{path}: not JSON ({error}); a log is one JSON object, so this one may be cut off or not yet downloaded: "
            "fetch it again"
        ) from None
    try:
        return parse_log(unhashed(content, path), str(path))
    except DamagedError as damage:
        raise LogError(f"{damage}; evaluate the model again") from None


def parse_log(content: Any, name: str) -> EvalLog:
    """The log in a decoded JSON value; `name` says in messages which it is."""
    absent = [key for key in SETS.values() if key not in content] if isinstance(content, dict) else list(SETS.values())
    if absent:
        raise LogError(
            f"{name}: expected an object with the sets {', '.join(SETS.values())}, got {_shown(content)}, where "
            f"{', '.join(absent)} is absent; give the aggregated log, or evaluate all four sets"
        )
    layouts, sets = {}, {}
    for short, key in SETS.items():
        layouts[key], fields = _columns(content[key], f"{name}, {key}")
        sets[short] = _validated(fields, f"{name}, {key}")
    if len(set(layouts.values())) > 1:
        raise LogError(
            f"{name}: expected one layout, lists or objects keyed by index, got "
            + ", ".join(f"{layout} in {key}" for key, layout in layouts.items())
            + "; write all sets the same way"
        )
    attacked = _membership(content[MEMBERSHIP], name) if MEMBERSHIP in content else None
    return EvalLog(name, layouts[SETS["retain"]], sets, attacked)


def write_log(path: Path, log: EvalLog) -> None:
    """Written to a temporary name first, in the layout of the log."""
    content: dict[str, Any] = {SETS[name]: _written(log, name) for name in SETS}
    if log.membership:
        content[MEMBERSHIP] = log.membership._asdict()
    if log.layout == "lists":  # TOFU's scripts, which read the other layout, take every key for a set
        content = hashed(content)
    write_text(path, json.dumps(content, indent=1) + "\n")


def require_same_questions(log: EvalLog, retain_log: EvalLog) -> None:
    """Forget quality compares two models on the same forget questions and tokens; otherwise `LogError`."""
    ours, theirs = log.sets["forget"], retain_log.sets["forget"]
    where = f"{log.name} and {retain_log.name}, {SETS['forget']}"
    advice = "give the log of a model retrained without this forget set, evaluated on the same rows"
    if len(ours) != len(theirs):
        raise LogError(f"{where}: expected the same forget set, got {len(ours)} and {len(theirs)} examples; {advice}")
    mine, other = ours.texts("answer"), theirs.texts("answer")
    for i, (answer, other_answer) in enumerate(zip(mine or [], other or [], strict=False)):
        if answer.split() != other_answer.split():
            raise LogError(
                f"{where}: example {i} has the answers {answer!r} and {other_answer!r}; expected the same; {advice}"
            )
    a, b = (s.fields.get("num_token_gt") for s in (ours, theirs))
    if a and b and a != b:
        i = next(i for i in range(len(a)) if a[i] != b[i])
        raise LogError(
            f"{where}: example {i} has {a[i]} and {b[i]} scored tokens, so the two models have another tokenizer or "
            "prompt template, and losses a token do not compare; give a retain log of the same tokenizer and template"
        )
    for field in ("num_token_paraphrased", "num_token_perturb"):
        a, b = (s.fields.get(field) for s in (ours, theirs))
        if a and b and a != b:
            i = next(i for i in range(len(a)) if a[i] != b[i])
            raise LogError(
                f"{where}: example {i} has the {field} {a[i]} and {b[i]}, so the truth ratios are of other paraphrased "
                f"or perturbed answers and do not compare; {advice}"
            )
    a, b = (s.array(PERTURBED).shape[1] for s in (ours, theirs))
    if a != b:
        raise LogError(f"{where}: expected as many perturbed answers in both, got {a} and {b}; {advice}")


def warnings(log: EvalLog) -> list[str]:
    """Warnings that do not prevent the metrics: averages that do not match sums and token counts."""
    found = []
    for name, examples in log.sets.items():
        for average, (total, count) in PRODUCTS.items():
            if {total, count} <= examples.fields.keys():
                expected = examples.array(total) / examples.array(count)
                differs = ~np.isclose(examples.array(average), expected, rtol=ROUNDING, atol=ROUNDING)
                if differs.any():
                    found.append(
                        f"{log.name}, {SETS[name]}: {average} is not {total} / {count} in {differs.sum()} of "
                        f"{len(examples)} examples, the first being {differs.argmax()}; the metrics use {average}"
                    )
    return found


def _columns(content: Any, where: str) -> tuple[Layout, dict[str, list]]:
    """(layout, {field: list}) of one set."""
    if not isinstance(content, dict) or not content:
        raise LogError(f"{where}: expected an object of fields ({', '.join(MEASURED)}, ...), got {_shown(content)}")
    kinds = {type(value) for value in content.values()}
    if kinds == {list}:
        return "lists", content
    if kinds != {dict}:
        mixed = ", ".join(f"{field}: {type(value).__name__}" for field, value in content.items())
        raise LogError(
            f"{where}: expected every field to be a list, or every field an object keyed by index, got {mixed}"
        )
    fields = {}
    for field, entries in content.items():
        missing = [i for i in range(len(entries)) if str(i) not in entries]
        if missing:
            raise LogError(
                f"{where}, {field}: expected the keys "
                f'"0" to "{len(entries) - 1}", as there are {len(entries)} entries, but "{missing[0]}" is absent; '
                "the log of one of several processes is not enough, merge them"
            )
        fields[field] = [entries[str(i)] for i in range(len(entries))]  # processes write their own rows, interleaved
    return "indexed", fields


def _validated(fields: dict[str, list], where: str) -> EvalSet:
    absent = [field for field in (*MEASURED, PERTURBED) if field not in fields]
    if absent:
        raise LogError(
            f"{where}: {', '.join(absent)} is absent; expected at least {', '.join((*MEASURED, PERTURBED))}, got "
            f"{', '.join(fields)}; evaluate the set with the perturbed answers"
        )
    num_examples = len(fields["avg_gt_loss"])
    lengths = {field: len(entries) for field, entries in fields.items() if len(entries) != num_examples}
    if lengths or not num_examples:
        field, length = next(iter(lengths.items()), ("avg_gt_loss", 0))
        raise LogError(
            f"{where}: avg_gt_loss has {num_examples} examples and {field} {length}; expected one number, above 0"
        )
    for field in MEASURED:
        for i, value in enumerate(fields[field]):
            _require_number(value, f"{where}, {field}, example {i}")
    widths = {len(row) if isinstance(row, list) else 0 for row in fields[PERTURBED]}
    if len(widths) != 1 or 0 in widths:
        raise LogError(f"{where}, {PERTURBED}: expected the same number of losses, at least one, for every example")
    for i, row in enumerate(fields[PERTURBED]):
        for value in row:
            _require_number(value, f"{where}, {PERTURBED}, example {i}")
    for i, entry in enumerate(fields.get("generated_text", [])):
        if not (isinstance(entry, list) and len(entry) == 3 and all(isinstance(text, str) for text in entry)):
            raise LogError(
                f"{where}, generated_text, example {i}: expected [prompt, generation, answer], got {_shown(entry)}"
            )
    return EvalSet(fields)


def _membership(content: Any, name: str) -> Membership:
    where = f"{name}, {MEMBERSHIP}"
    if not isinstance(content, dict) or content.keys() != set(Membership._fields):
        raise LogError(f"{where}: expected an object with {', '.join(Membership._fields)}, got {_shown(content)}")
    for part, attacks in content.items():
        if not (isinstance(attacks, dict) and attacks and all(isinstance(scores, list) for scores in attacks.values())):
            raise LogError(f"{where}, {part}: expected a list of scores for each attack, got {_shown(attacks)}")
        if len({len(scores) for scores in attacks.values()}) > 1:
            raise LogError(f"{where}, {part}: expected as many scores of each attack, got {_shown(attacks)}")
        for attack, scores in attacks.items():
            for i, value in enumerate(scores):
                _require_number(value, f"{where}, {part}, {attack}, row {i}")
    return Membership(**content)


def _require_number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LogError(
            f"{where}: expected a finite number, got {_shown(value)}; a model that gives nan or inf has no metrics, "
            "evaluate an earlier checkpoint, or in float32"
        )


def _written(log: EvalLog, name: str) -> dict[str, Any]:
    examples = log.sets[name]
    if log.layout == "lists":
        return examples.fields
    fields = dict(examples.fields)
    perturbed = examples.array(PERTURBED)
    log_ratio = metrics.log_truth_ratio(examples.array("avg_paraphrased_loss"), perturbed, "geometric")
    fields["truth_ratio"] = np.exp(np.minimum(log_ratio, LARGEST)).tolist()  # JSON has no infinity
    if name in OPTION_SETS:
        chosen = metrics.log_option_probability(examples.array("avg_gt_loss"), perturbed)
        fields["normalized_gt_loss"] = (-chosen).tolist()
    return {field: {str(i): entry for i, entry in enumerate(entries)} for field, entries in fields.items()}


def _shown(value: Any, limit: int = 120) -> str:
    if isinstance(value, dict):
        value = f"an object with {len(value)} keys: {', '.join(map(str, list(value)[:6]))}"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
