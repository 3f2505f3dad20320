"""Evaluate a model on TOFU's sets, for its log. No logits are kept.

Each answer is read once: the true ones for probabilities, memorisation and membership attacks, all others for the truth
ratio, with the question once for all of them.
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from rich.progress import Progress
from transformers import PreTrainedModel

from training import metrics
from training.benchmarks.answers import Answers
from training.benchmarks.base import EvaluationOptions
from training.benchmarks.tofu.eval_sets import EvalRow
from training.benchmarks.tofu.log import SETS, EvalLog, EvalSet, Layout, Membership
from training.data import Row
from training.generation import complete_all
from training.membership import attacks_of
from training.pieces import Pieces
from training.progress import counted
from training.shared_prompts import score_answers
from training.templates import Format

GENERATED = 64  # prompts a piece: generation takes the most time


def evaluate_model(
    model: PreTrainedModel,
    format: Format,
    sets: Mapping[str, Sequence[EvalRow]],
    *,
    holdout: Sequence[Row] = (),
    pieces: Pieces | None = None,
    options: EvaluationOptions | None = None,
    layout: Layout = "lists",
    max_new_tokens: int = 200,
    progress: Progress | None = None,
) -> EvalLog:
    """The log of a model that has a fused head (`npo_kernels.hf`) on the four sets of `load_eval_sets`.

    `holdout`: rows like those to forget that no model has learned, for the membership attacks; none: no attacks.
    """
    pieces, options = pieces or Pieces("model"), options or EvaluationOptions()
    total = sum(len(sets[short]) for short in SETS)
    answers = Answers(model, format, options, pieces, counted(progress or Progress(disable=True), "Evaluation", total))
    evaluated, attacked = {}, None
    generated = _generations(answers, [row for short in SETS for row in sets[short]], max_new_tokens)
    for short in SETS:
        rows = sets[short]
        attacking = short == "forget" and bool(holdout)
        true = answers.measures(f"{short}_true", [_row(row) for row in rows], attacking)
        fields = _losses(true) | _other_losses(answers, short, rows, true)
        fields |= {name: [row[name] for row in true] for name in ("exact_memorization", "extraction_strength")}
        said, generated = generated[: len(rows)], generated[len(rows) :]
        evaluated[short] = EvalSet(fields | {name: [row[name] for row in said] for name in said[0]})
        if attacking:
            others = answers.measures("holdout_true", holdout, attacked=True)
            attacked = Membership(attacks_of(true), attacks_of(others))
    answers.counted.done()
    return EvalLog(pieces.name, layout, evaluated, attacked)


def _row(row: EvalRow) -> Row:
    return {"question": row.question, "answer": row.answer}


def _losses(true: Sequence[dict[str, Any]]) -> dict[str, list]:
    return {
        "gt_loss": [row["nll"] for row in true],
        "avg_gt_loss": [row["nll"] / row["num_tokens"] for row in true],
        "num_token_gt": [row["num_tokens"] for row in true],
    }


def _other_losses(
    answers: Answers, short: str, rows: Sequence[EvalRow], true: Sequence[dict[str, Any]]
) -> dict[str, list]:
    """Of the paraphrased answer, or the true one where there is none, and of the perturbed ones."""
    format, size = answers.format, answers.options.eval_batch_size

    def losses(block: Sequence[EvalRow]) -> list[list]:
        """[[loss, number of tokens] of each answer] of each row."""
        others = [[*([row.paraphrased] if row.paraphrased else []), *row.perturbed] for row in block]
        groups = [
            format.encode([{"question": r.question, "answer": a} for a in some])
            for r, some in zip(block, others, strict=True)
        ]
        found = score_answers(
            answers.model, groups, format.pad_token_id, size, lambda rows, tokens: answers.counted(0, tokens)
        )
        values = zip((-found.logps.double()).tolist(), found.num_tokens.tolist(), strict=True)
        return [[list(next(values)) for _ in some] for some in others]

    answers.counted.stage("read", f"{short}: other answers")
    found = [
        others if row.paraphrased else [[its["nll"], its["num_tokens"]], *others]
        for row, its, others in zip(rows, true, answers.pieces.rows(f"{short}_others", rows, losses), strict=True)
    ]
    averages = [[total / count for total, count in row] for row in found]
    return {
        "paraphrased_loss": [row[0][0] for row in found],
        "avg_paraphrased_loss": [row[0] for row in averages],
        "num_token_paraphrased": [row[0][1] for row in found],
        "perturb_loss": [[loss for loss, _ in row[1:]] for row in found],
        "average_perturb_loss": [row[1:] for row in averages],
        "num_token_perturb": [[count for _, count in row[1:]] for row in found],
    }


def _generations(answers: Answers, rows: Sequence[EvalRow], max_new_tokens: int) -> list[dict[str, Any]]:
    """Of the rows of all sets together: small sets would make small batches, which take as many steps as large ones.

    By the length of the true answers, which the models' own go with: a batch runs until its last answer ends.
    """
    format, size = answers.format, answers.options.eval_batch_size

    def generations(block: Sequence[EvalRow]) -> list[dict[str, Any]]:
        questions = [row.question for row in block]
        texts = complete_all(answers.model, format, questions, max_new_tokens, size, answers.counted)
        recalls = [metrics.rouge(row.answer, text) for row, text in zip(block, texts, strict=True)]
        prompts = [format.prompt_text(question) for question in questions]
        shown = zip(prompts, texts, (row.answer for row in block), strict=True)
        return [
            {
                "rouge1_recall": recall["rouge1_recall"],
                "rougeL_recall": recall["rougeL_recall"],
                "generated_text": text,
                **classified,
            }
            for recall, text, classified in zip(recalls, map(list, shown), answers.classified(texts), strict=True)
        ]

    answers.counted.stage("generated", "answers")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].answer))
    found = answers.pieces.rows("generated_by_length", [rows[i] for i in order], generations, GENERATED)
    return [said for _, said in sorted(zip(order, found, strict=True), key=itemgetter(0))]
