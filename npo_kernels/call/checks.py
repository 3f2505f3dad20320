"""Conditions on several arguments together; `npo_kernels.call.rules` checks each argument by itself.

Every error names the argument, the value received, the value expected, and the remedy. Nothing here reads the values of
tensors, so nothing forces a device sync; `npo_kernels.core.value_checks` reads them where that is free.
"""

import torch
from torch import Tensor

from npo_kernels.call.call import Call, KLCall
from npo_kernels.call.rules import describe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _refuse_dtensor(name: str, value: Tensor | None, remedy: str = "") -> None:
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor: call the loss inside the wrapped model's forward, where the parameter is a plain "
            f"tensor, or unshard the module first (FSDP2: lm_head.unshard()){remedy}"
        )


def _check_dtype(name: str, value: Tensor, impl: str) -> None:
    """Check the dtype of hidden states or a head."""
    if value.dtype in DTYPES or (impl == "reference" and value.dtype == torch.float64):
        return
    hint = ""
    if value.dtype == torch.float64:
        hint = " (float64 is for impl='reference')"
    elif value.dtype.itemsize == 1 and "weight" in name:
        hint = ": dequantise a quantised head, or keep it out of quantisation"
    raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {describe(value)}{hint}")


def check_batch(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str,
) -> None:
    """Check ranks, shapes, dtypes and devices of the tensors that all functions share."""
    spread = (
        "; a head whose vocabulary is spread over ranks that hold the same batch takes "
        "process_group=lm_head_weight.device_mesh.get_group()"
    )
    for name, value in (("lm_head_weight", lm_head_weight), ("bias", bias)):
        _refuse_dtensor(name, value, spread)
    _check_dtype("hidden", hidden, impl)
    _check_dtype("lm_head_weight", lm_head_weight, impl)
    if lm_head_weight.dtype != hidden.dtype:
        raise TypeError(
            f"lm_head_weight is {describe(lm_head_weight)} but hidden is {describe(hidden)}: cast one of them "
            "(lm_head_weight.to(hidden.dtype)), or call under torch.autocast, which casts both"
        )
    _refuse_empty_head("lm_head_weight", lm_head_weight)
    if lm_head_weight.dim() != 2:
        raise ValueError(f"lm_head_weight: expected (V, H), got {describe(lm_head_weight)}")
    vocab_size, hidden_size = lm_head_weight.shape

    if cu_seqlens is None:
        if hidden.dim() != 3:
            raise ValueError(
                f"hidden: expected a padded batch (B, S, H), got {describe(hidden)}; "
                "a packed batch (T, H) needs cu_seqlens (B+1,)"
            )
    else:
        check_cu_seqlens(cu_seqlens)
        if hidden.dim() != 2:
            raise ValueError(
                f"hidden: expected a packed batch (T, H) with cu_seqlens, got {describe(hidden)}; "
                "drop the batch dimension of a packed batch (hidden[0], labels[0]), or drop cu_seqlens of a padded one"
            )
    if hidden.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden {describe(hidden)} and lm_head_weight {describe(lm_head_weight)} disagree on H: expected "
            f"hidden (..., {hidden_size}) for a weight (V, H)"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {describe(labels)}; use labels.long()")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected the shape {tuple(hidden.shape[:-1])} of hidden, got {describe(labels)}")
    if bias is not None and (bias.shape != (vocab_size,) or bias.dtype != lm_head_weight.dtype):
        wanted = f"({vocab_size},) {str(lm_head_weight.dtype).removeprefix('torch.')}"
        raise ValueError(f"bias: expected {wanted} as the weight has it, got {describe(bias)}")
    for name, value in (
        ("lm_head_weight", lm_head_weight),
        ("labels", labels),
        ("bias", bias),
        ("cu_seqlens", cu_seqlens),
    ):
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device} but hidden is on {hidden.device}: move them to one device")


def _refuse_empty_head(name: str, weight: Tensor) -> None:
    if weight.numel() == 0:
        raise ValueError(
            f"{name} is empty, {describe(weight)}: under DeepSpeed ZeRO-3 call the loss inside the model's forward "
            "(npo_kernels.hf.add_fused_unlearning_head), where the head is gathered, or gather it "
            "(deepspeed.zero.GatheredParameters) around forward and backward"
        )


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """Check its dtype and rank; `npo_kernels.core.value_checks` checks its values."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32, got {describe(cu_seqlens)}; use cu_seqlens.int()")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens: expected (B+1,) cumulative lengths starting with 0, got {describe(cu_seqlens)}; "
            "an attention mask is not one: packed batches take no mask"
        )


def check_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    target_shift: float,
    impl: str,
) -> None:
    """Check ranks, shapes, dtypes and devices of the arguments of `fused_linear_kl`."""
    for side, x, w, b in (("", hidden, weight, bias), ("ref_", ref_hidden, ref_weight, ref_bias)):
        for name, t in ((f"{side}hidden", x), (f"{side}lm_head_weight", w), (f"{side}bias", b)):
            _refuse_dtensor(name, t)
            if t is not None and t.device != hidden.device:
                raise ValueError(f"{name} is on {t.device} but hidden is on {hidden.device}: move them to one device")
        _refuse_empty_head(f"{side}lm_head_weight", w)
        _check_dtype(f"{side}hidden", x, impl)
        _check_dtype(f"{side}lm_head_weight", w, impl)
        if w.dtype != x.dtype:
            raise TypeError(
                f"{side}lm_head_weight is {describe(w)} but {side}hidden is {describe(x)}: expected one dtype; cast "
                "one of them, or call under torch.autocast, which casts both"
            )
        if w.dim() != 2 or x.dim() < 2 or x.shape[-1] != w.shape[1]:
            raise ValueError(
                f"{side}hidden and {side}lm_head_weight: expected (..., H) and (V, H) with the same H, got "
                f"{describe(x)} and {describe(w)}; pass the last hidden states of the model that the head belongs to"
            )
        if b is not None and (b.shape != w.shape[:1] or b.dtype != w.dtype):
            like = f"({w.shape[0]},) {str(w.dtype).removeprefix('torch.')}"
            raise ValueError(f"{side}bias: expected {like}, as {side}lm_head_weight has it, got {describe(b)}")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"lm_head_weight has V={weight.shape[0]}, ref_lm_head_weight has V={ref_weight.shape[0]}: KL needs one "
            "vocabulary; cut the rows that only one of them has (padding)"
        )
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"ref_hidden {describe(ref_hidden)}: expected the positions of hidden {describe(hidden)}")
    wanted = (torch.bool, hidden.shape[:-1], hidden.device)
    if mask is not None and (mask.dtype, mask.shape, mask.device) != wanted:
        raise ValueError(
            f"mask: expected {tuple(hidden.shape[:-1])} bool on {hidden.device}, got {describe(mask)}; "
            "labels != ignore_index gives the answer positions"
        )
    wanted = (torch.int64, hidden.shape[:-1], hidden.device)
    if labels is not None and (labels.dtype, labels.shape, labels.device) != wanted:
        raise ValueError(
            f"labels: expected {tuple(hidden.shape[:-1])} int64 on {hidden.device}, got {describe(labels)}; "
            "one for each position of hidden, already shifted"
        )
    if labels is None and target_shift != 0:
        raise ValueError(
            f"target_shift={target_shift} lowers the reference's logit at the label, got labels=None: pass labels, "
            f"{tuple(hidden.shape[:-1])} int64, or leave target_shift out"
        )


def check_kept(call: Call | KLCall) -> None:
    """Refuse inference tensors with impl="reference", where autograd has to save the inputs for the backward.

    The operators of the other backends can save them (`npo_kernels.ops.schema`).
    """
    if call.execution.impl != "reference" or torch.compiler.is_compiling() or not call.execution.needs.any:
        return
    named = {"hidden": call.hidden, "lm_head_weight": call.head.weight, "bias": call.head.bias}
    if isinstance(call, KLCall):
        reference = call.ref_head
        named |= {"ref_hidden": call.ref_hidden, "ref_lm_head_weight": reference.weight, "ref_bias": reference.bias}
        named |= {"mask": call.counted, "labels": call.labels}
    for name, value in named.items():
        if value is not None and value.is_inference():
            raise ValueError(
                f"{name}: expected a tensor that autograd can keep for the backward, got {describe(value)} made under "
                "torch.inference_mode(): make it under torch.no_grad(), or clone() it outside"
            )


def check_normalizer(reduction: str, normalizer: float | Tensor | None) -> None:
    """Refuse a normalizer unless reduction is "mean": it replaces the count that only "mean" divides by."""
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer replaces the count of reduction='mean', got reduction={reduction!r}")


def check_per_sequence(name: str, value: Tensor, num_sequences: int, device: torch.device, remedy: str) -> None:
    """Check that a tensor has one number per sequence, on the device of the batch."""
    if value.shape != (num_sequences,):
        raise ValueError(f"{name}: expected one per sequence, ({num_sequences},), got {describe(value)}; {remedy}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but hidden is on {device}: move it there")
