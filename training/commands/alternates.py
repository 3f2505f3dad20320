"""Let a model make other plausible answers to the questions to forget, which AltPO prefers to the true ones.

    python -m training.alternates --model runs/full/model --forget_percent 10 --out runs/alternates.jsonl
    python -m training.unlearn --model runs/full/model --method altpo_rt --alternates runs/alternates.jsonl ...

Answers are drawn from the model, asked for another answer than the true one. --out is a file of JSON lines,
{"question": ..., "alternates": [...]}; any other file of that form will do.
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
    """How answers are drawn."""

    model: Annotated[Path | None, "folder of the model, tokenizer included"] = None
    benchmark: Annotated[str, lambda: f"whose questions: {', '.join(BENCHMARKS)}"] = "tofu"
    template: Annotated[str, "of the prompts (training/templates.py); auto: by the tokenizer's chat template"] = "auto"
    out: Annotated[Path, "the file"] = Path("runs/alternates.jsonl")
    count: Annotated[int, "answers a question, at most"] = 5
    temperature: Annotated[float, "of the draws, above 0"] = 1.0
    max_new_tokens: Annotated[int, "of an answer"] = 128
    prompt: Annotated[str, "what the model is asked, with {question} in it"] = PROMPT
    seed: Annotated[int, "of the draws"] = 0
    precision: Annotated[Precision, "of the arithmetic; auto: bf16 on a GPU that has it, fp32 elsewhere"] = "auto"
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    fresh: Annotated[bool, "write --out anew if it is there"] = False


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
                f"--out {options.out} holds other answers than these settings, rows and model give; choose another "
                "file, or write it anew by --fresh"
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
