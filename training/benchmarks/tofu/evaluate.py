"""A model on TOFU's evaluation sets: everything that goes into its log. No logits are kept."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from training import metrics
from training.benchmarks.tofu.eval_sets import EvalRow
from training.benchmarks.tofu.log import SETS, EvalLog, EvalSet, Layout
from training.generation import complete_all
from training.scoring import Scores, predicted_answers, score
from training.templates import Format


def evaluate_model(
    model: PreTrainedModel,
    format: Format,
    sets: Mapping[str, Sequence[EvalRow]],
    *,
    name: str,
    layout: Layout = "lists",
    batch_size: int = 32,
    max_new_tokens: int = 200,
    progress: Progress | None = None,
) -> EvalLog:
    """The log of a model that has a fused head (`npo_kernels.hf`) on the four sets of `load_eval_sets`."""
    progress = progress or Progress(disable=True)
    task = progress.add_task("Evaluation", total=sum(len(sets[short]) for short in SETS), unit="rows")

    def say(short: str, note: str) -> None:
        progress.update(task, note=f"{short}: {note}")

    evaluated = {}
    for short in SETS:
        rows = sets[short]
        fields = _losses(model, format, rows, batch_size, partial(say, short))
        say(short, "tokens")
        fields |= _memorization(model, format, rows, batch_size)
        say(short, "answers")
        fields |= _generations(model, format, rows, batch_size, max_new_tokens, lambda n: progress.advance(task, n))
        evaluated[short] = EvalSet(fields)
    progress.remove_task(task)
    return EvalLog(name, layout, evaluated)


def _losses(
    model: PreTrainedModel, format: Format, rows: Sequence[EvalRow], batch_size: int, say: Callable[[str], None]
) -> dict[str, list]:
    """The loss fields, of all answers in one pass, so that answers of one length share a batch."""
    answers = [[row.answer, row.paraphrased or row.answer, *row.perturbed] for row in rows]
    per_row = len(answers[0])
    pairs = [{"question": row.question, "answer": a} for row, some in zip(rows, answers, strict=True) for a in some]
    done = 0

    def on_rows(count: int) -> None:
        nonlocal done
        done += count
        say(f"{done}/{len(pairs)} answers scored")

    scores: Scores = score(model, format.encode(pairs), format.pad_token_id, batch_size, on_rows=on_rows)
    losses = -scores.logps.double().view(-1, per_row)
    counts = scores.num_tokens.view(-1, per_row)
    averages = losses / counts
    fields: dict[str, Tensor] = {}
    for column, (total, average, count) in enumerate(
        [
            ("gt_loss", "avg_gt_loss", "num_token_gt"),
            ("paraphrased_loss", "avg_paraphrased_loss", "num_token_paraphrased"),
        ]
    ):
        fields |= {total: losses[:, column], average: averages[:, column], count: counts[:, column]}
    fields |= {
        "perturb_loss": losses[:, 2:],
        "average_perturb_loss": averages[:, 2:],
        "num_token_perturb": counts[:, 2:],
    }
    return {field: values.tolist() for field, values in fields.items()}


def _memorization(model: PreTrainedModel, format: Format, rows: Sequence[EvalRow], batch_size: int) -> dict[str, list]:
    examples = format.encode({"question": row.question, "answer": row.answer} for row in rows)
    pairs = predicted_answers(model, examples, format.pad_token_id, batch_size)
    return {
        "exact_memorization": [metrics.exact_memorization(*pair) for pair in pairs],
        "extraction_strength": [metrics.extraction_strength(*pair) for pair in pairs],
    }


def _generations(
    model: PreTrainedModel,
    format: Format,
    rows: Sequence[EvalRow],
    batch_size: int,
    max_new_tokens: int,
    on_batch: Callable[[int], None],
) -> dict[str, list]:
    questions = [row.question for row in rows]
    texts = complete_all(model, format, questions, max_new_tokens, batch_size, on_batch)
    recalls = [metrics.rouge_recall(row.answer, text) for row, text in zip(rows, texts, strict=True)]
    return {
        "rouge1_recall": [recall["rouge1"] for recall in recalls],
        "rougeL_recall": [recall["rougeL"] for recall in recalls],
        "generated_text": [
            [format.prompt_text(row.question), text, row.answer] for row, text in zip(rows, texts, strict=True)
        ],
    }
