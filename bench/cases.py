"""Inputs of a case: hidden states, head and labels of a given shape and kind, the same for every provider."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.objectives import OBJECTIVES
from npo_kernels import sequence_logprobs

IGNORED = -100
MODES = ("full", "frozen", "logprobs")  # gradients of hidden states and head, of hidden states alone, of nothing
SPREAD = 2.0  # standard deviation of the logits of the random part of a row
TARGET_LOGIT = {"random": 0.0, "peaked": 30.0, "forgotten": -40.0}  # added to the logit of the label


class Head(NamedTuple):
    """The lm-head of a model."""

    H: int
    V: int
    softcap: float | None = None


HEADS = {
    "llama-3-8b": Head(4096, 128256),
    "llama-3.2-1b": Head(2048, 128256),
    "llama-2-7b": Head(4096, 32000),
    "qwen2.5-7b": Head(3584, 152064),
    "gemma-2-2b": Head(2304, 256000, softcap=30.0),
    "smollm2-135m": Head(576, 49152),
    "toy": Head(32, 1000),
    "toy-softcap": Head(48, 768, softcap=30.0),
}


@dataclass(frozen=True, repr=False)
class Batch:
    """The tensors of a call. Labels are already shifted: position t is scored on labels[t]."""

    hidden: Tensor  # (B, S, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (B, S) int64, IGNORED where nothing is scored
    ref_hidden: Tensor  # (B, S, H) of a reference model with the same head, for providers that run one
    ref_logps: Tensor  # (B,) its log-probabilities, for providers that cache them
    softcap: float | None = None
    num_forget: int = 0  # the first sequences are forgotten, the others retained
    mode: str = "full"

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B S, H), weight, labels (B S,): views."""
        return self.hidden.flatten(0, 1), self.weight, self.labels.flatten()

    @property
    def num_tokens(self) -> Tensor:
        return (self.labels != IGNORED).sum(1)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that gradients are computed for."""
        return [t for t in (self.hidden, self.weight) if t.requires_grad]

    def objective(self, computes: str, logps: Tensor) -> Tensor:
        """The scalar `computes` of the sequence log-probabilities (B,)."""
        return OBJECTIVES[computes](logps, self.num_tokens, self.ref_logps.to(logps.dtype), self.num_forget)

    def for_mode(self, mode: str, dtype: torch.dtype | None = None) -> "Batch":
        """Fresh leaves on the same memory (or rounded to `dtype`), requiring the gradients of the mode."""
        hidden, weight = (t.detach().to(dtype or t.dtype) for t in (self.hidden, self.weight))
        return replace(
            self,
            hidden=hidden.requires_grad_(mode != "logprobs"),
            weight=weight.requires_grad_(mode == "full"),
            mode=mode,
        )


@dataclass(frozen=True)
class Case:
    """`lengths[s]` = (ignored, scored) positions of sequence s; the last `retain` sequences are retained."""

    name: str
    head: Head
    lengths: tuple[tuple[int, int], ...]
    retain: int = 0
    data: str = "random"

    @property
    def N(self) -> int:
        """Scored tokens."""
        return sum(scored for _, scored in self.lengths)

    @property
    def B(self) -> int:
        return len(self.lengths)

    @property
    def shape(self) -> dict[str, int]:
        return {"N": self.N, "H": self.head.H, "V": self.head.V, "B": self.B}

    def batch(self, dtype: torch.dtype, device: str, mode: str = "full", seed: int = 0) -> Batch:
        """Random hidden states and head; the reference is 0.1 standard deviations away from the policy."""
        H, V, softcap = self.head
        longest = max(ignored + scored for ignored, scored in self.lengths)
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        weight = draw(V, H).mul_(SPREAD / H**0.5).to(dtype)
        labels = torch.randint(V, (self.B, longest), generator=generator, device=device)
        hidden = draw(self.B, longest, H)
        if TARGET_LOGIT[self.data]:
            rows = weight[labels].float()
            hidden += TARGET_LOGIT[self.data] * rows / rows.square().sum(-1, keepdim=True)
        ref_hidden = (hidden + 0.1 * draw(self.B, longest, H)).to(dtype)
        labels = self._mask(labels)
        ref_logps, _ = sequence_logprobs(ref_hidden, weight, labels, shift=False, softcap=softcap, impl="torch")
        batch = Batch(hidden.to(dtype), weight, labels, ref_hidden, ref_logps, softcap, self.B - self.retain)
        return batch.for_mode(mode)

    def unfilled(self, dtype: torch.dtype, device: str, mode: str = "full") -> Batch:
        """The same shapes and scored positions in uninitialised tensors: enough for a plan, at no cost."""
        H, V, softcap = self.head
        longest = max(ignored + scored for ignored, scored in self.lengths)
        hidden = torch.empty(self.B, longest, H, dtype=dtype, device=device)
        weight = torch.empty(V, H, dtype=dtype, device=device)
        labels = self._mask(torch.zeros(self.B, longest, dtype=torch.int64, device=device))
        ref_logps = torch.zeros(self.B, device=device)
        return Batch(hidden, weight, labels, hidden, ref_logps, softcap, self.B - self.retain).for_mode(mode)

    def _mask(self, labels: Tensor) -> Tensor:
        """Nothing is scored outside of `lengths`."""
        position = torch.arange(labels.shape[1], device=labels.device)
        ignored, scored = torch.tensor(self.lengths, device=labels.device).T.unsqueeze(-1)  # (B, 1) each
        return labels.masked_fill((position < ignored) | (position >= ignored + scored), IGNORED)


def even(name: str, head: Head, N: int, B: int, data: str = "random") -> Case:
    """N scored tokens in B sequences of equal length, nothing ignored."""
    return Case(name, head, ((0, N // B),) * B, data=data)


def head_case(model: str, N: int, length: int = 256, data: str = "random") -> Case:
    """N tokens at the head of a model, in sequences of `length`."""
    return even(f"{model}/N={N}", HEADS[model], N, max(1, N // length), data)


# Shape R of the design, at which the targets are stated.
R = head_case("llama-3-8b", 8192)
