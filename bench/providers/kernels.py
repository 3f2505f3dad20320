"""Selects a kernel regardless of the tile table, to measure the kernels side by side."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

from torch import Tensor

from bench.providers.base import UnsupportedError
from csrc_triton.tiles import ANY_HIDDEN, PERSISTENT_CANDIDATES, TILES, Tile
from npo_kernels.backends.tiles import find_tile


def in_force(architecture: str, x: Tensor) -> Tile:
    """The tile of a call with hidden states x."""
    return find_tile(TILES, architecture, 8 * x.itemsize, x.shape[-1])


def simple(architecture: str, x: Tensor) -> Tile:
    """`exp_logits_kernel`: a program for each row block and split."""
    return in_force(architecture, x)._replace(loop="")


def persistent(architecture: str, x: Tensor) -> Tile:
    """`exp_logits_persistent_kernel`: a program for each processor."""
    tile = in_force(architecture, x)
    if tile.loop:
        return tile
    candidate = PERSISTENT_CANDIDATES.get((architecture, 8 * x.itemsize, ANY_HIDDEN))
    if candidate is None:
        raise UnsupportedError(f"no persistent tile for {8 * x.itemsize} bits on {architecture}")
    return candidate


@contextmanager
def forced(choose: Callable[[str, Tensor], Tile]) -> Iterator[None]:
    """Makes calls use the tile `choose(architecture, hidden states)`."""
    from npo_kernels.backends.triton import launch

    def tile_for(x: Tensor) -> Tile:
        return choose(launch.architecture(x.device), x)

    with mock.patch.object(launch, "tile_for", tile_for):
        yield


@contextmanager
def forced_pair(tile: Tile) -> Iterator[None]:
    """The same for KL: both of its kernels."""
    from npo_kernels.backends.triton import linear_kl

    with mock.patch.object(linear_kl, "pair_tile", lambda *_: tile):
        yield


@contextmanager
def forced_moments(tile: Tile) -> Iterator[None]:
    """The same for row moments: their tile and its loop."""
    from npo_kernels.backends.triton import moments

    with forced(lambda *_: tile), mock.patch.object(moments, "moment_loop", lambda _: tile.loop):
        yield


KERNELS: dict[str, Callable[[], AbstractContextManager]] = {
    "simple": lambda: forced(simple),
    "persistent": lambda: forced(persistent),
}
