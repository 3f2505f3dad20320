"""Measures of answers to questions, row by row: one pass over the true answers, and generated answers."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from training import membership, metrics
from training.benchmarks.base import EvaluationOptions
from training.data import IGNORE_INDEX, Example, Row
from training.fluency import FluencyClassifier
from training.pieces import Pieces
from training.progress import Counted
from training.scoring import AnswerScores, answer_scores, gradient_norms
from training.templates import Format


class Answers:
    """A model being evaluated, with the state that its evaluations share."""

    def __init__(
        self, model: PreTrainedModel, format: Format, options: EvaluationOptions, pieces: Pieces, counted: Counted
    ):
        self.model, self.format, self.options, self.pieces, self.counted = model, format, options, pieces, counted
        folder = options.fluency_classifier
        self.classifier = FluencyClassifier(folder, model.device) if folder else None

    def measures(self, part: str, rows: Sequence[Row], attacked: bool = False) -> list[dict[str, Any]]:
        """For each {"question", "answer"}: {"nll", "num_tokens", "exact_memorization", "extraction_strength"}.

        `attacked`: with the scores of the membership attacks as well.
        """
        self.counted.stage("read", f"{part}: answers")
        return self.pieces.rows(part, rows, lambda block: self._measures(block, attacked))

    def _measures(self, rows: Sequence[Row], attacked: bool) -> list[dict[str, Any]]:
        examples = self.format.encode(rows)
        found = self.scored(examples)
        values: list[dict[str, Any]] = [
            {
                "nll": -float(answer.logps.sum()),
                "num_tokens": len(answer.logps),
                "exact_memorization": metrics.exact_memorization(answer.body.hits),
                "extraction_strength": metrics.extraction_strength(answer.body.hits),
            }
            for answer in found
        ]
        if attacked:
            values = [v | a for v, a in zip(values, self.attacks(examples, found), strict=True)]
        return values

    def scored(self, examples: Sequence[Example]) -> list[AnswerScores]:
        pad_id, size = self.format.pad_token_id, self.options.eval_batch_size
        return answer_scores(self.model, examples, pad_id, size, lambda rows, tokens: self.counted(0, tokens))

    def attacks(self, examples: Sequence[Example], found: Sequence[AnswerScores]) -> list[dict[str, float]]:
        """The scores of the membership attacks, one dictionary per example."""
        labels = ([label for label in example.labels[1:] if label != IGNORE_INDEX] for example in examples)
        texts = [self.format.decode(ids, skip_special_tokens=True) for ids in labels]
        values = [membership.scores(answer, text) for answer, text in zip(found, texts, strict=True)]
        if self.options.mia_gradnorm:
            norms = gradient_norms(self.model, examples)
            values = [value | {"gradnorm": norm} for value, norm in zip(values, norms, strict=True)]
        return values

    def classified(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """{"classifier_prob"} of each generation; {} without a classifier."""
        return [{"classifier_prob": p} for p in self.classifier(texts)] if self.classifier else [{} for _ in texts]
