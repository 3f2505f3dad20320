"""The states of a process's random generators: of Python, NumPy, torch, and its device."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class RandomStates(NamedTuple):
    python: Any  # (version, integers, next Gaussian)
    numpy: Any  # (name, keys, position, has a Gaussian, Gaussian)
    cpu: Tensor
    device: Tensor | None  # None where that is the CPU

    @classmethod
    def now(cls, device: torch.device) -> "RandomStates":
        of_device = None if device.type == "cpu" else _get_and_set(device)[0]()
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), of_device)

    def restore(self, device: torch.device) -> None:
        """ValueError if they were saved on another kind of device."""
        if (self.device is None) != (device.type == "cpu"):
            raise ValueError(f"random states: expected those of a process on {device.type}, got those of another one")
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            _get_and_set(device)[1](self.device)

    def save(self, path: Path) -> None:
        """Write a safetensors file, with JSON in its header for what is not an array."""
        name, keys, *rest = self.numpy
        tensors = {"numpy": torch.from_numpy(keys.astype(np.int64)), "cpu": self.cpu}
        if self.device is not None:
            tensors["device"] = self.device
        save_file(tensors, path, {"python": json.dumps(self.python), "numpy": json.dumps([name, *rest])})

    @classmethod
    def load(cls, path: Path) -> "RandomStates":
        with safe_open(path, framework="pt") as file:
            header = {key: json.loads(text) for key, text in file.metadata().items()}
            arrays = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  # it is no dictionary
        version, integers, gauss = header["python"]
        name, *rest = header["numpy"]
        numpy = (name, arrays["numpy"].numpy().astype(np.uint32), *rest)
        return cls((version, tuple(integers), gauss), numpy, arrays["cpu"], arrays.get("device"))


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """A context after which the generators have the states that they had before."""
    states = RandomStates.now(device)
    try:
        yield
    finally:
        states.restore(device)


def _get_and_set(device: torch.device) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """Functions for the generator state of a device other than a CPU. MPS functions take no device."""
    module: Any = torch.get_device_module(device)
    which = {} if device.type == "mps" else {"device": device}
    return partial(module.get_rng_state, **which), partial(module.set_rng_state, **which)
