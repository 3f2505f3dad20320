"""What a provider is: a name, where it comes from, what it computes, and the function that does it.

Peers are imported inside these functions, so an absent peer only leads to a row with the status "missing". All get the
same batch and with it the same gradient at the log-probabilities: for providers of token log-probabilities the NPO loss
is applied outside, by autograd; one that can only compute cross-entropy does so and is marked accordingly.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Batch


class UnsupportedError(Exception):
    """The provider has no way to do this case; the message says what it lacks."""


@dataclass(frozen=True)
class Provider:
    """`loss(batch)` is the scalar whose gradients are taken, `logprobs(batch)` the (B,) sums or None."""

    name: str
    package: str  # the distribution whose version is recorded
    computes: str
    exact: bool
    loss: Callable[[Batch], Tensor] | None
    logprobs: Callable[[Batch], Tensor] | None = None
    setting: Callable[[], AbstractContextManager] = nullcontext  # around forward and backward
    compiles: bool = False  # its first turn takes much longer than the others

    def run(self, batch: Batch) -> Tensor:
        """The forward of the mode of the batch."""
        function, what = (self.logprobs, "log-probabilities") if batch.mode == "logprobs" else (self.loss, "a loss")
        if function is None:
            raise UnsupportedError(f"{self.name} does not give {what}")
        return function(batch)

    def step(self, batch: Batch) -> object:
        """Forward, and the gradients of the mode."""
        with self.setting():
            if batch.mode == "logprobs":
                with torch.no_grad():
                    return self.run(batch)
            return torch.autograd.grad(self.run(batch), batch.leaves)


def from_tokens(name: str, package: str, tokens: Callable[[Batch], Tensor], exact: bool = True) -> Provider:
    """A provider of token log-probabilities (B, S), 0 where nothing is scored, differentiable with any upstream."""

    def logprobs(batch: Batch) -> Tensor:
        return tokens(batch).float().sum(1)

    def loss(batch: Batch) -> Tensor:
        return batch.objective("npo", logprobs(batch))

    return Provider(name, package, "npo", exact, loss, logprobs)


def without_softcap(batch: Batch, name: str) -> None:
    if batch.softcap is not None:
        raise UnsupportedError(f"{name} has no softcap")


def on_gpu(batch: Batch, name: str) -> None:
    """Called before a GPU-only peer is imported, as its own errors on a CPU are unclear."""
    if not batch.hidden.is_cuda:
        raise UnsupportedError(f"{name} needs a GPU")


def on_hopper(batch: Batch, name: str) -> None:
    """The same for peers written for sm_90 and bfloat16 only."""
    on_gpu(batch, name)
    if not is_hopper(batch):
        raise UnsupportedError(f"{name} needs a Hopper GPU")
    if batch.hidden.dtype != torch.bfloat16:
        raise UnsupportedError(f"{name} takes bfloat16 alone")


def is_hopper(batch: Batch) -> bool:
    return batch.hidden.is_cuda and torch.cuda.get_device_capability(batch.hidden.device) == (9, 0)


def accumulator(batch: Batch) -> torch.dtype | None:
    """float32 for the sums of 16-bit gradients, if a peer has that option."""
    return torch.float32 if batch.hidden.dtype in (torch.bfloat16, torch.float16) else None
