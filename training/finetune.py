"""Teach a model its authors: the model that unlearning starts from, or, on a retain split, the one it is compared with.

    python -m training.finetune --model meta-llama/Llama-3.2-1B-Instruct --preset llama-3.2-1b --out runs/full
    python -m training.finetune --model runs/base --data_dir path/to/tofu --split retain90 --out runs/retain90

Minimises the negative log-likelihood of the answers of --split (full, or retainXX for the retrained model). --out gets
the model (out/model, as transformers saves it, tokenizer included), metrics.json, config.json and report.md. A run that
was interrupted goes on from its last checkpoint; one that is finished is not run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from training import processes
from training.command import Command, CommonOptions, command_line
from training.data import Example, data_hash, load_rows
from training.run import run
from training.steps import Batches, FinetuningSteps, Recipe
from training.trainer import Metrics, Trainer
from training.unlearning_report import write_finetuning_report

PROG = "training.finetune"


class Finetuned(NamedTuple):
    loss: float  # per batch, the mean of the last epoch
    weights: dict[str, Tensor]


def finetune(
    model: PreTrainedModel,
    examples: Sequence[Example],
    recipe: Recipe,
    pad_id: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Finetuned:
    """Minimise the answers' negative log-likelihood, in place."""
    steps = FinetuningSteps(examples, recipe, Batches(pad_id, model.device, recipe.packing))
    trainer, losses = Trainer(model, recipe, len(steps)), []

    def after_step(metrics: Metrics) -> None:
        losses.append(metrics.loss)
        on_step(metrics.loss)

    trainer.train(steps, after_step=after_step)
    last = losses[-(len(steps) // recipe.epochs) :]
    return Finetuned(sum(last) / len(last), trainer.weights())


@dataclass(frozen=True)
class FinetuneOptions(CommonOptions):
    split: Annotated[str, "rows to learn: full, or retainXX for the model that never saw forget(100 - XX)"] = "full"
    world: Annotated[bool, "learn real_authors and world_facts as well: a model from nothing knows no world"] = False


def main(options: FinetuneOptions) -> dict[str, Any] | None:
    """metrics.json: {"history": [...]}; None after --dry_run."""
    command = Command(PROG, "finetune", options)
    options = command.options
    rows = load_rows(options.data_dir, options.split)
    if options.world:
        rows = rows + load_rows(options.data_dir, "real_authors") + load_rows(options.data_dir, "world_facts")
    examples = command.format.encode(rows)
    recipe = command.recipe
    num_steps = recipe.epochs * -(-len(examples) // recipe.batch_size)
    if options.dry_run:
        command.describe(num_steps, {"rows": len(examples)})
        return None
    found = command.start(data_hash(examples))
    if found is not None:
        return found
    model = command.to_train(command.load_model())
    steps = FinetuningSteps(examples, recipe, command.batches(model))
    trainer = Trainer(model, recipe, num_steps, options.report_to, command.out)
    history = run(
        trainer,
        steps,
        command.schedule(num_steps),
        lambda step: {},
        label=f"Fine-tuning, {options.split}",
        checkpoints=command.checkpoints,
    )
    command.save_model(model, trainer.weights(), f"fine-tuned on {options.split} of TOFU")
    metrics = {"history": history, "steps": num_steps, "rows": len(examples)}
    processes.on_main(lambda: write_finetuning_report(command.out, metrics, command.public()))
    return command.finish(metrics)


if __name__ == "__main__":
    command_line(PROG, FinetuneOptions, __doc__, main)
