"""Write generated data in the file layout of a benchmark, for machines without access to the hub.

    python -m training.generate --benchmark muse --out data/muse
    python -m training.generate --benchmark wmdp --out data/wmdp

The folder is read like the published data. `--data_dir demo` uses the same data without a folder.
`training.authors` writes any number of fictitious authors in TOFU's layout.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from training.benchmarks import BENCHMARKS, Benchmark
from training.commands.options import command_line
from training.store import write_texts

PROG = "training.generate"


@dataclass(frozen=True)
class GenerateOptions:
    """The files."""

    benchmark: Annotated[str, lambda: f"benchmark whose files are written: {', '.join(BENCHMARKS)}"] = "tofu"
    out: Annotated[Path | None, "folder for the files"] = None
    fresh: Annotated[bool, "overwrite existing files whose content differs"] = False


def main(options: GenerateOptions, benchmark: Benchmark) -> None:
    if options.out is None:
        raise ValueError("expected --out DIR, a folder for the files; see --help")
    files = benchmark.demo_files()
    write_texts(options.out, files, options.fresh)
    print(f"{options.out}: {', '.join(sorted(files))}")


if __name__ == "__main__":
    command_line(PROG, GenerateOptions, __doc__, main)
