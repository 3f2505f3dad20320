"""The stages of a run. Each leaves a record under --out with a key of all it depends on, and is skipped when found."""

import time
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from training.authors import PAIRS_PER_AUTHOR
from training.config import Config
from training.data import Example, data_hash, load_split, sample_authors, train_tokenizer
from training.finetune import finetune
from training.generation import complete
from training.methods import METHODS, Settings
from training.model import build_model, load_model, pick_device, special_ids_of, weights_hash
from training.processes import on_main
from training.reference_cache import StaleReferenceError, compute_reference, load_reference
from training.require import require
from training.run import progress_bar
from training.scoring import Scores, score
from training.stages import fingerprint, finished, remove, renamed_when_done, write_json
from training.steps import Batches, Recipe
from training.templates import Format
from training.unlearn import check_step_zero, unlearn, unlearning_steps
from training.versions import versions

COMPARED = ("npo_rt", "ga")  # the methods of the demo
FINETUNE_SETTINGS = ("seed", "hidden_size", "layers", "finetune_epochs", "finetune_lr", "batch_size")
UNLEARN_SETTINGS = ("seed", "epochs", "lr", "batch_size", "beta", "retain_weight")


class Run:
    """A configured run: its data, encoded, where it happens, and the stages in order."""

    def __init__(self, config: Config, console: Console):
        self.config, self.console = config, console
        self.device = pick_device(config.device)
        self.split = load_split(config.data_dir, config.authors, config.forget_percent, config.seed)
        self.tokenizer = train_tokenizer(self.split.rows, config.vocab_size)
        self.format = Format(self.tokenizer, "plain")
        self.retain_eval_rows = sample_authors(self.split.retain, config.retain_eval_authors, config.seed)
        self.forget, self.retain, self.retain_eval = (
            self.format.encode(rows) for rows in (self.split.forget, self.split.retain, self.retain_eval_rows)
        )
        self.seconds: dict[str, float] = {}
        if config.fresh:
            on_main(self.forget_stages)

    @property
    def model_dir(self):
        return self.config.out / "model"

    @property
    def cache_path(self):
        return self.config.out / "reference_cache.safetensors"

    @property
    def batches(self) -> Batches:
        return Batches(self.format.pad_token_id, self.device, packing=False)  # batches sorted by length have little

    def recipe(self, epochs: int, lr: float) -> Recipe:
        return Recipe(epochs, lr, self.config.batch_size, packing=False, seed=self.config.seed)

    def record_path(self, method: str):
        return self.config.out / f"unlearn_{method}.json"

    def forget_stages(self) -> None:
        for path in (self.model_dir, self.cache_path, *map(self.record_path, COMPARED)):
            remove(path)

    def execute(self) -> dict[str, Any]:
        """All stages; returns what metrics.json holds, which is the same whether stages were run or found."""
        record = self.finetuned()
        model = load_model(self.model_dir, self.device)
        reference = self.reference(model)
        c = self.config
        step_zero = check_step_zero(
            model, self.forget, reference.logps, self.batches, batch_size=c.batch_size, beta=c.beta
        )
        records = {method: self.unlearned(method, weights_hash(model), reference) for method in COMPARED}
        return {
            "data": self.data_summary(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocab_size": len(self.tokenizer),
            "finetune_loss": record["loss"],
            "step_zero": step_zero,
            "history": {method: r["history"] for method, r in records.items()},
            "examples": self.examples(model, {method: r["answers"] for method, r in records.items()}),
        }

    def finetuned(self) -> dict:
        """A model that knows all authors, in `out/model` as transformers saves it, tokenizer included."""
        key = self.key("fine-tune", FINETUNE_SETTINGS, data_hash(self.retain + self.forget))
        record = finished(self.model_dir / "stage.json", key)
        if record is None:
            c, examples, started = self.config, self.retain + self.forget, time.perf_counter()
            epochs = require(c.finetune_epochs, "a number of epochs of fine-tuning")
            special_ids = special_ids_of(self.tokenizer)
            model = build_model(len(self.tokenizer), c.hidden_size, c.layers, special_ids, c.seed)
            model.to(self.device)  # type: ignore[arg-type]  # mypy loses self in transformers' wraps(Module.to)
            recipe = self.recipe(epochs, c.finetune_lr)
            with progress_bar(self.console) as progress:
                steps = epochs * -(-len(examples) // c.batch_size)
                task = progress.add_task("Fine-tuning", total=steps, note="")
                loss, weights = finetune(
                    model,
                    examples,
                    recipe,
                    self.format.pad_token_id,
                    on_step=lambda loss: progress.update(task, advance=1, note=f"loss {loss:.3f}"),
                )
            record = {"key": key, "loss": loss, "seconds": time.perf_counter() - started}

            def save() -> None:
                with renamed_when_done(self.model_dir) as folder:
                    model.save_pretrained(folder, state_dict=weights)
                    self.tokenizer.save_pretrained(folder)
                    write_json(folder / "stage.json", record)

            on_main(save)
        else:
            self.console.print(f"Fine-tuned model found in {self.model_dir}")
        self.seconds["fine-tuning"] = record["seconds"]
        return record

    def reference(self, model: PreTrainedModel) -> Scores:
        """The cached log-probabilities of the forget set, computed where the cache is absent or refused."""
        try:
            scores = load_reference(self.cache_path, model, self.format, self.forget)
            self.console.print(f"Reference log-probabilities found in {self.cache_path}")
        except StaleReferenceError as reason:
            self.console.print(f"Computing the reference log-probabilities: {reason}")
            scores = compute_reference(self.cache_path, model, self.format, self.forget)
        return scores

    def unlearned(self, method: str, model_hash: str, reference: Scores) -> dict:
        """The history of one method, epoch 0 being the fine-tuned model, and its answers to the example questions."""
        examples = data_hash(self.forget + self.retain + self.retain_eval)
        key = self.key(method, UNLEARN_SETTINGS, examples, model_hash, reference.logps.tolist())
        record = finished(self.record_path(method), key)
        if record is None:
            c, started = self.config, time.perf_counter()
            model = load_model(self.model_dir, self.device)
            history = [self.measure(model, reference, epoch=0, loss=None)]
            steps = unlearning_steps(
                method,
                Settings(beta=c.beta, retain_weight=require(c.retain_weight, "a weight of the retain rows")),
                self.recipe(c.epochs, require(c.lr, "a learning rate")),
                self.batches,
                self.forget,
                self.retain,
                ref_logps=reference.logps,
            )
            with progress_bar(self.console) as progress:
                task = progress.add_task(METHODS[method].label, total=c.epochs, note="")

                def on_epoch(epoch: int, loss: float) -> None:
                    history.append(self.measure(model, reference, epoch, loss))
                    note = "forget {forget_probability:.3f}  retain {retain_probability:.3f}".format(**history[-1])
                    progress.update(task, advance=1, note=note)

                unlearn(model, steps, on_epoch)
            answers = [complete(model, self.format, row["question"]) for _, row in self.example_rows()]
            record = {"key": key, "history": history, "answers": answers, "seconds": time.perf_counter() - started}
            on_main(lambda: write_json(self.record_path(method), record))
        else:
            self.console.print(f"{METHODS[method].label} found in {self.record_path(method)}")
        self.seconds[METHODS[method].label] = record["seconds"]
        return record

    def measure(self, model: PreTrainedModel, reference: Scores, epoch: int, loss: float | None) -> dict[str, Any]:
        forget, retain = (score(model, e, self.format.pad_token_id) for e in (self.forget, self.retain_eval))
        return {
            "epoch": epoch,
            "train_loss": loss,
            "forget_probability": forget.answer_probability.mean().item(),
            "retain_probability": retain.answer_probability.mean().item(),
            "forget_log_ratio": (forget.logps - reference.logps).mean().item(),
        }

    def example_rows(self) -> list[tuple[str, dict[str, str]]]:
        return [("To forget", self.split.forget[0]), ("To keep", self.retain_eval_rows[0])]

    def examples(self, model: PreTrainedModel, answers: dict[str, list[str]]) -> list[dict[str, Any]]:
        """Greedy answers to one question of each group: the truth, before, and after every method."""
        return [
            {
                "group": group,
                "question": row["question"],
                "answers": {
                    "truth": row["answer"],
                    "before": complete(model, self.format, row["question"]),
                    **{METHODS[method].label: texts[i] for method, texts in answers.items()},
                },
            }
            for i, (group, row) in enumerate(self.example_rows())
        ]

    def data_summary(self) -> dict[str, Any]:
        examples = self.retain + self.forget
        return {
            "name": self.split.name,
            "sha256": data_hash(examples),
            "authors": len(examples) // PAIRS_PER_AUTHOR,
            "forget_authors": len(self.forget) // PAIRS_PER_AUTHOR,
            "pairs": len(examples),
            "forget_pairs": len(self.forget),
            "retain_eval_pairs": len(self.retain_eval),
            "tokens": sum(len(e.input_ids) for e in examples),
            "scored_tokens": sum(_num_scored(e) for e in examples),
        }

    def key(self, stage: str, settings: tuple[str, ...], *depends_on: Any) -> str:
        chosen = {name: getattr(self.config, name) for name in settings}
        hashes = [self.format.hash(), *depends_on]
        return fingerprint([stage, chosen, hashes, self.device.type, versions()])


def _num_scored(example: Example) -> int:
    return sum(label >= 0 for label in example.labels)
