"""The settings of a run: one dataclass, from which the command line and its help are made."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from training.options import parse


@dataclass(frozen=True)
class Config:
    """`Annotated[type, help]`; None is filled in from `PRESETS`."""

    data_dir: Annotated[Path | None, "folder with TOFU's JSON lines; without it, fictitious authors are generated"] = (
        None
    )
    out: Annotated[Path, "folder for the results, the fine-tuned model and the reference cache"] = Path("runs/demo")
    fresh: Annotated[bool, "run every stage again, whatever is in --out"] = False
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    seed: Annotated[int, "seed of the authors, the weights, the batches and the retain rows"] = 0
    # data
    authors: Annotated[int | None, "number of authors, 20 pairs each; 0: all of --data_dir (TOFU has 200)"] = None
    forget_percent: Annotated[int, "share of the authors to forget; selects forgetXX.json and retainYY.json"] = 10
    retain_eval_authors: Annotated[int, "authors to keep on whom keeping is measured, a seeded sample"] = 8
    vocab_size: Annotated[int, "entries of the tokenizer, which is trained on the text"] = 4096
    # model and fine-tuning
    hidden_size: Annotated[int, "width of the model, a multiple of 64"] = 512
    layers: Annotated[int, "decoder layers"] = 1
    finetune_epochs: Annotated[int | None, "epochs over all authors, until they are known"] = None
    finetune_lr: Annotated[float, "peak learning rate of fine-tuning"] = 2e-3
    batch_size: Annotated[int, "sequences a step, in fine-tuning and of the forget set in unlearning"] = 16
    # unlearning, the same for every method
    epochs: Annotated[int, "unlearning epochs over the forget set"] = 10
    lr: Annotated[float | None, "peak learning rate of unlearning"] = None
    beta: Annotated[float, "inverse temperature of NPO; towards 0 it becomes gradient ascent"] = 0.1
    retain_weight: Annotated[float | None, "weight of the retain likelihood in NPO+RT"] = None


# What takes a few minutes on two CPU cores (training/results/ has the times), by where the data comes from.
PRESETS: dict[str, dict[str, Any]] = {
    # generated authors are cut from one cloth: forgetting some drags the others along unless these weigh more
    "generated": {"authors": 60, "finetune_epochs": 10, "lr": 6e-4, "retain_weight": 5.0},
    "tofu": {"authors": 40, "finetune_epochs": 8, "lr": 3e-4, "retain_weight": 1.0},
}


def with_presets(config: Config) -> Config:
    preset = PRESETS["generated" if config.data_dir is None else "tofu"]
    return replace(config, **{name: value for name, value in preset.items() if getattr(config, name) is None})


def from_command_line(arguments: list[str] | None, description: str) -> Config:
    names = {name for preset in PRESETS.values() for name in preset}
    by_source = {
        name: ", ".join(f"{preset[name]} {source}" for source, preset in PRESETS.items() if name in preset)
        for name in names
    }
    return with_presets(parse(Config, "training.demo", description, arguments, by_source))


def public(config: Config) -> dict[str, Any]:
    """The settings that determine the results, without this machine's paths."""
    return {name: value for name, value in asdict(config).items() if name not in ("out", "fresh", "data_dir")}
