"""Which entry of `csrc_triton.tiles` a call takes: of its architecture, the width of its operands, its hidden size.

Never of the number of rows, which would let the log-probability of a row depend on its batch.

Entries of one architecture are a row of the table. A GPU whose architecture has none takes another's, chosen from what
is known of the GPU, and the user is told.
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
BARRIERS = 64  # bytes, of asynchronous loads (NVIDIA)


def hidden_bucket(hidden_size: int) -> int:
    """The hidden size that stands for this one: the next bucket, or the last."""
    return next((bucket for bucket in HIDDEN_BUCKETS if hidden_size <= bucket), HIDDEN_BUCKETS[-1])


def find_tile(table: Table, architecture: str, bits: int, hidden_size: int) -> Tile:
    """What was measured for the bucket of the hidden size, or what holds for every one that was not."""
    found = find_entry(table, architecture, bits, hidden_size)
    if found is None:
        raise KeyError((architecture, bits, ANY_HIDDEN))
    return found


def find_entry(
    table: Mapping[tuple[str, int, int], Entry], architecture: str, bits: int, hidden_size: int
) -> Entry | None:
    """The same of any table; None where it has neither."""
    found = table.get((architecture, bits, hidden_bucket(hidden_size)))
    return table.get((architecture, bits, ANY_HIDDEN)) if found is None else found


class Gpu(NamedTuple):
    """What the choice of a row needs to know."""

    name: str
    architecture: str  # "sm_75", "gfx90a"
    shared_memory: int  # bytes that one program may have

    def __str__(self) -> str:
        major, minor = capability(self.architecture)
        generation = self.architecture if _is_amd(self.architecture) else f"capability {major}.{minor}"
        return f"{self.name!r} ({generation}, {self.shared_memory // KIB} KiB of shared memory)"


class Row(NamedTuple):
    """The row of the tile table that a device takes."""

    architecture: str
    own: str  # the row that a measurement on the device belongs in
    note: str = ""  # why the two differ, if they do
    warning: str = ""  # the same for a user: which tiles, why, and what to do


def tile_row(device: torch.device) -> Row:
    """The row of the tile table that a device takes."""
    if device.type == "cpu":
        return Row("interpreter", "interpreter")
    return row_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def row_of_gpu(index: int) -> Row:
    """That of a GPU, with a warning, once, if it is another architecture's."""
    found = torch.cuda.get_device_properties(index)
    name = found.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
    # ROCm has no limit to opt in to; older releases do not say the other, which is 64 KiB on their GPUs
    ordinary = getattr(found, "shared_memory_per_block", 64 * KIB)
    gpu = Gpu(found.name, name, getattr(found, "shared_memory_per_block_optin", ordinary))
    row = choose_row(gpu, (TILES, PAIR_TILES))
    if row.warning:
        warnings.warn(row.warning, stacklevel=2)
    return row


def choose_row(gpu: Gpu, tables: Sequence[Table]) -> Row:
    """The row of its architecture; without one, of its vendor's the newest that is not newer than it and fits its
    shared memory; if there is none, the one that needs the least.
    """
    known = set.intersection(*({architecture for architecture, *_ in table} for table in tables))
    for own in (gpu.architecture, first_of_kind(gpu.architecture)):
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
    """(major, minor): (7, 5) of sm_75, (9, 0) of gfx90a, whose last digit is the stepping."""
    digits = architecture.removeprefix("gfx")[:-1] if _is_amd(architecture) else architecture.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


def first_of_kind(architecture: str) -> str:
    """The architecture whose row is this one's as well.

    From sm_90 on the first of its major capability. sm_89 has the limits of sm_86; tests/aot compiles for both.
    """
    if _is_amd(architecture):
        return architecture
    major, _ = capability(architecture)
    return f"sm_{major}0" if major >= 9 else {"sm_89": "sm_86"}.get(architecture, architecture)


def shared_memory(tile: Tile, itemsize: int, models: int = 1) -> int:
    """Bytes that a program needs at most: the operands of every stage of the loop over H, of as many models as a
    persistent program multiplies at once, and a piece of the tile that it rearranges while the next loads are under
    way. tests/aot has what the compilers take.
    """
    operands = tile.num_stages * (tile.block_n + tile.block_v) * tile.block_h * (models if tile.loop else 1)
    return itemsize * (operands + (tile.block_n * tile.block_v // tile.pieces if tile.loop else 0))


def _largest_need(architecture: str, tables: Sequence[Table]) -> int:
    """Bytes of shared memory that every tile of a row fits in."""
    tiles = [
        (tile, key[1] // 8, models)
        for models, table in enumerate(tables, 1)  # of one model, of a pair
        for key, tile in table.items()
        if key[0] == architecture
    ]
    barriers = 0 if _is_amd(architecture) else BARRIERS
    return max(shared_memory(*needs) for needs in tiles) + barriers


def _is_amd(architecture: str) -> bool:
    return architecture.startswith("gfx")


def _is_vendors(architecture: str, other: str) -> bool:
    """Whether both are GPUs of one vendor."""
    return architecture.startswith(("gfx", "sm_")) and _is_amd(architecture) == _is_amd(other)
