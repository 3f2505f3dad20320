"""Make a small model with random weights, for machines without a GPU or without access to the hub.

    python -m training.tiny --data_dir path/to/tofu --out runs/base

A Llama with tied embeddings and a byte-level BPE tokenizer, in a folder as transformers saves it. The tokenizer is
trained on the text of --split and of the benchmark's questions about the world. Fine-tune the model with --preset tiny,
and with --world to learn the latter.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from training.benchmarks import BENCHMARKS, Benchmark
from training.commands.options import command_line
from training.model import build_model, special_ids_of
from training.store import clear_leftovers, fingerprint, finished, renamed_when_done, seal, write_record
from training.tokenizer import train_tokenizer

PROG = "training.tiny"
RECORD = "tiny.json"


@dataclass(frozen=True)
class TinyOptions:
    """The model."""

    benchmark: Annotated[str, lambda: f"source of the text: {', '.join(BENCHMARKS)}"] = "tofu"
    split: Annotated[str, "rows whose text the tokenizer is trained on"] = "full"
    out: Annotated[Path, "folder of the model"] = Path("runs/base")
    fresh: Annotated[bool, "replace another model of this command in --out"] = False
    vocab_size: Annotated[int, "vocabulary size of the tokenizer"] = 4096
    hidden_size: Annotated[int, "width, a multiple of 64"] = 512
    layers: Annotated[int, "decoder layers"] = 1
    seed: Annotated[int, "seed of the weights"] = 0


def main(options: TinyOptions, benchmark: Benchmark) -> Path:
    """The folder of the model; ValueError where it holds something else."""
    out = options.out
    rows = [row for split in (options.split, *benchmark.world_splits) for row in benchmark.rows(split)]
    settings = {name: value for name, value in asdict(options).items() if name not in ("out", "fresh")}
    key = fingerprint([settings, rows])
    clear_leftovers(out.parent, out.name)
    if finished(out / RECORD, key):
        return out
    ours = (out / RECORD).exists()
    if out.exists() and any(out.iterdir()) and not (ours and options.fresh):
        advice = "choose another folder, or replace it by --fresh" if ours else "choose another folder"
        raise ValueError(f"--out {out} holds something other than this model; {advice}")
    tokenizer = train_tokenizer(rows, options.vocab_size)
    model = build_model(len(tokenizer), options.hidden_size, options.layers, special_ids_of(tokenizer), options.seed)
    with renamed_when_done(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_record(folder / RECORD, {"key": key, "settings": settings})
        seal(folder)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    return out


if __name__ == "__main__":
    command_line(PROG, TinyOptions, __doc__, main)
