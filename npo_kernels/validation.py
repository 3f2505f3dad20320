"""Argument checks: every refusal says what came, what is expected and what to do.

Nothing here waits for a device. What can only be known by reading values (labels, cu_seqlens) is checked where that
is free (tensors on the CPU) or asked for (`set_debug(True)` or NPO_KERNELS_DEBUG=1); elsewhere the result is NaN.
"""

import math
import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("auto", "triton", "torch", "reference")
REDUCTIONS = ("mean", "sum", "none")
# Arguments of neighbouring libraries, and what takes their place here.
_ELSEWHERE = {
    "attention_mask": "mask positions by setting their label to ignore_index (packed batches take cu_seqlens alone)",
    "position_ids": "packed batches take cu_seqlens (B+1,)",
    "cu_seq_lens_q": "it is called cu_seqlens here",
    "shift_labels": "pass them as labels with shift=False",
    "target": "it is called labels here",
    "linear_bias": "it is called bias here",
    "lm_head_bias": "it is called bias here",
    "temperature": "use logit_scale=1/temperature",
    "final_logit_softcapping": "it is called softcap here",
    "ref_hidden": "the reference enters as ref_logps, its cached sequence log-probabilities",
}

_debug = os.environ.get("NPO_KERNELS_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Check label and cu_seqlens values on every device, at the price of a device sync per call."""
    global _debug
    _debug = bool(enabled)


def refuse_unknown(function: str, unknown: dict) -> None:
    """Unknown keywords are an error, with a hint for those that mean something elsewhere."""
    for name in unknown:
        hint = _ELSEWHERE.get(name, "see help(npo_kernels." + function + ") for the arguments it takes")
        raise TypeError(f"{function}() got an unexpected keyword argument '{name}': {hint}")


def _describe(tensor) -> str:
    if isinstance(tensor, Tensor):
        return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
    return f"{type(tensor).__name__} {tensor!r}"


def _need_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_describe(value)}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor: call the loss inside the wrapped model's forward, where the parameter is a plain "
            "tensor, or unshard the module first (FSDP2: lm_head.unshard()); a head whose vocabulary is spread over "
            "ranks that hold the same batch takes process_group=lm_head_weight.device_mesh.get_group()"
        )


def check_batch(hidden, lm_head_weight, labels, bias, cu_seqlens, impl: str) -> None:
    """Types, ranks, shapes, dtypes and devices of the tensors all functions share."""
    for name, value in (("hidden", hidden), ("lm_head_weight", lm_head_weight), ("labels", labels)):
        _need_tensor(name, value)
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")

    dtypes = (*DTYPES, torch.float64) if impl == "reference" else DTYPES
    if hidden.dtype not in dtypes:
        hint = " (float64 is for impl='reference')" if hidden.dtype == torch.float64 else ""
        raise TypeError(f"hidden: expected float32, bfloat16 or float16, got {_describe(hidden)}{hint}")
    if lm_head_weight.dtype != hidden.dtype:
        raise TypeError(
            f"lm_head_weight is {_describe(lm_head_weight)} but hidden is {_describe(hidden)}: cast one of them "
            "(lm_head_weight.to(hidden.dtype)), or call under torch.autocast, which casts both"
        )
    if lm_head_weight.numel() == 0:
        raise ValueError(
            f"lm_head_weight is empty, {_describe(lm_head_weight)}: under DeepSpeed ZeRO-3 call the loss inside the "
            "model's forward (npo_kernels.hf.add_fused_unlearning_head), where the head is gathered, or gather it "
            "(deepspeed.zero.GatheredParameters) around forward and backward"
        )
    if lm_head_weight.dim() != 2:
        raise ValueError(f"lm_head_weight: expected (V, H), got {_describe(lm_head_weight)}")
    vocab_size, hidden_size = lm_head_weight.shape

    if cu_seqlens is None:
        if hidden.dim() != 3:
            raise ValueError(
                f"hidden: expected a padded batch (B, S, H), got {_describe(hidden)}; "
                "a packed batch (T, H) needs cu_seqlens (B+1,)"
            )
    else:
        _check_cu_seqlens(cu_seqlens, hidden)
        if hidden.dim() != 2:
            raise ValueError(
                f"hidden: expected a packed batch (T, H) with cu_seqlens, got {_describe(hidden)}; "
                "drop the batch dimension of a packed batch (hidden[0], labels[0]), or drop cu_seqlens of a padded one"
            )
    if hidden.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden {_describe(hidden)} and lm_head_weight {_describe(lm_head_weight)} disagree on H: expected "
            f"hidden (..., {hidden_size}) for a weight (V, H)"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {_describe(labels)}; use labels.long()")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected the shape {tuple(hidden.shape[:-1])} of hidden, got {_describe(labels)}")
    if bias is not None:
        _need_tensor("bias", bias)
        if bias.shape != (vocab_size,) or bias.dtype != lm_head_weight.dtype:
            wanted = f"({vocab_size},) {str(lm_head_weight.dtype).removeprefix('torch.')}"
            raise ValueError(f"bias: expected {wanted} as the weight has it, got {_describe(bias)}")
    for name, value in (
        ("lm_head_weight", lm_head_weight),
        ("labels", labels),
        ("bias", bias),
        ("cu_seqlens", cu_seqlens),
    ):
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device} but hidden is on {hidden.device}: move them to one device")


def _check_cu_seqlens(cu_seqlens, hidden: Tensor) -> None:
    _need_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32, got {_describe(cu_seqlens)}; use cu_seqlens.int()")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens: expected (B+1,) cumulative lengths starting with 0, got {_describe(cu_seqlens)}; "
            "an attention mask is not one: packed batches take no mask"
        )


def check_kl(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, reduction: str, impl: str) -> None:
    """The arguments of `fused_linear_kl`."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    for side, x, w, b in (("", hidden, weight, bias), ("ref_", ref_hidden, ref_weight, ref_bias)):
        _need_tensor(f"{side}hidden", x)
        _need_tensor(f"{side}lm_head_weight", w)
        dtypes = (*DTYPES, torch.float64) if impl == "reference" else DTYPES
        if x.dtype not in dtypes or w.dtype != x.dtype:
            raise TypeError(
                f"{side}hidden is {_describe(x)} and {side}lm_head_weight {_describe(w)}: expected one dtype of "
                "float32, bfloat16 or float16; cast one of them, or call under torch.autocast"
            )
        if w.dim() != 2 or x.dim() < 2 or x.shape[-1] != w.shape[1]:
            raise ValueError(
                f"{side}hidden (..., H) and {side}lm_head_weight (V, H): got {_describe(x)}, {_describe(w)}"
            )
        if b is not None and (b.shape != w.shape[:1] or b.dtype != w.dtype):
            raise ValueError(f"{side}bias: expected ({w.shape[0]},) {w.dtype}, got {_describe(b)}")
        for name, t in ((f"{side}hidden", x), (f"{side}lm_head_weight", w), (f"{side}bias", b)):
            if t is not None and t.device != hidden.device:
                raise ValueError(f"{name} is on {t.device} but hidden is on {hidden.device}: move them to one device")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"V={weight.shape[0]} of the model, V={ref_weight.shape[0]} of the reference: KL needs one vocabulary"
        )
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"ref_hidden {_describe(ref_hidden)}: expected the positions of hidden {_describe(hidden)}")
    if mask is not None:
        _need_tensor("mask", mask)
        if mask.dtype != torch.bool or mask.shape != hidden.shape[:-1] or mask.device != hidden.device:
            raise ValueError(
                f"mask: expected {tuple(hidden.shape[:-1])} bool on {hidden.device}, got {_describe(mask)}; "
                "labels != ignore_index gives the answer positions"
            )


def check_values(targets: Tensor, offsets: Tensor, vocab_size: int, ignore_index: int, num_rows: int | None) -> None:
    """Labels in [0, V), offsets monotone from 0 to T, num_rows large enough. Only where reading values is free."""
    if targets.device.type != "cpu" and not _debug:
        return
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
            f"num_rows={num_rows} but {int(scored.sum())} positions are scored: expected their number, or a bound"
        )


def check_options(
    *,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    workspace_mb: float | None,
    num_rows: int | None,
) -> None:
    """The numbers all functions share."""
    if not _is_number(logit_scale) or not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale: expected a finite non-zero number, got {logit_scale!r}")
    if softcap is not None and (not _is_number(softcap) or not 0 < softcap < math.inf):
        raise ValueError(f"softcap: expected a positive number or None, got {softcap!r}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if workspace_mb is not None and (not _is_number(workspace_mb) or not workspace_mb > 0):
        raise ValueError(f"workspace_mb: expected a positive number of MiB or None, got {workspace_mb!r}")
    if num_rows is not None and (not isinstance(num_rows, int | torch.SymInt) or num_rows < 0):
        raise ValueError(f"num_rows: expected the number of scored positions or None, got {num_rows!r}")


def check_loss(beta: float, reduction: str, normalizer) -> None:
    """beta, reduction and normalizer of a loss."""
    if not _is_number(beta) or not 0 < beta < math.inf:
        raise ValueError(f"beta: expected a positive number, got {beta!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer replaces the count of reduction='mean', got reduction={reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer: expected a number or a 0-d tensor, got {_describe(normalizer)}")
    elif not _is_number(normalizer) or not normalizer > 0:
        raise ValueError(f"normalizer: expected a positive number or a 0-d tensor, got {normalizer!r}")


def check_ref_logps(ref_logps, num_sequences: int, device: torch.device) -> None:
    """One cached reference log-probability per sequence, in a dtype that does not round it away."""
    _need_tensor("ref_logps", ref_logps)
    if ref_logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"ref_logps: expected float32, got {_describe(ref_logps)}; a 16-bit sum near -1000 is off by several nats, "
            "cache it from sequence_logprobs, which returns float32"
        )
    if ref_logps.shape != (num_sequences,):
        raise ValueError(
            f"ref_logps: expected one per sequence, ({num_sequences},), got {_describe(ref_logps)}; "
            "pass the summed log-probability of each sequence"
        )
    if ref_logps.device != device:
        raise ValueError(f"ref_logps is on {ref_logps.device} but hidden is on {device}: move it there")


def _is_number(value) -> bool:
    return isinstance(value, int | float | torch.SymFloat | torch.SymInt) and not isinstance(value, bool)
