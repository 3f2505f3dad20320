"""Evaluate a model on WMDP, row by row: letters of questions and tokens of documents. No logits are kept."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import Progress
from transformers import PreTrainedModel

from training import metrics
from training.benchmarks.answers import Answers
from training.benchmarks.base import EvaluationOptions
from training.benchmarks.wmdp.choices import begins_with_bos, encode_prompt, letter_logps
from training.benchmarks.wmdp.questions import Question
from training.config import Switch
from training.pieces import Pieces
from training.progress import counted
from training.templates import Format
from training.texts import documents

Rows = dict[str, list[dict[str, Any]]]


def evaluate_model(
    model: PreTrainedModel,
    format: Format,
    tasks: Mapping[str, Sequence[Question]],
    texts: Mapping[str, Sequence[str]],
    *,
    pieces: Pieces,
    options: EvaluationOptions,
    bos: Switch = "auto",
    max_tokens: int = 512,
    progress: Progress | None = None,
) -> dict[str, Rows]:
    """{"tasks": {name: rows {"logps", "answer"}}, "documents": {name: rows {"nll", "tokens", ...}}}

    Of a question, the log-probabilities of its four letters, and the right one; of a document, its mean negative
    log-likelihood a token, how many tokens are scored, memorisation, and the scores of membership attacks.
    """
    total = sum(map(len, tasks.values())) + sum(map(len, texts.values()))
    on_rows = counted(progress or Progress(disable=True), "Evaluation", total)
    answers = Answers(model, format, options, pieces, on_rows)
    begin = begins_with_bos(bos, model)

    def answered(questions: Sequence[Question]) -> list[dict[str, Any]]:
        encoded = [encode_prompt(format.tokenizer, question.prompt(), begin) for question in questions]
        logps = letter_logps(model, encoded, format.pad_token_id, options.eval_batch_size, on_rows)
        return [{"logps": row, "answer": q.answer} for row, q in zip(logps, questions, strict=True)]

    def read(some: Sequence[str]) -> list[dict[str, Any]]:
        examples = documents(format, some, max_tokens)
        found = answers.scored(examples)
        on_rows(len(some))
        values = [
            {
                "nll": score.nll,
                "tokens": len(score.logps),
                "exact_memorization": metrics.exact_memorization(score.hits),
                "extraction_strength": metrics.extraction_strength(score.hits),
            }
            for score in found
        ]
        return [v | a for v, a in zip(values, answers.attacks(examples, found), strict=True)]

    rows: dict[str, Rows] = {"tasks": {}, "documents": {}}
    for name, questions in tasks.items():
        on_rows.stage("read", name)
        rows["tasks"][name] = pieces.rows(name, questions, answered)
    for name, documents_of_it in texts.items():
        on_rows.stage("read", f"{name} documents")
        rows["documents"][name] = pieces.rows(f"{name}_documents", documents_of_it, read)
    on_rows.done()
    return rows
