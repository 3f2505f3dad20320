"""Generate other plausible answers to the questions to forget. AltPO prefers them to the true answers.

    python -m training.alternates --model runs/full/model --forget_percent 10 --out runs/alternates.jsonl
    python -m training.unlearn --model runs/full/model --method altpo_rt --alternates runs/alternates.jsonl ...

The model is asked for an answer other than the true one, and answers are sampled. --out is a file of JSON lines,
{"question": ..., "alternates": [...]}. Any other file of that form can be used instead.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console

from training import distributed
from training.alternates import PROMPT, key_of, make_alternates, write_alternates
from training.benchmarks import BENCHMARKS, Benchmark
from training.commands.options import command_line
from training.commands.session import model_fingerprint
from training.config import Precision
from training.loading import load_tokenizer
from training.model import load_model, pick_device
from training.progress import counted, progress
from training.store import fingerprint
from training.templates import Format

PROG = "training.alternates"


@dataclass(frozen=True)
class AlternatesOptions:
    """How answers are sampled."""

    model: Annotated[Path | None, "folder of the model, tokenizer included"] = None
    benchmark: Annotated[str, lambda: f"benchmark whose questions are answered: {', '.join(BENCHMARKS)}"] = "tofu"
    template: Annotated[
        str, "prompt template (training/templates.py); auto: chosen by the tokenizer's chat template"
    ] = "auto"
    out: Annotated[Path, "file to write"] = Path("runs/alternates.jsonl")
    count: Annotated[int, "maximum number of answers per question"] = 5
    temperature: Annotated[float, "sampling temperature, above 0"] = 1.0
    max_new_tokens: Annotated[int, "maximum length of an answer"] = 128
    prompt: Annotated[str, "prompt, with {question} in it"] = PROMPT
    seed: Annotated[int, "of sampling"] = 0
    precision: Annotated[Precision, "of the arithmetic; auto: bf16 on a GPU that supports it, fp32 elsewhere"] = "auto"
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    fresh: Annotated[bool, "overwrite --out"] = False


def main(options: AlternatesOptions, benchmark: Benchmark) -> Path:
    """The file."""
    if options.model is None or not (options.model / "config.json").is_file():
        raise ValueError(f"expected --model, the folder of a model, got {options.model}; see --help")
    if options.count < 1 or not options.temperature > 0 or "{question}" not in options.prompt:
        raise ValueError("expected --count of at least 1, --temperature above 0 and {question} in --prompt")
    rows = benchmark.rows("forget")
    format = Format(load_tokenizer(options.model), options.template)
    drawn = {name: getattr(options, name) for name in ("count", "temperature", "max_new_tokens", "prompt", "seed")}
    key = fingerprint([drawn, rows, format.hash(), model_fingerprint(str(options.model))])
    if options.out.exists() and not options.fresh:
        if key_of(options.out) != key:
            raise ValueError(
                f"--out {options.out} holds answers of other settings, rows or another model; choose another "
                "file, or overwrite it with --fresh"
            )
        Console(stderr=True).print(f"{options.out} is there already", markup=False)
        return options.out
    if not all("question" in row for row in rows):
        raise ValueError(f"--benchmark {benchmark.name}: expected questions to answer, got plain text")
    model = load_model(options.model, pick_device(options.device), precision=options.precision)
    with progress() as display:
        found = make_alternates(
            model,
            format,
            rows,
            options.count,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            prompt=options.prompt,
            on_rows=counted(display, "Answers", len(rows) * options.count),
        )
    distributed.on_main(lambda: write_alternates(options.out, rows, found, key))
    return options.out


if __name__ == "__main__":
    command_line(PROG, AlternatesOptions, __doc__, main)
