"""Write fictitious authors in TOFU's layout: question and answer pairs that no model has seen before.

    python -m training.authors --out DIR --authors 200 --seed 0

The folder is read like TOFU's (`training.benchmarks.tofu.authors` describes the files): full, every forgetXX and
retainYY that consists of whole authors, real_authors, world_facts, *_perturbed for the evaluation, and idontknow.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from training.benchmarks.tofu.authors import json_lines, tofu_files
from training.benchmarks.tofu.data import load_refusals
from training.commands.options import command_line
from training.store import write_texts

PROG = "training.authors"


@dataclass(frozen=True)
class AuthorsOptions:
    """The files."""

    out: Annotated[Path | None, "folder for the JSON lines"] = None
    fresh: Annotated[bool, "overwrite existing files whose content differs"] = False
    authors: Annotated[int, "number of authors, 20 pairs each; TOFU has 200"] = 200
    seed: Annotated[int, "the same seed gives the same files"] = 0


def main(options: AuthorsOptions) -> None:
    if options.out is None:
        raise ValueError("expected --out DIR, a folder for the files; see --help")
    files = tofu_files(options.authors, options.seed)
    write_texts(options.out, json_lines(files) | {"idontknow.jsonl": "\n".join(load_refusals())}, options.fresh)
    print(f"{options.out}: {', '.join(sorted(files))}, idontknow")


if __name__ == "__main__":
    command_line(PROG, AuthorsOptions, __doc__, main)
