"""Liger-Kernel: fused linear cross-entropy (Triton, CuTe, cuTile), scaled cross-entropy, DPO and KTO.

The preference losses re-run the reference head on reference hidden states, as their interface requires, and are not
NPO; scaled cross-entropy and `reduction="none"` give token log-probabilities, to which NPO is applied outside.
"""

import inspect
import os
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from bench.cases import IGNORED, Batch
from bench.objectives import BETA
from bench.providers.base import (
    Provider,
    UnsupportedError,
    accumulator,
    from_tokens,
    is_hopper,
    on_gpu,
    on_hopper,
    without_softcap,
)

# Tokens in a chunk of the preference losses: with their default of one sequence the products would be tiny.
CHUNK_TOKENS = 4096
# Multiple of the Triton kernel's default chunk of logits, in releases with that option: 4096 rows of 8192 at Llama-3's
# head instead of 256. In each chunk the head is read, and its gradient read and written, once.
CHUNK_MEMORY = 16


def triton_loss(batch: Batch, reduction: str = "mean") -> Tensor:
    """With a float32 sum of dWeight and large chunks: several times faster than by default, and more accurate."""
    on_gpu(batch, "Liger's Triton kernel")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight, labels = batch.flat
    takes_memory = "chunk_mem_const" in inspect.signature(liger_fused_linear_cross_entropy).parameters
    return liger_fused_linear_cross_entropy(
        hidden,
        weight,
        labels,
        ignore_index=IGNORED,
        reduction=reduction,
        softcap=batch.softcap,
        accum_dtype=accumulator(batch),
        **({"chunk_mem_const": CHUNK_MEMORY} if takes_memory else {}),
    )


def triton_tokens(batch: Batch) -> Tensor:
    return -triton_loss(batch, "none").view(batch.labels.shape)


def cute_loss(batch: Batch) -> Tensor:
    without_softcap(batch, "Liger's CuTe kernel")
    on_hopper(batch, "Liger's CuTe kernel")
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return liger_fused_linear_cross_entropy_sm90(*batch.flat, ignore_index=IGNORED, reduction="mean")


def cutile_loss(batch: Batch) -> Tensor:
    without_softcap(batch, "Liger's cuTile kernel")
    on_hopper(batch, "Liger's cuTile kernel")
    from liger_kernel.ops.cutile.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss = LigerFusedLinearCrossEntropyFunction.apply(*batch.flat)
    return loss[0] if isinstance(loss, tuple) else loss


def scaled_tokens(batch: Batch) -> Tensor:
    """The implementation that Liger picks for the device: CuTe on Hopper, plain PyTorch in chunks elsewhere."""
    without_softcap(batch, "Liger's scaled cross-entropy")
    if is_hopper(batch):
        on_hopper(batch, "Liger's scaled cross-entropy")
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(*batch.flat).view(batch.labels.shape)


def trusted_labels() -> AbstractContextManager:
    """Without the check of labels, which synchronises with the GPU in every forward."""
    return mock.patch.dict(os.environ, LIGER_SCALED_CE_SM90_VALIDATE_TARGETS="0")


def scaled_cutile_tokens(batch: Batch) -> Tensor:
    without_softcap(batch, "Liger's scaled cross-entropy")
    on_gpu(batch, "Liger's cuTile kernel")
    from liger_kernel.ops.cutile.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(*batch.flat).view(batch.labels.shape)


def dpo_loss(batch: Batch) -> Tensor:
    """First half of the sequences against the second."""
    without_softcap(batch, "Liger's DPO loss")
    B, S = batch.labels.shape
    if B % 2:
        raise UnsupportedError(f"DPO needs pairs, there are {B} sequences")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(ignore_index=IGNORED, beta=BETA, chunk_size=max(1, CHUNK_TOKENS // (2 * S)))
    tensors = batch.weight, batch.hidden, batch.labels
    return loss(*tensors, ref_input=batch.ref_hidden, ref_weight=batch.weight.detach())[0]


def kto_loss(batch: Batch) -> Tensor:
    """Forget sequences are undesirable, retain sequences desirable."""
    without_softcap(batch, "Liger's KTO loss")
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    B, S = batch.labels.shape
    loss = LigerFusedLinearKTOLoss(
        ignore_index=IGNORED, beta=BETA, use_ref_model=True, chunk_size=max(1, CHUNK_TOKENS // S)
    )
    return loss(
        batch.hidden,
        batch.weight,
        batch.labels,
        preference_labels=torch.arange(B, device=batch.labels.device) >= batch.num_forget,
        ref_input=batch.ref_hidden,
        ref_weight=batch.weight.detach(),
        kl=torch.zeros((), device=batch.hidden.device),
    )[0]


PACKAGE = "liger-kernel"
PROVIDERS = [
    Provider("liger/flce", PACKAGE, "ce", True, triton_loss),
    from_tokens("liger/flce-none", PACKAGE, triton_tokens),
    Provider("liger/flce-cute", PACKAGE, "ce", True, cute_loss),
    Provider("liger/flce-cutile", PACKAGE, "ce", True, cutile_loss),
    replace(from_tokens("liger/scaled", PACKAGE, scaled_tokens), setting=trusted_labels),
    from_tokens("liger/scaled-cutile", PACKAGE, scaled_cutile_tokens),
    Provider("liger/dpo", PACKAGE, "dpo", True, dpo_loss),
    Provider("liger/kto", PACKAGE, "kto", True, kto_loss),
]
