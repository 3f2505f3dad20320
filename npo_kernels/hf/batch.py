"""Determine the sequences of a batch from the keyword arguments of a Hugging Face forward.

| arguments                                              | batch                                                 |
|--------------------------------------------------------|-------------------------------------------------------|
| (B, S), with or without attention_mask                 | padded: B sequences                                   |
| (1, T) and cu_seqlens (B+1,), or cu_seq_lens_q         | packed: B sequences, empty ones allowed               |
| (1, T), position_ids that restart, no attention_mask   | packed, as transformers itself reads position_ids     |
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_kernels.call.checks import check_cu_seqlens
from npo_kernels.call.rules import integer, tensor


@dataclass(frozen=True)
class HeadBatch:
    """Labels and layout in the form that the functions of `npo_kernels` take."""

    labels: Tensor  # (B, S), or (T,) with cu_seqlens
    shift: bool
    cu_seqlens: Tensor | None  # (B+1,) int32
    ignore_index: int

    def rows(self, hidden: Tensor) -> Tensor:
        """The model's hidden states (B, S, H) in this layout: (T, H) if packed."""
        return hidden if self.cu_seqlens is None else hidden.flatten(0, 1)

    @property
    def options(self) -> dict[str, Tensor | int | None]:
        return {"shift": self.shift, "cu_seqlens": self.cu_seqlens, "ignore_index": self.ignore_index}


def take_batch(kwargs: dict[str, Any]) -> HeadBatch:
    """Take labels and layout out of `kwargs`. Adds missing `position_ids`, so that attention uses the same layout."""
    labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    cu_seqlens, ignore_index = kwargs.pop("cu_seqlens", None), kwargs.pop("ignore_index", -100)
    shift = shift_labels is None
    labels = labels if shift else shift_labels
    if labels is None:
        raise ValueError(
            "fused_unlearning scores labels and got none: pass labels=, or shift_labels= if already shifted"
        )
    tensor("labels" if shift else "shift_labels", labels)
    integer("ignore_index", ignore_index)
    if labels.dim() != 2:
        raise ValueError(f"labels: expected (B, S), or (1, T) for a packed batch, got {tuple(labels.shape)}")
    cu_seqlens = kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
    position_ids, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if cu_seqlens is not None:
        _check_packed(labels, cu_seqlens, mask)
        if position_ids is None:  # without them, attention would cross sequence boundaries
            kwargs["position_ids"] = _positions(cu_seqlens, labels.shape[1])[None]
        cu_seqlens = cu_seqlens.int()
    elif position_ids is not None and position_ids.dim() == 2 and mask is None:
        cu_seqlens = _boundaries(position_ids, labels.shape)
    if cu_seqlens is not None:
        labels = labels.flatten()
    return HeadBatch(labels, shift, cu_seqlens, ignore_index)


def _check_packed(labels: Tensor, cu_seqlens: Tensor, mask: object) -> None:
    tensor("cu_seqlens", cu_seqlens)
    check_cu_seqlens(cu_seqlens)
    if cu_seqlens.device != labels.device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device} but labels is on {labels.device}: move them to one device"
        )
    if labels.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens is for a packed batch (1, T), got labels {tuple(labels.shape)}: drop cu_seqlens of a padded "
            "batch, or concatenate its sequences into one row"
        )
    if mask is not None:
        raise ValueError(
            "a packed batch with cu_seqlens takes no attention_mask: a mask makes transformers read the row as one "
            "sequence, and attention crosses the boundaries; drop it"
        )


def _positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """(T,) position of each token within its sequence."""
    index = torch.arange(total, device=cu_seqlens.device)
    starts = cu_seqlens[:-1].long()
    return index - starts[torch.bucketize(index, cu_seqlens[1:].long(), right=True).clamp(max=len(starts) - 1)]


def _boundaries(position_ids: Tensor, shape: torch.Size) -> Tensor | None:
    """(B+1,) int32 cu_seqlens of the flattened rows, or None if each row is one sequence.

    A sequence starts at the start of each row and wherever a position is not the previous one plus 1; transformers
    builds its attention masks by the same rule.
    """
    starts = F.pad(position_ids.expand(shape).diff() != 1, (1, 0), value=True)
    index = starts.flatten().nonzero().flatten()
    if index.shape[0] == shape[0]:
        return None
    return F.pad(index, (0, 1), value=starts.numel()).int()
