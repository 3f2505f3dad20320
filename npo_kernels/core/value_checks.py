"""Checks that read values of tensors: labels, cu_seqlens, num_rows, ref_logps, weights, a normalizer tensor.

They run where reading is free (CPU tensors) or requested (`set_debug(True)` or NPO_KERNELS_DEBUG=1). Elsewhere they
would force a device sync, so they are skipped, and a wrong value makes the result NaN.
"""

import math
import os
import reprlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from npo_kernels.core.layout import flatten

_debug = os.environ.get("NPO_KERNELS_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Check the values of labels, cu_seqlens, num_rows, ref_logps, normalizer and weights on every device.

    On a GPU each check is a device sync. Without it, a wrong value gives NaN there. The environment variable
    NPO_KERNELS_DEBUG=1 enables the checks from the start of the process.

    Args:
        enabled: True or False.

    Raises:
        TypeError: anything but True or False.

    Examples:
        >>> from npo_kernels import set_debug
        >>> set_debug(True)
        >>> set_debug(False)
    """
    global _debug
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected True or False, got {type(enabled).__name__} {reprlib.repr(enabled)}")
    _debug = enabled


def readable(tensor: Tensor) -> bool:
    """Whether reading its values is free or requested. Batched tensors (vmap) and fake tensors cannot be read."""
    return (
        (tensor.device.type == "cpu" or _debug)
        and not torch._C._functorch.is_batchedtensor(tensor)
        and not isinstance(tensor, FakeTensor)
    )


def check_values(
    labels: Tensor, cu_seqlens: Tensor | None, shift: bool, vocab_size: int, ignore_index: int, num_rows: int | None
) -> None:
    """Check that labels are in [0, V), offsets are monotone from 0 to T and num_rows is large enough, if `readable`."""
    if not readable(labels):
        return
    targets, offsets = flatten(labels, cu_seqlens, shift, ignore_index)
    total = targets.shape[0]
    if offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens: expected a non-decreasing sequence from 0 to T={total}, got {offsets.tolist()[:16]}"
            f"{' ...' if offsets.shape[0] > 16 else ''}"
        )
    scored = targets != ignore_index
    wrong = targets[scored & ((targets < 0) | (targets >= vocab_size))]
    if wrong.numel():
        raise ValueError(
            f"labels: {wrong.numel()} outside [0, {vocab_size}), the first is {wrong[0].item()}; "
            f"expected token ids, or ignore_index={ignore_index} where nothing is scored"
        )
    if num_rows is not None and int(scored.sum()) > num_rows:
        raise ValueError(
            f"num_rows={num_rows} but {int(scored.sum())} positions are scored: expected their number, or a bound; "
            "leave num_rows out to have them counted"
        )


def check_exact_rows(scored: Tensor, num_rows: int) -> None:
    """Check that num_rows is exactly the number of scored positions, if `readable`."""
    if readable(scored) and int(scored) != num_rows:
        raise ValueError(
            f"num_rows={num_rows} but {int(scored)} positions are scored: fused_token_loss hands exactly the scored "
            "tokens to loss_fn, so it needs their number and not a bound; leave num_rows out to have them counted"
        )


def check_kl_labels(labels: Tensor, counted: Tensor, vocab_size: int) -> None:
    """Check that labels (T,) are in [0, V) at the counted positions (T,), if `readable`.

    Elsewhere a wrong label makes the KL of its position NaN.
    """
    if not readable(labels):
        return
    wrong = labels[counted & ((labels < 0) | (labels >= vocab_size))]
    if wrong.numel():
        raise ValueError(
            f"labels: {wrong.numel()} outside [0, {vocab_size}) at positions that count, the first is "
            f"{wrong[0].item()}: pass mask=labels != -100, which leaves those without a label out"
        )


def check_factors(offset: Tensor, normalizer: Tensor | None, weights: Tensor | None, num_tokens: Tensor) -> None:
    """Check that the normalizer is positive, that weights of sequences with a scored token are finite and >= 0, and
    that ref_logps are finite for those of nonzero weight, if `readable`.

    Elsewhere `npo_kernels.core.formulas` makes the loss NaN.
    """
    if not (readable(offset) and readable(num_tokens)):
        return
    if normalizer is not None and not 0 < normalizer.item() < math.inf:
        raise ValueError(
            f"normalizer: expected a positive number, got a tensor of {normalizer.item()}; "
            "pass the number of sequences of the whole batch"
        )
    if weights is not None:
        wrong = ((num_tokens > 0) & ~((weights >= 0) & weights.isfinite())).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"weights: expected finite factors >= 0, got {weights[wrong[0]].item()} at sequence {wrong[0]}"
                f" ({len(wrong)} in all); a negative one would make the model learn what it is to forget"
            )
    counts = num_tokens > 0 if weights is None else (num_tokens > 0) & (weights != 0)
    wrong = (counts & ~offset.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"ref_logps: expected finite log-probabilities, got {offset[wrong[0]].item()} at sequence {wrong[0]}"
            f" ({len(wrong)} in all); compute them anew with sequence_logprobs on the reference model"
        )
