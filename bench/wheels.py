"""Peers for a GPU machine without a network: their pinned wheels, unpacked and repacked as one archive for each set.

    python -m bench wheels                       # downloads, packs, prints the size and the command for the GPU machine
    python -m bench wheels --set second

Written for a machine with Python 3.12, torch 2.11 for CUDA 13, Triton 3.6 and transformers 5.17 on x86-64 Linux. The
size of an upload to it is limited (--limit_mb), including the files of this checkout without training/results, and the
wheel of the compiler of the CuTe kernels alone is 84 MiB. So the archive is an xz archive of the installed files
without those that are never opened, and there are two sets; the first has the peers of the target table. Packing a set
takes minutes; existing archives are kept.

Nothing is installed on the GPU machine: the archive is unpacked into a folder on PYTHONPATH. The folder has to be
called site-packages: QuACK uses this name to recognise library code, and its import fails otherwise. The packages of
CuTe's compiler are in a subfolder that pip would add with a .pth file; PYTHONPATH names it explicitly.
"""

import argparse
import fnmatch
import io
import json
import lzma
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import provenance

HELP = "pack the peers that a GPU machine without a network lacks"
MIB = 2**20
ROOT = Path(__file__).parents[1]
PYTHON = "3.12"
PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2014", "2_12", "2010", "1")  # of manylinux; pip matches each literally
CUTE_PACKAGES = "nvidia_cutlass_dsl/dsl_packages"
TILE_COMPILER = "nvidia/cu13/bin"
LEFT_BEHIND = "training/results"  # figures and tables: no stage of certify reads them, and they are most of a checkout


@dataclass(frozen=True)
class Wheel:
    """`only`: patterns of the files to pack, if not all are needed; metadata is always packed."""

    name: str
    version: str
    why: str
    only: tuple[str, ...] = ("*",)
    source: bool = False  # has no published wheel, but one can be built

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"


LIGER = Wheel("liger-kernel", "0.8.5", "Liger: Triton, CuTe and cuTile cross-entropy; DPO and KTO")
SETS = {
    "first": (
        Wheel("quack-kernels", "0.6.5", "QuACK: the fastest scalar cross-entropy; asks for CuTe's compiler >= 4.7"),
        LIGER,
        Wheel("nvidia-cutlass-dsl", "4.7.1", "CuTe's compiler, of QuACK and of Liger's Hopper kernels"),
        Wheel("nvidia-cutlass-dsl-libs-base", "4.7.1", "the same: what any CUDA needs"),
        Wheel("nvidia-cutlass-dsl-libs-core", "4.7.1", "the same: its Python part"),
        # The package names libs-cu12 as its default; either does, and 4.8.1 is 4 MiB more.
        Wheel(
            "nvidia-cutlass-dsl-libs-cu13",
            "4.7.1",
            "the same: the compiler itself",
            only=("*/_mlir/*", "*/cu13/lib/*"),
        ),
        Wheel("apache-tvm-ffi", "0.1.15.post2", "how QuACK launches", only=("tvm_ffi/*.py", "tvm_ffi/*.so")),
        Wheel("trl", "1.16.0", "TRL: chunked log-probabilities"),
        Wheel("datasets", "5.2.0", "TRL imports it, in the backward at the latest"),
        Wheel("dill", "0.4.1", "datasets imports it", only=("dill/*",)),
        Wheel("multiprocess", "0.70.19", "datasets imports it", only=("multiprocess/*.py", "_multiprocess/*.py")),
        Wheel("cut-cross-entropy", "25.1.1", "Cut Cross Entropy, the last release"),
    ),
    "second": (
        LIGER,
        Wheel("cuda-tile", "1.7.0", "Liger's cuTile kernels; asks for a compiler of CUDA 13.2 to 13.4"),
        Wheel("nvidia-cuda-tileiras", "13.4.92", "its compiler", only=("*/bin/tileiras",)),
        Wheel("nvidia-nvvm", "13.4.92", "which loads this, of its own version", only=("*/lib/libnvvm.so*",)),
        Wheel("nvidia-cuda-nvcc", "13.4.92", "and runs this", only=("*/bin/ptxas",)),
        Wheel("rouge-score", "0.1.2", "scores of the training demo", source=True),
        Wheel("nltk", "3.10.4", "rouge-score imports it"),
        Wheel("defusedxml", "0.7.1", "nltk imports it"),
        Wheel("tyro", "1.0.17", "command lines of training"),
        Wheel("docstring-parser", "0.18.0", "tyro imports it"),
        Wheel("typeguard", "4.6.1", "tyro imports it"),
    ),
}
# Required by their metadata and left out: torch 2.11 exports tensors by itself, and these packages end with torch 2.9.
NOT_NEEDED = {"torch-c-dlpack-ext": "quack-kernels", "nvidia-cutlass-dsl-libs-cu12": "nvidia-cutlass-dsl"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path(".wheels"), metavar="DIR", help="default .wheels, not committed"
    )
    parser.add_argument("--set", nargs="+", default=list(SETS), choices=SETS, dest="sets", help="default: both")
    parser.add_argument("--limit_mb", type=float, default=64, help="MiB that travel in one go; default 64")
    parser.add_argument("--site", default="/tmp", metavar="DIR", help="over there: what gets a folder site-packages")
    parser.add_argument("--budget", type=float, default=420, metavar="SECONDS", help="over there: of certify")
    parser.add_argument("--results", default="$OUT", metavar="DIR", help="over there: --out of certify; default $OUT")
    parser.add_argument("--list", action="store_true", help="print the pins, and stop")


def main(args: argparse.Namespace) -> int:
    if args.list:
        Console().print(pins(args.sets))
        return 0
    checkout, too_large = tracked_bytes(ROOT), []
    for name in args.sets:
        try:
            archive = pack(SETS[name], args.out, name)
        except subprocess.CalledProcessError as error:
            print(f"bench wheels: pip could not get a wheel: {error.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return 1
        total = (archive.stat().st_size + checkout) / MIB
        size = f"{archive.stat().st_size / MIB:.1f} MiB, with the checkout {total:.1f} MiB"
        print(f"{name}: {archive} {size} (leave {LEFT_BEHIND} behind; certify does not need it)")
        print(f"    {command(name, archive, args)}")
        if total > args.limit_mb:
            too_large.append(f"{name} is {total - args.limit_mb:.1f} MiB over the {args.limit_mb:g} that travel")
    print("\n".join(too_large), file=sys.stderr, end="\n" if too_large else "")
    return 1 if too_large else 0


def pins(sets: Iterable[str]) -> Table:
    table = Table("set", "wheel", "why")
    for name in sets:
        for wheel in SETS[name]:
            table.add_row(name, wheel.pin, wheel.why)
    return table


def command(name: str, archive: Path, args: argparse.Namespace) -> str:
    """The command for the GPU machine, in the checkout. The second set is for the peers only."""
    site = shlex.quote(f"{args.site}/site-packages")
    unpack = f"python3 -m tarfile --filter data -e {shlex.quote(archive.as_posix())} {site}"
    variables = f"PYTHONPATH={site}:{site}/{CUTE_PACKAGES} PATH={site}/{TILE_COMPILER}:$PATH"
    stages = "" if name == "first" else " --only peers"
    options = f"--budget {args.budget:g} --commit {provenance.commit()}{stages}"  # without the history
    return f'{unpack} && {variables} python3 -m bench certify {options} --out "{args.results}"'


def pack(wheels: Iterable[Wheel], out: Path, name: str) -> Path:
    """out/name.tar.xz of these wheels; an existing archive of the same wheels is kept."""
    wheels = tuple(wheels)
    archive, recipe = out / f"{name}.tar.xz", out / f"{name}.json"
    wanted = json.dumps([asdict(wheel) for wheel in wheels], indent=1)
    if archive.exists() and recipe.exists() and recipe.read_text() == wanted:
        return archive
    files = [member for wheel in wheels for member in members(download(wheel, out / "cache"), wheel.only)]
    unfinished = archive.with_suffix(".part")
    compress(files, unfinished)
    unfinished.replace(archive)
    recipe.write_text(wanted)
    return archive


def download(wheel: Wheel, cache: Path) -> Path:
    """The wheel for the GPU machine, from the cache if it is there."""
    found = list(cache.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"))
    if found:
        return found[0]
    cache.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if wheel.source:
        order = [*pip, "wheel", "--no-deps", "--wheel-dir", str(cache), wheel.pin]
    else:
        platforms = [option for number in PLATFORMS for option in ("--platform", f"manylinux{_tag(number)}_x86_64")]
        order = [
            *pip,
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--implementation=cp",
            "--python-version",
            PYTHON,
        ]
        order += [*platforms, "--dest", str(cache), wheel.pin]
    print(f"downloading {wheel.pin}", flush=True)
    subprocess.run(order, check=True, capture_output=True, text=True)
    return download(wheel, cache)


def _tag(number: str) -> str:
    return f"_{number}" if "_" in number else number


def members(wheel: Path, only: tuple[str, ...]) -> Iterator[tuple[str, int, bytes]]:
    """(path, mode, contents) of the packed files, without stubs for other systems and scripts of a `.data` folder."""
    with zipfile.ZipFile(wheel) as file:
        for info in file.infolist():
            metadata = info.filename.endswith((".dist-info/METADATA", ".dist-info/RECORD"))
            chosen = metadata or any(fnmatch.fnmatchcase(info.filename, pattern) for pattern in only)
            if info.is_dir() or not chosen or ".data/" in info.filename or "/stubs/" in info.filename:
                continue
            yield info.filename, (info.external_attr >> 16) & 0o777 or 0o644, file.read(info)


def compress(files: Iterable[tuple[str, int, bytes]], archive: Path) -> None:
    """Machine code goes through a branch filter, which saves 10 %. Equal contents give equal bytes."""
    files = sorted(files, key=lambda member: (Path(member[0]).suffix, member[0]))
    window = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 128 * MIB}
    with (
        lzma.open(archive, "wb", filters=[{"id": lzma.FILTER_X86}, window]) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for path, mode, contents in files:
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(contents), mode
            tar.addfile(entry, io.BytesIO(contents))


def tracked_bytes(root: Path) -> int:
    """Bytes of the files in git without LEFT_BEHIND, which are uploaded with the archive."""
    order = ["git", "ls-files", "-z", "--", ".", f":(exclude){LEFT_BEHIND}"]
    listed = subprocess.run(order, cwd=root, check=True, capture_output=True, text=True).stdout
    return sum(path.stat().st_size for name in listed.split("\0") if name and (path := root / name).is_file())
