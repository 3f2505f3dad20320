"""How robust forgetting is: what an unlearned model remembers after an attack, by the same metrics as before it.

    python -m training.attack quantize --model DIR --data_dir path/to/tofu --forget_percent 10
    python -m training.attack relearn  --model DIR --data_dir path/to/tofu --forget_percent 10 --fraction 0.2

quantize rounds the weights of every linear layer but the head to 8 and to 4 bits, one scale a row, to the nearest
(Zhang et al. 2025, arXiv 2410.16454, found forgotten text to come back at 4 bits); arithmetic stays in float32. relearn
fine-tunes on a seeded fraction of the forget set and follows the answer probability, step by step, on the rows it
relearns and on the other forget rows, which it does not see. Both write metrics.json, config.json, report.md and
figure.png to --out. A model that withstands both may still fail to a third: this is no proof of forgetting.
"""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from training.command import model_name
from training.data import HUB, load_rows
from training.eval_log import read_log
from training.eval_sets import load_eval_sets
from training.evaluate_model import evaluate_model
from training.finetune import finetune
from training.model import load_model, pick_device
from training.options import parse, stop
from training.scoring import score
from training.stages import renamed_when_done, write_json, write_text
from training.steps import Recipe
from training.summary import summary
from training.templates import Format
from training.unlearning_report import cell
from training.versions import versions

PROG = "training.attack"
SHOWN = ("forget_prob", "forget_rougeL", "forget_extraction_strength", "forget_quality", "model_utility_geometric")


@dataclass(frozen=True)
class AttackOptions:
    model: Annotated[Path | None, "folder of the unlearned model, tokenizer included"] = None
    data_dir: Annotated[str, "folder with TOFU's JSON lines, or a data set of the hub"] = HUB
    retain_log: Annotated[Path | None, "log of the model that never saw the forget set, for the forget quality"] = None
    forget_percent: Annotated[int, "which forget set was unlearned"] = 10
    template: Annotated[str, "of the prompts (training/templates.py); auto: by the tokenizer's chat template"] = "auto"
    rows: Annotated[int, "first rows of every evaluation set that are used; 0: all"] = 300
    max_new_tokens: Annotated[int, "longest greedy answer"] = 200
    batch_size: Annotated[int, "sequences a forward pass, generation or training step"] = 32
    fraction: Annotated[float, "relearn: share of the forget set to fine-tune on"] = 0.2
    epochs: Annotated[int, "relearn: epochs over it"] = 5
    lr: Annotated[float, "relearn: peak learning rate"] = 1e-5
    seed: Annotated[int, "relearn: of the rows and the batches"] = 0
    out: Annotated[Path | None, "folder for the results (default: runs/attack_{quantize,relearn})"] = None
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    dry_run: Annotated[bool, "print the settings, and stop"] = False


def quantized(weight: Tensor, bits: int) -> Tensor:
    """Rounded to 2^bits - 1 symmetric levels, s round(w / s) with s = max|row| / (2^(bits-1) - 1)."""
    levels = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / levels
    return scale * torch.round(weight / scale)


@torch.no_grad()
def quantize_(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """In place, every linear layer but the head, which quantisation libraries leave alone as well."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            module.weight.copy_(quantized(module.weight, bits))
    return model


def relearn_(
    model: PreTrainedModel, relearned: list, others: list, pad_id: int, options: AttackOptions
) -> list[dict[str, float]]:
    """In place; [{"step", "relearned", "others"}], mean answer probabilities before the first and after every step."""
    history: list[dict[str, float]] = []

    def measure(loss: float | None = None) -> None:
        probability = [score(model, rows, pad_id).answer_probability.mean().item() for rows in (relearned, others)]
        history.append({"step": len(history), "relearned": probability[0], "others": probability[1]})

    measure()
    recipe = Recipe(options.epochs, options.lr, options.batch_size, packing=False, seed=options.seed)
    finetune(model, relearned, recipe, pad_id, on_step=measure)
    return history


def main(attack: str, options: AttackOptions) -> dict[str, Any] | None:
    """{"stages": {name: metrics}, "history": [...]}; None after --dry_run."""
    if options.model is None or not (options.model / "config.json").is_file():
        raise ValueError(f"expected --model, the folder of an unlearned model, got {options.model}; see --help")
    if not 0 < options.fraction < 1:
        raise ValueError(f"--fraction: expected a share between 0 and 1, got {options.fraction}")
    if options.dry_run:
        print(json.dumps({"attack": attack} | asdict(options), indent=2, default=str))
        return None
    device = pick_device(options.device)
    format = Format(AutoTokenizer.from_pretrained(options.model), options.template)
    model = load_model(options.model, device)
    retain_log = read_log(options.retain_log) if options.retain_log else None
    sets = load_eval_sets(options.data_dir, options.forget_percent, options.rows)

    def evaluated(attacked: PreTrainedModel, name: str) -> dict[str, Any]:
        Console(stderr=True).print(f"Evaluating: {name}")
        log = evaluate_model(
            attacked,
            format,
            sets,
            name=name,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
        )
        return summary(log, retain_log)

    stages, history = {"unlearned": evaluated(model, "unlearned")}, []
    if attack == "quantize":
        for bits in (8, 4):
            stages[f"int{bits}"] = evaluated(quantize_(deepcopy(model), bits), f"int{bits}")
    else:
        relearned, others = _split(options, format.encode)
        history = relearn_(model, relearned, others, format.pad_token_id, options)
        stages["relearned"] = evaluated(model, "relearned")
    result = {"stages": stages, "history": history}
    _write(attack, options, model_name(options.model), result)
    return result


def _split(options: AttackOptions, encode_rows: Callable) -> tuple[list, list]:
    """(relearned, others): a seeded choice of the forget rows, and the rest."""
    rows = load_rows(options.data_dir, f"forget{options.forget_percent:02d}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed)).tolist()
    cut = min(len(rows) - 1, max(1, round(options.fraction * len(rows))))
    return tuple(encode_rows([rows[i] for i in sorted(part)]) for part in (order[:cut], order[cut:]))


def _write(attack: str, options: AttackOptions, model: str, result: dict[str, Any]) -> None:
    out = options.out or Path(f"runs/attack_{attack}")
    hidden = ("data_dir", "out", "retain_log", "dry_run")
    settings = {k: v for k, v in asdict(options).items() if k not in hidden} | {"model": model}
    write_json(out / "metrics.json", result)
    write_json(out / "config.json", {"attack": attack, "settings": settings, "versions": versions()})
    _plot(result, out / "figure.png")
    headings = ["", *SHOWN]
    rows = [[name, *(cell(metrics.get(key)) for key in SHOWN)] for name, metrics in result["stages"].items()]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *rows))
    title = f"# {attack.capitalize()} attack on {model}"
    caveat = "What survives these attacks may fall to others: unlearning is no guarantee."
    write_text(out / "report.md", f"{title}\n\n{table}\n\n![Before and after](figure.png)\n\n{caveat}\n")
    print(table)


def _plot(result: dict[str, Any], path: Path) -> None:
    """Recovery over steps, or forget and retain probability by stage."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    if result["history"]:
        steps = [h["step"] for h in result["history"]]
        for key, label, colour in (
            ("relearned", "rows it relearns", "#D55E00"),
            ("others", "other forget rows", "#0072B2"),
        ):
            axis.plot(steps, [h[key] for h in result["history"]], color=colour, label=label, linewidth=2)
        axis.set(xlabel="relearning step", ylabel="answer probability", ylim=(0, None))
    else:
        names = list(result["stages"])
        for shift, key, colour in ((-0.2, "forget_prob", "#D55E00"), (0.2, "retain_prob", "#0072B2")):
            heights = [metrics[key] for metrics in result["stages"].values()]
            axis.bar([i + shift for i in range(len(names))], heights, 0.4, color=colour, label=key.split("_")[0])
        axis.set(xticks=range(len(names)), xticklabels=names, ylabel="answer probability")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    with renamed_when_done(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    attack = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if attack in ("-h", "--help"):
        parse(AttackOptions, f"{PROG} {{quantize,relearn}}", __doc__, ["--help"])
    if attack not in ("quantize", "relearn"):
        stop(PROG, f"expected quantize or relearn, got {attack}; see --help")
    chosen = parse(AttackOptions, f"{PROG} {attack}", __doc__, sys.argv[2:])
    try:
        main(attack, chosen)
    except (ValueError, OSError, ImportError) as reason:
        stop(PROG, reason)
