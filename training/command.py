"""What the training commands share: their options, what a run's folder holds, and how a run begins and ends.

A run's folder has run.json with a key of all that the result depends on, metrics.json, report.md, model/, until it is
finished its newest checkpoint, and config.json (settings, versions). That is written last: with it the run is finished,
and the same command finds it. Another command on the same folder is refused, whether or not the run is finished.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from training import processes
from training.data import HUB
from training.model import add_adapters, load_model, merged, pick_device
from training.options import Options, parse, stop
from training.presets import PRESETS, filled_in
from training.require import require
from training.run import Schedule
from training.stages import fingerprint, finished, remove, renamed_when_done, write_json, write_text
from training.steps import Batches, Recipe
from training.templates import Format
from training.trainer import Checkpoints
from training.unlearning_report import model_card
from training.versions import versions

# Settings that do not determine the result, or that the key has by their content.
NOT_IN_KEY = (
    *("preset", "out", "data_dir", "model", "fresh", "dry_run", "save_steps", "report_to"),
    *("reference_cache", "start_log", "retain_log"),
)
NO_PATHS = ("out", "data_dir", "fresh", "dry_run", "reference_cache", "retain_log", "start_log")
# What a run writes into its folder.
RUN_FILES = (
    *("run.json", "config.json", "metrics.json", "report.md", "figure.png", "model", "adapter", "eval", "reference"),
    *("checkpoint-*", ".*.partial"),
)


@dataclass(frozen=True)
class CommonOptions:
    """None is filled in by the preset (`training.presets`)."""

    preset: Annotated[str | None, "hyper-parameters of the papers for a model", tuple(PRESETS)] = None
    model: Annotated[str | None, "folder or hub name of the model to start from"] = None
    template: Annotated[
        str | None, "how a question is put: llama-2, llama-3, phi, qwen, ...; auto: by the tokenizer"
    ] = None
    data_dir: Annotated[str, "folder with TOFU's JSON lines, or a data set of the hub"] = HUB
    out: Annotated[Path | None, "folder of the run"] = None
    fresh: Annotated[bool, "remove what another run, or this one when it was finished, left in --out"] = False
    dry_run: Annotated[bool, "print the resolved settings, steps, batches and memory, and stop"] = False
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    seed: Annotated[int, "of the order of the rows and of what is drawn"] = 0
    # the recipe
    epochs: Annotated[int | None, "over the rows to learn, or the forget set"] = None
    lr: Annotated[float | None, "peak learning rate: linear warm-up, linear decay to 0"] = None
    batch_size: Annotated[int | None, "rows a step, by all processes together"] = None
    micro_batch_size: Annotated[
        int | None, "rows of a kind at a time in one process; gradients add up to the whole step"
    ] = None
    warmup_epochs: Annotated[float, "length of the warm-up"] = 1.0
    weight_decay: Annotated[float, "of AdamW"] = 0.01
    max_grad_norm: Annotated[float, "gradients are clipped to this norm; 0: they are not"] = 1.0
    packing: Annotated[bool | None, "rows one after another, no padding; --no-packing: padded on the right"] = None
    # the model
    attn_implementation: Annotated[str | None, "flash_attention_2, sdpa, eager, ...; default: transformers' choice"] = (
        None
    )
    use_liger_kernel: Annotated[bool, "Liger's kernels for the layers below the head"] = False
    gradient_checkpointing: Annotated[bool | None, "recompute activations in the backward"] = None
    lora_rank: Annotated[int, "train adapters of this rank on all linear layers but the head; 0: all weights"] = 0
    lora_alpha: Annotated[int, "adapters are scaled by alpha / rank"] = 32
    lora_dropout: Annotated[float, "dropout in front of the adapters"] = 0.0
    # on the way
    save_steps: Annotated[int | None, "steps between checkpoints; default: an epoch; 0: only when interrupted"] = None
    eval_steps: Annotated[int | None, "steps between evaluations; default: an epoch; 0: only before and after"] = None
    report_to: Annotated[str | None, "tensorboard, wandb, ..., several with commas"] = None


Given = TypeVar("Given", bound=CommonOptions)


class Command(Generic[Given]):
    """A resolved run: `stage` is "finetune" or "unlearn"."""

    def __init__(self, prog: str, stage: str, options: Given):
        self.prog, self.options = prog, filled_in(options, stage)
        options = self.options
        if options.model is None or options.out is None:
            raise ValueError(f"expected --model and --out, got {options.model} and {options.out}; see --help")
        self.model, self.out = options.model, options.out
        self.device = pick_device(options.device)
        self.recipe = Recipe(**{f.name: getattr(options, f.name) for f in fields(Recipe)})
        for name in ("epochs", "batch_size", "lr", "micro_batch_size"):
            value = getattr(self.recipe, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name}: expected more than 0, got {value}")

    @cached_property
    def format(self) -> Format:
        return Format(AutoTokenizer.from_pretrained(self.model), require(self.options.template, "a template"))

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.out, self.key)

    def schedule(self, num_steps: int) -> Schedule:
        epoch = num_steps // self.recipe.epochs
        every = [epoch if n is None else n for n in (self.options.eval_steps, self.options.save_steps)]
        return Schedule(num_steps, *every)

    def start(self, *depends_on: Any) -> dict[str, Any] | None:
        """metrics.json of this very run if it is finished; None: it is to be run, from its checkpoint if there is one.

        `depends_on`: hashes of the data. What another run left, finished or not, is refused, or removed by --fresh; so
        is, by --fresh, this run if it is finished.
        """
        out, o = self.out, self.options
        settings = {k: v for k, v in asdict(o).items() if k not in NOT_IN_KEY}
        model = model_fingerprint(self.model)
        self.key = fingerprint([self.prog, str(settings), depends_on, self.format.hash(), model, self.device.type])
        complete = finished(out / "config.json", self.key) is not None
        left = (out / "config.json").exists() or any(out.glob("checkpoint-*"))
        another = left and finished(out / "run.json", self.key) is None
        processes.wait()  # every process has looked before one writes
        if o.fresh and (complete or another):
            self._check_nothing_needed_is_removed()
            processes.on_main(lambda: remove(*(path for name in RUN_FILES for path in out.glob(name))))
        elif complete:
            self.say(f"{out} is finished: its results are those of this command")
            return json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        elif another:
            raise ValueError(
                f"--out {out} holds a run with other settings, data or weights; choose another folder, or remove it by "
                "--fresh"
            )
        processes.on_main(lambda: write_json(out / "run.json", {"key": self.key}))
        return None

    def _check_nothing_needed_is_removed(self) -> None:
        paths = (Path(value) for value in asdict(self.options).values() if isinstance(value, (str, Path)))
        inside = [path for path in paths if self.out.resolve() in path.resolve().parents and path.exists()]
        if inside:
            raise ValueError(f"--fresh would remove {inside[0]}, which this run needs: choose another --out")

    def say(self, text: str) -> None:
        if processes.is_main():
            Console(stderr=True).print(text, soft_wrap=True, markup=False)

    def load_model(self) -> PreTrainedModel:
        o = self.options
        return load_model(
            self.model,
            self.device,
            attn_implementation=o.attn_implementation,
            use_liger_kernel=o.use_liger_kernel,
            gradient_checkpointing=bool(o.gradient_checkpointing),
        )

    def to_train(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, with adapters if these are asked for, in the state that a run begins with."""
        o = self.options
        if o.lora_rank:
            return add_adapters(model, o.lora_rank, o.lora_alpha, o.lora_dropout, o.seed)
        torch.manual_seed(o.seed)  # of dropout
        return model

    def batches(self, model: PreTrainedModel) -> Batches:
        return Batches(self.format.pad_token_id, model.device, self.recipe.packing)

    def save_model(self, model: PreTrainedModel, weights: dict[str, Tensor], what: str) -> None:
        """model/, with merged adapters (and these alone in adapter/), tokenizer and model card."""

        def save() -> None:
            if self.options.lora_rank:
                with renamed_when_done(self.out / "adapter") as folder:
                    model.save_pretrained(folder)
            with renamed_when_done(self.out / "model") as folder:
                whole, state = merged(model, weights)
                whole.save_pretrained(folder, state_dict=state)
                self.format.save_pretrained(folder)
                write_text(folder / "README.md", model_card(model_name(self.model), what, self.public()))

        processes.on_main(save)

    def finish(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write metrics.json and config.json; the checkpoints have served."""
        config = {
            "key": self.key,
            "settings": self.public(),
            "device": device_name(self.device),
            "versions": versions(),
        }
        processes.on_main(lambda: write_json(self.out / "metrics.json", metrics))
        processes.on_main(lambda: write_json(self.out / "config.json", config))
        self.checkpoints.clear()
        return metrics

    def public(self) -> dict[str, Any]:
        """The settings without this machine's paths."""
        settings = {k: v for k, v in asdict(self.options).items() if k not in NO_PATHS}
        return settings | {"model": model_name(self.model), "template": self.format.template}

    def describe(self, num_steps: int, extra: dict[str, Any], with_reference: bool = False) -> None:
        """What --dry_run prints."""
        if not processes.is_main():
            return
        n, r = processes.count(), self.recipe
        share = -(-r.batch_size // n)
        micro = min(r.micro_batch_size or share, share)
        print(
            json.dumps(
                {
                    "settings": self.public(),
                    **extra,
                    "steps": num_steps,
                    "effective_batch": {"rows": r.batch_size, "processes": n, "micro_batch": micro,
                                        "accumulated": -(-share // micro)},
                    "memory_estimate_gib": memory_estimate(self.options, with_reference),
                },
                indent=2,
            )
        )  # fmt: skip


def memory_estimate(options: CommonOptions, with_reference: bool = False) -> dict[str, float]:
    """Weights, gradients and AdamW's two moments in float32, of one process that holds them whole. GiB, an estimate.

    `with_reference`: a frozen copy of the model, bfloat16 on a GPU, for KL methods.

    Activations come on top: they grow with the micro-batch. Logits do not: they are never formed.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(require(options.model, "a model")))
    total = sum(p.numel() for p in model.parameters())
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    adapters = sum(options.lora_rank * (m.in_features + m.out_features) for m in linears)
    trained = adapters if options.lora_rank else total
    held = total + (adapters if options.lora_rank else 0)
    parts = {"weights": 4 * held, "gradients": 4 * trained, "optimizer": 8 * trained}
    if with_reference:
        parts["reference"] = (2 if pick_device(options.device).type == "cuda" else 4) * total
    return {name: round(size / 2**30, 3) for name, size in (parts | {"total": sum(parts.values())}).items()}


def model_fingerprint(model: str) -> str:
    """sha256 of a folder's configuration and weights; a hub name stands for itself."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf") or p.name == "config.json"
    ):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def model_name(model: str | Path) -> str:
    """A hub name or a folder as reports show it; `runs/full/model` is `full`."""
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name


def device_name(device: torch.device) -> str:
    name = f"{device.type} ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return name if processes.count() == 1 else f"{processes.count()} processes on {name}"


def command_line(prog: str, options: type[Options], description: str, main: Callable[[Options], object]) -> None:
    """Parse, run, and end with a reason where the input does not fit or a signal came."""
    chosen = parse(options, prog, description)
    processes.start(getattr(chosen, "device", "cpu"))
    try:
        main(chosen)
    except (ValueError, OSError, ImportError) as reason:  # those of logs and caches are ValueErrors
        stop(prog, reason)
    except KeyboardInterrupt as reason:
        if processes.is_main():
            sys.stderr.write(f"python -m {prog}: {reason or 'interrupted'}; the same command goes on from there\n")
        raise SystemExit(130) from None
