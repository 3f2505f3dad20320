"""Select the entry of `csrc_triton.tiles` for a call, by GPU architecture, operand width and hidden size.

The number of rows has no influence: otherwise the log-probability of a row would depend on its batch.

The entries of one architecture form a row of the table. A GPU whose architecture has no row uses the row of another
architecture, chosen by compute capability and shared memory, and a warning says so.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import torch

from csrc_triton.tiles import ANY_HIDDEN, HIDDEN_BUCKETS, PAIR_TILES, TILES, Tile

Table = Mapping[tuple[str, int, int], Tile]
Entry = TypeVar("Entry")

KIB = 1024
BARRIERS = 64  # bytes of shared memory for the barriers of asynchronous loads (NVIDIA)


def hidden_bucket(hidden_size: int) -> int:
    """The smallest bucket that is not below this hidden size, or the largest bucket."""
    return next((bucket for bucket in HIDDEN_BUCKETS if hidden_size <= bucket), HIDDEN_BUCKETS[-1])


def find_tile(table: Table, architecture: str, bits: int, hidden_size: int) -> Tile:
    """The entry of the hidden size's bucket, or the ANY_HIDDEN entry if it has none; KeyError without either."""
    found = find_entry(table, architecture, bits, hidden_size)
    if found is None:
        raise KeyError((architecture, bits, ANY_HIDDEN))
    return found


def find_entry(
    table: Mapping[tuple[str, int, int], Entry], architecture: str, bits: int, hidden_size: int
) -> Entry | None:
    """The same for a table with any kind of entry; None without either."""
    found = table.get((architecture, bits, hidden_bucket(hidden_size)))
    return table.get((architecture, bits, ANY_HIDDEN)) if found is None else found


class Gpu(NamedTuple):
    """The properties of a GPU that select its row."""

    name: str
    architecture: str  # "sm_75", "gfx90a"
    shared_memory: int  # bytes, per program at most

    def __str__(self) -> str:
        major, minor = capability(self.architecture)
        generation = self.architecture if _is_amd(self.architecture) else f"capability {major}.{minor}"
        return f"{self.name!r} ({generation}, {self.shared_memory // KIB} KiB of shared memory)"


class Row(NamedTuple):
    """The row of the tile table that a device uses."""

    architecture: str
    own: str  # the row that measurements on this device are entered in
    note: str = ""  # why the two differ, if they do
    warning: str = ""  # the same as a message for the user: which tiles are used, why, and what to do


def tile_row(device: torch.device) -> Row:
    """The row of the tile table that a device uses."""
    if device.type == "cpu":
        return Row("interpreter", "interpreter")
    return row_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def row_of_gpu(index: int) -> Row:
    """The row for a GPU; warns (once per GPU) if it belongs to another architecture."""
    found = torch.cuda.get_device_properties(index)
    name = found.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
    # ROCm has no opt-in limit; older torch releases do not report the ordinary one, which is 64 KiB on AMD GPUs
    ordinary = getattr(found, "shared_memory_per_block", 64 * KIB)
    gpu = Gpu(found.name, name, getattr(found, "shared_memory_per_block_optin", ordinary))
    row = choose_row(gpu, (TILES, PAIR_TILES))
    if row.warning:
        warnings.warn(row.warning, stacklevel=2)
    return row


def choose_row(gpu: Gpu, tables: Sequence[Table]) -> Row:
    """The row of the GPU's own architecture, if there is one.

    Otherwise, of the rows of the same vendor, the newest that is not newer than the GPU and fits its shared memory. If
    there is none of these either, the row that needs the least shared memory.
    """
    known = set.intersection(*({architecture for architecture, *_ in table} for table in tables))
    for own in (gpu.architecture, architecture_of_row(gpu.architecture)):
        if own in known:
            return Row(own, own)
    vendor = [architecture for architecture in known if _is_vendors(architecture, gpu.architecture)]
    needs = {architecture: _largest_need(architecture, tables) for architecture in vendor}
    fitting = [
        architecture
        for architecture, need in needs.items()
        if need <= gpu.shared_memory and capability(architecture) <= capability(gpu.architecture)
    ]
    if fitting:
        chosen = max(fitting, key=capability)
        why = "the newest that are not made for a newer GPU and fit its shared memory"
    else:
        chosen = min(vendor, key=lambda architecture: (needs[architecture], capability(architecture)))
        why = "which need the least shared memory: none that are made for a GPU as old fit"
    note = f"no row for {gpu}"
    taken = f"csrc_triton/tiles.py has {note}. It takes the tiles of {chosen}, {why}."
    advice = "They were not measured on it: `python -m bench tune` finds the fastest."
    return Row(chosen, gpu.architecture, note, f"{taken} {advice}")


def capability(architecture: str) -> tuple[int, int]:
    """(major, minor): (7, 5) for sm_75, (9, 0) for gfx90a, whose last character is the stepping."""
    digits = architecture.removeprefix("gfx")[:-1] if _is_amd(architecture) else architecture.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


def architecture_of_row(architecture: str) -> str:
    """The architecture that shares its row with this one.

    From sm_90 on it is the first of the same major capability. sm_89 uses the row of sm_86, whose limits it has;
    tests/aot compiles for both.
    """
    if _is_amd(architecture):
        return architecture
    major, _ = capability(architecture)
    return f"sm_{major}0" if major >= 9 else {"sm_89": "sm_86"}.get(architecture, architecture)


def shared_memory(tile: Tile, itemsize: int, models: int = 1) -> int:
    """Upper bound of the bytes of shared memory that a program needs.

    They hold the operands of every stage of the loop over H (for `models` models at once in a persistent program), and
    in a persistent program also the piece of the tile that it converts while the next loads are in flight. tests/aot
    records what the compilers actually use.
    """
    operands = tile.num_stages * (tile.block_n + tile.block_v) * tile.block_h * (models if tile.loop else 1)
    return itemsize * (operands + (tile.block_n * tile.block_v // tile.pieces if tile.loop else 0))


def _largest_need(architecture: str, tables: Sequence[Table]) -> int:
    """Bytes of shared memory that suffice for every tile of a row."""
    tiles = [
        (tile, key[1] // 8, models)
        for models, table in enumerate(tables, 1)  # TILES hold one model, PAIR_TILES two
        for key, tile in table.items()
        if key[0] == architecture
    ]
    barriers = 0 if _is_amd(architecture) else BARRIERS
    return max(shared_memory(*needs) for needs in tiles) + barriers


def _is_amd(architecture: str) -> bool:
    return architecture.startswith("gfx")


def _is_vendors(architecture: str, other: str) -> bool:
    """Whether `architecture` is a GPU of the same vendor as `other`."""
    return architecture.startswith(("gfx", "sm_")) and _is_amd(architecture) == _is_amd(other)
