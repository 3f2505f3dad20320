"""Fine-tune the model that unlearning starts from, or, on a retain split, the one that it is compared with.

    python -m training.finetune --model meta-llama/Llama-3.2-1B-Instruct --preset llama-3.2-1b --out runs/full
    python -m training.finetune --model runs/base --data_dir path/to/tofu --split retain90 --out runs/retain90

Minimises the negative log-likelihood of the answers of --split. --out gets the model (out/model, as transformers saves
it, with tokenizer and model card), metrics.json, config.json, report.md and figure.png. --report_to shows live curves
(docs/guides/logging.md). An interrupted run resumes from its last checkpoint; a finished one is not run again.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from training import distributed
from training.benchmarks import Benchmark
from training.commands.options import command_line
from training.commands.session import Session, SessionOptions
from training.data import Example, data_hash
from training.reports.run import write_finetuning_report
from training.run import run
from training.steps import FinetuningSteps
from training.trainer import Trainer

PROG = "training.finetune"


@dataclass(frozen=True)
class FinetuneOptions(SessionOptions):
    """What to learn."""

    stage: ClassVar[str] = "finetune"
    split: Annotated[
        str, "rows to learn: full; retain, for a model that never sees the forget set; or another split"
    ] = "full"  # fmt: skip
    world: Annotated[bool, "also learn facts about the world, for a model trained from scratch (TOFU: real_authors, "
                     "world_facts)"] = False  # fmt: skip


def main(options: FinetuneOptions, benchmark: Benchmark) -> dict[str, Any] | None:
    """metrics.json: {"history": [...]}; None after --dry_run."""
    session = Session(PROG, options, benchmark)
    splits = [options.split, *(benchmark.world_splits if options.world else ())]
    rows = [row for split in splits for row in benchmark.rows(split)]
    examples = benchmark.encode(session.format, rows)
    num_steps = options.epochs * -(-len(examples) // options.batch_size)
    if options.dry_run:
        session.describe(num_steps, {"learned": examples}, together=("learned",))
        return None
    with session.folder.alone():
        return session.start(data_hash(examples)) or _finetuned(session, examples, num_steps)


def _finetuned(session: Session[FinetuneOptions], examples: list[Example], num_steps: int) -> dict[str, Any]:
    options, benchmark = session.options, session.benchmark
    model = session.to_train(session.load_model())
    session.check_lengths(model, examples)
    steps = FinetuningSteps(examples, options, session.batches(model))
    trainer = Trainer(model, options, num_steps)
    history = run(
        trainer,
        steps,
        session.schedule(num_steps),
        lambda step, progress: {},
        label=f"Fine-tuning, {options.split}",
        checkpoints=session.checkpoints,
        tracking=session.tracking,
    )
    card = session.card(f"fine-tuned on {options.split} of {benchmark.title}", {options.split: examples})
    session.save_model(model, trainer.weights(), card)
    metrics = {"history": history, "steps": num_steps, "rows": len(examples)}
    distributed.on_main(lambda: write_finetuning_report(session.out, metrics, session.public()))
    return session.finish(metrics)


if __name__ == "__main__":
    command_line(PROG, FinetuneOptions, __doc__, main)
