"""A model from nothing, in a folder as transformers saves it: for machines without a GPU or without a hub.

    python -m training.tiny --data_dir path/to/tofu --out runs/base

A Llama with random weights and tied embeddings, and a byte-level BPE tokenizer trained on the text of --split, the real
authors and the world facts. It knows nothing: fine-tune it with --preset tiny, and with --world for what the evaluation
asks about the world.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from training.command import command_line
from training.data import HUB, load_rows, train_tokenizer
from training.model import build_model, special_ids_of
from training.stages import renamed_when_done

PROG = "training.tiny"


@dataclass(frozen=True)
class TinyOptions:
    data_dir: Annotated[str, "folder with TOFU's JSON lines, or a data set of the hub"] = HUB
    split: Annotated[str, "rows whose text the tokenizer is trained on"] = "full"
    out: Annotated[Path, "folder of the model"] = Path("runs/base")
    vocab_size: Annotated[int, "entries of the tokenizer"] = 4096
    hidden_size: Annotated[int, "width, a multiple of 64"] = 512
    layers: Annotated[int, "decoder layers"] = 1
    seed: Annotated[int, "of the weights"] = 0


def main(options: TinyOptions) -> None:
    rows = [
        row for split in (options.split, "real_authors", "world_facts") for row in load_rows(options.data_dir, split)
    ]
    tokenizer = train_tokenizer(rows, options.vocab_size)
    model = build_model(len(tokenizer), options.hidden_size, options.layers, special_ids_of(tokenizer), options.seed)
    with renamed_when_done(options.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    command_line(PROG, TinyOptions, __doc__, main)
