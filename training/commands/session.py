"""What the commands that train share: options, loading the model, batches, saving the results."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels.core import cpu
from training import distributed, memory
from training.benchmarks.base import BENCHMARKS, Benchmark
from training.checkpoints import Checkpoints
from training.commands.presets import PRESETS
from training.commands.run_folder import RunFolder, model_name, public
from training.config import TrainConfig
from training.data import Example, data_hash
from training.layers import train_only
from training.loading import load_tokenizer
from training.model import (
    add_adapters,
    autocast_dtype,
    check_length,
    configuration_hash,
    in_bf16,
    load_model,
    merged,
    pick_device,
    skips_other_rows,
    weights_hash,
)
from training.pieces import Pieces
from training.reports.card import CARD, HUB_NAME, Card, Results
from training.run import Schedule
from training.steps import Batches
from training.store import SEAL, DamagedError, check_seal, file_hash, fingerprint, renamed_when_done, seal, write_text
from training.templates import Format
from training.tracking import Tracking

# Settings that do not change the result, or whose content is hashed into the key separately.
NOT_IN_KEY = (
    *(
        "preset",
        "out",
        "data_dir",
        "model",
        "fresh",
        "dry_run",
        "device",
        "save_steps",
        "save_every_minutes",
        "report_to",
    ),
    *("reference_cache", "start_log", "retain_log", "alternates", "list"),
)


@dataclass(frozen=True)
class RunOptions:
    """A run: its model, its folder, evaluations and checkpoints."""

    preset: Annotated[
        str | None, lambda: f"hyperparameters for a model; other options override them: {', '.join(PRESETS)}"
    ] = None
    model: Annotated[str | None, "folder or hub name of the model to start from"] = None
    benchmark: Annotated[str, lambda: f"source of the rows and metrics: {', '.join(BENCHMARKS)}"] = "tofu"
    template: Annotated[str, "prompt template: llama-2, llama-3, phi, qwen, ...; auto: chosen by the tokenizer"] = (
        "auto"
    )
    out: Annotated[Path | None, "folder of the run"] = None
    fresh: Annotated[bool, "remove the results of another run, or of this one if it is finished, from --out"] = False
    dry_run: Annotated[bool, "print the resolved settings, steps, batches and a memory estimate, and stop"] = False
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    attn_implementation: Annotated[str | None, "flash_attention_2, flex_attention, sdpa, eager, ..."] = None
    use_liger_kernel: Annotated[bool, "use Liger's kernels for the layers below the head"] = False
    gradient_checkpointing: Annotated[bool, "recompute activations in the backward pass: less memory, more time"] = (
        False
    )
    lora_rank: Annotated[
        int, "train LoRA adapters of this rank on all linear layers except the head; 0: train all weights"
    ] = 0
    lora_alpha: Annotated[int, "adapters are scaled by alpha / rank"] = 32
    lora_dropout: Annotated[float, "dropout before the adapters"] = 0.0
    train_only: Annotated[
        str, "train only parameters whose full name matches this regular expression, such as .*layers.[567].*; '': all"
    ] = ""
    eval_steps: Annotated[
        int | None, "steps between evaluations. None: --eval_epochs decides; 0: only before and after"
    ] = None
    eval_epochs: Annotated[int, "epochs between evaluations, if --eval_steps is not given"] = 1
    save_steps: Annotated[int | None, "steps between checkpoints. None: every epoch; 0: not by steps"] = None
    save_every_minutes: Annotated[float, "minutes between checkpoints; 0: not by time"] = 30.0
    report_to: Annotated[
        str | None, "live curves: tensorboard, wandb, ..., or several with commas (docs/guides/logging.md)"
    ] = None


@dataclass(frozen=True)
class SessionOptions(TrainConfig, RunOptions):
    """Options of every command that trains."""


Given = TypeVar("Given", bound=SessionOptions)


class Session(Generic[Given]):
    """A run that trains: everything except the rows."""

    def __init__(self, prog: str, options: Given, benchmark: Benchmark):
        self.prog, self.options, self.benchmark = prog, options, benchmark
        if options.model is None or options.out is None:
            raise ValueError(f"expected --model and --out, got {options.model} and {options.out}; see --help")
        self.model, self.out = options.model, options.out
        looks_like_a_path = Path(self.model).is_absolute() or self.model.startswith(".") or self.model.count("/") > 1
        if looks_like_a_path and not Path(self.model).is_dir():
            raise ValueError(f"--model {self.model}: no such folder")
        if Path(self.model).resolve() == self.out.resolve():
            raise ValueError(f"--out {self.out} is the folder of --model; choose another one")
        self.device = pick_device(options.device)
        self.folder = RunFolder(self.out, options, benchmark.options)
        self.tracking = Tracking(
            options.report_to, self.out, self.out.resolve().name, self.folder.settings, self.device, self.say
        )
        self.say(f"{self.out}: {benchmark.title}, {model_name(self.model)} on {self.device}")

    @cached_property
    def format(self) -> Format:
        return Format(load_tokenizer(self.model), self.options.template)

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.out, self.folder.key)

    def schedule(self, num_steps: int) -> Schedule:
        o, epoch = self.options, num_steps // self.options.epochs
        evaluate = o.eval_epochs * epoch if o.eval_steps is None else o.eval_steps
        return Schedule(num_steps, evaluate, epoch if o.save_steps is None else o.save_steps, o.save_every_minutes)

    def start(self, *depends_on: Any) -> dict[str, Any] | None:
        """metrics.json of this very run if it is finished (`RunFolder.begin`). `depends_on`: hashes of the data."""
        settings = {k: v for some in (self.options, self.benchmark.options) for k, v in asdict(some).items()}
        settings = {k: v for k, v in settings.items() if k not in NOT_IN_KEY}
        parts = {
            "command": self.prog,
            "settings": fingerprint(str(settings)),
            "data": fingerprint(depends_on),
            "template": self.format.hash(),
            "model": model_fingerprint(self.model),
            "device": self.device.type,
        }
        found = self.folder.begin(fingerprint(parts), self.options.fresh, parts)
        if found is not None:
            self.say(f"{self.out} is finished: nothing is run again")
        return found

    def say(self, text: str) -> None:
        if distributed.is_main():
            Console(stderr=True).print(text, soft_wrap=True, markup=False)

    def load_model(self) -> PreTrainedModel:
        o = self.options
        lacking = cpu.refusal(torch.bfloat16) if self.device.type == "cpu" else None
        if o.precision == "bf16" and lacking:
            self.say(f"--precision bf16 is slower than fp32 on this CPU: {lacking}")
        if o.gradient_checkpointing:  # memory is wanted, and may cost time: fresh pages for every large tensor
            memory.return_freed_memory()
        return load_model(
            self.model,
            self.device,
            attn_implementation=o.attn_implementation,
            use_liger_kernel=o.use_liger_kernel,
            gradient_checkpointing=o.gradient_checkpointing,
            precision=o.precision,
        )

    def to_train(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, with adapters if these are asked for, in the state that a run begins with."""
        o = self.options
        if o.lora_rank:
            model = add_adapters(model, o.lora_rank, o.lora_alpha, o.lora_dropout, o.seed)
        else:
            torch.manual_seed(o.seed)  # of dropout
        if o.train_only:
            train_only(model, o.train_only)
        return model

    def batches(self, model: PreTrainedModel) -> Batches:
        return Batches(self.format.pad_token_id, model.device, self.packs(model.config._attn_implementation))

    def packs(self, attn_implementation: str | None) -> bool:
        """Whether rows are put one after another."""
        packing = self.options.packing
        return packing == "on" or (packing == "auto" and skips_other_rows(attn_implementation))

    def check_lengths(self, model: PreTrainedModel, examples: Iterable[Example]) -> None:
        """ValueError where one is longer than the model can read."""
        check_length(model, max((len(e.input_ids) for e in examples), default=0), "an example")

    def card(self, title: str, rows: Mapping[str, Iterable[Example]], **more: Any) -> Card:
        """What README.md of the model says. `rows`: those that were learned or forgotten, by kind."""
        data_dir = str(getattr(self.benchmark.options, "data_dir", ""))
        return Card(
            name=self.out.resolve().name,
            base=self.model,
            base_name=model_name(self.model),
            title=title,
            settings=self.public(),
            data={kind: (len(examples := list(some)), data_hash(examples)) for kind, some in rows.items()},
            benchmark=self.benchmark.title,
            dataset=data_dir if HUB_NAME.fullmatch(data_dir) and not Path(data_dir).exists() else "",
            **more,
        )

    def save_model(
        self, model: PreTrainedModel, weights: dict[str, Tensor], card: Card, results: Results | None = None
    ) -> None:
        """model/, with merged adapters (and these alone in adapter/), tokenizer and model card."""

        def save() -> None:
            if self.options.lora_rank:
                with renamed_when_done(self.out / "adapter") as folder:
                    model.save_pretrained(folder)
            with renamed_when_done(self.out / "model") as folder:
                whole, state = merged(model, weights)
                whole.save_pretrained(folder, state_dict=state)
                self.format.save_pretrained(folder)
                seal(folder)  # but for the card, which anybody may edit
                (folder / CARD).write_text(card.text(results or {}), encoding="utf-8")

        distributed.on_main(save)

    def update_card(self, card: Card, results: Results) -> None:
        """With what was measured after the model was saved."""
        distributed.on_main(lambda: write_text(self.out / "model" / CARD, card.text(results)))

    def finish(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write metrics.json and config.json; the checkpoints have served."""
        self.folder.finish(metrics, device=device_name(self.device), peak_memory_gib=memory.peak_gib(self.device))
        self.checkpoints.clear()
        return metrics

    def public(self) -> dict[str, Any]:
        """The settings without this machine's paths."""
        return public(self.options, self.benchmark.options) | {"template": self.format.template}

    def describe(
        self,
        num_steps: int,
        rows: dict[str, list[Example]],
        together: Iterable[str],
        with_reference: bool = False,
        with_head_copy: bool = False,
    ) -> None:
        """What --dry_run prints. `rows` by kind, of which those of `together` share a micro-batch."""
        if not distributed.is_main():
            return
        o, n = self.options, distributed.count()
        share = -(-o.batch_size // n)
        micro = o.piece(share)
        longest = [length for kind in together for length in sorted(len(e.input_ids) for e in rows[kind])[-micro:]]
        plan = {
            "settings": self.public(),
            "rows": {kind: len(some) for kind, some in rows.items()},
            "steps": num_steps,
            "effective_batch": {
                "rows": o.batch_size, "processes": n, "micro_batch": micro, "accumulated": -(-share // micro)
            },
            "memory_estimate_gib": self._memory(longest, micro < share, with_reference, with_head_copy),
        }  # fmt: skip
        print(json.dumps(plan, indent=2, default=str))

    def _memory(
        self, lengths: list[int], accumulated: bool, with_reference: bool, with_head_copy: bool
    ) -> dict[str, float] | str:
        """Or why it cannot be known."""
        o = self.options
        try:
            return memory.estimate(
                self.model,
                lengths,
                trained=o.lora_rank or "all",
                bf16=in_bf16(o.precision, self.device),
                packing=self.packs(o.attn_implementation),
                attn_implementation=o.attn_implementation,
                gradient_checkpointing=o.gradient_checkpointing,
                with_reference=with_reference,
                device=self.device,
                accumulated=accumulated,
                with_rounding=o.saf_format != "off",
                with_head_copy=with_head_copy,
            )
        except ValueError as reason:
            return str(reason)

    def load_reference(self) -> PreTrainedModel:
        """The frozen model of a KL term: on a GPU in bfloat16, with half of the memory."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        attention, precision = self.options.attn_implementation, self.options.precision
        model = load_model(self.model, self.device, dtype=dtype, attn_implementation=attention, precision=precision)
        return model.eval()


def measured(
    benchmark: Benchmark, model: PreTrainedModel, format: Format, path: Path, display: Progress, name: str = ""
) -> Any:
    """The measures of a model, written to `path`; finished pieces of an interrupted evaluation are found beside it."""
    arithmetic = [str(autocast_dtype(model)), str(model.config._attn_implementation)]
    key = fingerprint([benchmark.key(), format.hash(), weights_hash(model), configuration_hash(model), *arithmetic])
    pieces = Pieces(name or path.stem, path.with_name(f".{path.stem}.pieces"), key)
    measures = benchmark.evaluate(model, format, pieces, display)
    distributed.on_main(lambda: benchmark.write(path, measures))
    pieces.clear()
    return measures


def model_fingerprint(model: str) -> str:
    """sha256 of a folder's configuration and weights, adapters and what they sit on included; a hub name stands for
    itself.

    ValueError where they are not those that a command of ours has written there (`training.store.seal`).
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    adapter = folder / "adapter_config.json"
    suffixes, configs = (".safetensors", ".bin", ".gguf"), ("config.json", adapter.name)
    files = sorted(p for p in folder.iterdir() if p.suffix in suffixes or p.name in configs)
    hashes = {path.name: file_hash(path) for path in files}
    try:
        check_seal(folder, hashes=hashes)
    except DamagedError as damage:
        raise ValueError(
            f"{damage}; make the model again, or, where the change is meant, remove {SEAL} from its folder"
        ) from None
    digest = hashlib.sha256()
    for name, value in hashes.items():
        digest.update(name.encode())
        digest.update(bytes.fromhex(value))
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        digest.update(model_fingerprint(str(base)).encode())
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    name = f"{device.type} ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return name if distributed.count() == 1 else f"{distributed.count()} processes on {name}"
