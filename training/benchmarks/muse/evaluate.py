"""Evaluate a model on MUSE's sets, row by row, for all of its metrics. No logits are kept."""

from collections.abc import Sequence
from typing import Any

from rich.progress import Progress
from transformers import PreTrainedModel

from training import metrics
from training.benchmarks.answers import Answers
from training.benchmarks.muse.options import MuseOptions
from training.benchmarks.muse.sets import Asked, Continuation, Sets
from training.data import IGNORE_INDEX, Example
from training.generation import generate
from training.pieces import Pieces
from training.progress import counted
from training.store import fingerprint
from training.templates import Format
from training.texts import continuation, documents

STOP = ("\n\n", "\nQuestion", "Question:")  # where an answer of KnowMem ends
GENERATED = 64  # prompts a piece: generation takes the most time
Measured = list[dict[str, Any]]


def evaluate_model(
    model: PreTrainedModel, format: Format, sets: Sets, options: MuseOptions, pieces: Pieces, progress: Progress
) -> dict[str, Measured]:
    """{set: one object a row}, of a model that has a fused head (`npo_kernels.hf`).

    forget_verbmem: prompt, gt, the greedy `generation`, its ROUGE against as many of the text's own tokens, <bos>
    included where the tokenizer writes one (--rouge open-unlearning: against the whole text, with stemming); of the
    `num_tokens` tokens of the text, each given the true ones before it, exact_memorization and extraction_strength,
    without the last token, as OpenUnlearning has them, and None where there is no other. forget_knowmem,
    retain_knowmem: question, answer, the greedy `generation` up to a blank line or the next question, its ROUGE.
    forget_privleak, holdout_privleak: the scores of the membership attacks on the beginning of a document.
    """
    total = sum(sets.sizes().values())
    evaluation = _Evaluation(Answers(model, format, options, pieces, counted(progress, "Evaluation", total)), options)
    found = {
        "forget_verbmem": evaluation.verbmem("forget_verbmem", sets.forget_verbmem),
        "forget_knowmem": evaluation.knowmem("forget_knowmem", sets.forget_knowmem),
        "retain_knowmem": evaluation.knowmem("retain_knowmem", sets.retain_knowmem),
        "forget_privleak": evaluation.privleak("forget_privleak", sets.forget_privleak),
        "holdout_privleak": evaluation.privleak("holdout_privleak", sets.holdout_privleak),
    }
    evaluation.answers.counted.done()
    return found


class _Evaluation:
    """Of one model: rows to measures, block by block."""

    def __init__(self, answers: Answers, options: MuseOptions):
        self.answers, self.format, self.options = answers, answers.format, options
        self.stemmer = options.rouge == "open-unlearning"

    def verbmem(self, part: str, rows: Sequence[Continuation]) -> Measured:
        o, format = self.options, self.format

        def reference(gt: str) -> str:
            return gt if self.stemmer else format.decode(format.text_ids(gt)[: o.verbmem_tokens], True)

        def measured(block: Sequence[Continuation]) -> Measured:
            texts = self._generated([row.prompt for row in block], o.verbmem_tokens)
            return [
                {**row._asdict(), "generation": text, **self._rouge(reference(row.gt), text), **classified}
                for row, text, classified in zip(block, texts, self.answers.classified(texts), strict=True)
            ]

        def memorised(block: Sequence[Continuation]) -> Measured:
            examples = [_cut(continuation(format, row.prompt, row.gt), o.max_tokens) for row in block]
            return [
                {
                    "num_tokens": len(scores.hits),
                    "exact_memorization": metrics.exact_memorization(scores.body.hits),
                    "extraction_strength": metrics.extraction_strength(scores.body.hits),
                }
                for scores in self.answers.scored(examples)
            ]

        found = self._rows(part, "generated", rows, measured)
        more = self._rows(part, "read", rows, memorised)
        return [one | other for one, other in zip(found, more, strict=True)]

    def knowmem(self, part: str, rows: Sequence[Asked]) -> Measured:
        def measured(block: Sequence[Asked]) -> Measured:
            texts = self._generated([row.prompt for row in block], self.options.knowmem_tokens, STOP)
            return [
                {"question": row.question, "answer": row.answer, "generation": text, **self._rouge(row.answer, text)}
                for row, text in zip(block, texts, strict=True)
            ]

        return self._rows(part, "generated", rows, measured)

    def privleak(self, part: str, texts: Sequence[str]) -> Measured:
        def measured(block: Sequence[str]) -> Measured:
            examples = documents(self.format, block, self.options.max_tokens)
            found = self.answers.attacks(examples, self.answers.scored(examples))
            self.answers.counted(len(block))
            return [scores | {"document": fingerprint(text)} for scores, text in zip(found, block, strict=True)]

        return self._rows(part, "read", texts, measured)

    def _rows(self, part: str, stage: str, rows: Sequence[Any], measured: Any) -> Measured:
        """`stage`: "read" or "generated", which differ in speed."""
        self.answers.counted.stage(stage, part.replace("_", " "))
        return self.answers.pieces.rows(f"{part}_{stage}", rows, measured, GENERATED)

    def _generated(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        ids, size = [self.format.text_ids(prompt) for prompt in prompts], self.options.eval_batch_size
        return generate(self.answers.model, ids, self.format, max_new_tokens, size, self.answers.counted, stop=stop)

    def _rouge(self, reference: str, text: str) -> dict[str, float]:
        return metrics.rouge(reference, text, use_stemmer=self.stemmer)


def _cut(example: Example, max_tokens: int) -> Example:
    """The prompt and the first `max_tokens` tokens of the text."""
    end = sum(label == IGNORE_INDEX for label in example.labels) + max_tokens
    return Example(example.input_ids[:end], example.labels[:end])
