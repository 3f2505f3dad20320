"""Estimate the memory of a training step without running it: one step on tensors with shapes and no data.

The model is built from its configuration alone, and the largest micro-batch goes through forward and backward under
torch's FakeTensorMode: operators return tensors with the right shapes and autograd saves what it would save, so
attention, autocast, adapters and gradient checkpointing are counted as implemented. Nothing is computed or allocated.
Only the head is replaced by its plan (`npo_kernels.explain`).
"""

import ctypes
import resource
import sys
import weakref
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from npo_kernels import explain, fused_logprob_loss
from training.durable import written
from training.loading import load_config

GIB = 2**30
UNMASKED = "unmasked"  # transformers makes no mask for an attention that it does not know


def _unmasked(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None, **_):
    """Attention that saves its inputs, its output and one number per row, as flash attention does."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, dropout=dropout, scaling=scaling)


AttentionInterface.register(UNMASKED, _unmasked)


def estimate(
    model_name: str | Path,
    rows: Sequence[int],
    *,
    trained: Literal["all"] | int,
    bf16: bool,
    packing: bool,
    attn_implementation: str | None,
    gradient_checkpointing: bool,
    with_reference: bool,
    device: torch.device,
    accumulated: bool = False,
    with_rounding: bool = False,
    with_head_copy: bool = False,
) -> dict[str, float]:
    """Peak memory of a training step in GiB, by purpose, in a process that holds the whole model.

    Args:
        model_name: folder or hub name; only its configuration is read.
        rows: lengths in tokens of the rows of the largest micro-batch, those of all kinds together.
        trained: "all" weights, or the rank of LoRA adapters on all linear layers but the head.
        bf16: forward and backward run under bfloat16 autocast. Weights and moments are float32 either way.
        packing: the rows one after another in one; False: padded to the longest.
        with_reference: a frozen copy of the model is held for a KL term, on a GPU in bfloat16; its pass comes second.
        device: where the step will run. One that is not at hand is taken to work like a CPU.
        accumulated: a step has several micro-batches.
        with_head_copy: the head as it was is held for cached hidden states (UNDIAL); counted as reference.
        with_rounding: its gradients are taken at rounded weights (`training.durable`), beside a copy of its own.

    Returns:
        weights: 4 bytes a parameter, adapters included.
        gradients: 4 bytes a trained parameter.
        optimizer: AdamW's two moments, 8 bytes a trained parameter.
        activations: what the forward of the layers keeps for their backward.
        head: gradients and workspace of the fused head, if every token is scored.
        reference: the frozen copy, of the model or its head.
        copy: of the weights that rounding writes, until the gradients are there.
        python: on a CPU, what the process holds already: ask before a model is loaded. 0 elsewhere.
        total: python + weights + optimizer + reference + the larger of two: the peak of forward and backward with the
            copy, and the gradients, as AdamW is fused. Not the sum: gradients come as activations go, unless
            `accumulated`. On a CPU: as resident after `return_freed_memory`; without it the C library holds more.

    Raises:
        ValueError: no rows or an empty one, a rank below 1, an architecture that transformers does not know, or one
            whose memory depends on values (a mixture of experts, by its implementation).
        OSError: there is no configuration.
    """
    if not rows or min(rows) < 1:
        raise ValueError(f"rows: expected one length or more, each at least 1, got {list(rows)}")
    if trained != "all" and trained < 1:
        raise ValueError(f'trained: expected "all" or a rank of at least 1, got {trained}')
    python = _resident_bytes() if device.type == "cpu" else 0
    here = device if _at_hand(device) else torch.device("cpu")
    flash = (attn_implementation or "").startswith(("flash", "kernels-community"))
    config = load_config(model_name)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=UNMASKED if flash else attn_implementation,
            trust_remote_code=False,
        )
        reference = _bytes(model.parameters()) // (2 if device.type == "cuda" else 1)
        if trained != "all":
            model = get_peft_model(model, LoraConfig(r=trained, target_modules="all-linear")).get_base_model()
    masked = len(rows) > 1 and (packing or len(set(rows)) > 1)
    if not masked and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(UNMASKED)  # where transformers sees that a mask masks nothing, it drops it
    if gradient_checkpointing:
        # the generator's state is a real tensor, which fake ones do not mix with
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    copy = _bytes(written(model)) if with_rounding else 0
    head_copy = _bytes([model.get_output_embeddings().weight]) if with_head_copy else 0
    workspace = _workspace_of_head(model.get_output_embeddings().weight, rows, bf16, here)
    with FakeTensorMode(), here:
        _replace_by_fakes(model.train())
        learning = [p for p in model.parameters() if p.requires_grad]
        if accumulated or with_reference:
            for p in learning:
                p.grad = torch.empty_like(p)
        try:
            used = _one_pass(model, rows, packing, bf16, workspace)
        except RuntimeError as reason:
            raise ValueError(f"the memory of {config.model_type} depends on more than sizes: {reason}") from None
    gradients = _bytes(learning)
    peak = used.peak + (gradients if accumulated or with_reference else 0)
    parts = {
        "weights": _bytes(model.parameters()),
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "activations": used.activations,
        "head": used.head,
        "reference": reference * with_reference + head_copy,
        "copy": copy,
        "python": python,
    }
    held = sum(parts[name] for name in ("weights", "optimizer", "reference", "python"))
    parts["total"] = held + max(copy + peak, gradients)
    return {name: round(size / GIB, 3) for name, size in parts.items()}


def peak_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of allocated tensors on a GPU, of the process on a CPU."""
    status = Path("/proc/self/status")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        peak = int(lines["VmHWM"].split()[0]) * 1024
    else:
        peak = _resident_bytes()
    return round(peak / GIB, 3)


def return_freed_memory() -> None:
    """Let freed tensors of 1 MiB or more go back to the system at once, in this process, where the C library is glibc.

    By itself glibc moves the limit up to 32 MiB and cuts smaller tensors out of one heap. Gradients and moments settle
    between activations there, and what is freed around them is kept: a step on a CPU then takes up to twice of what its
    tensors need, most with gradient checkpointing.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


class _Used(NamedTuple):
    """Bytes of a pass beyond weights, moments and the gradients that were there before."""

    activations: int
    head: int
    peak: int


def _one_pass(model: Any, rows: Sequence[int], packing: bool, bf16: bool, workspace: int) -> _Used:
    """Forward and backward of fake tensors."""
    ids = torch.zeros((1, sum(rows)) if packing else (len(rows), max(rows)), dtype=torch.int64)
    layout = {"position_ids": ids} if packing else {"attention_mask": ids}
    with LiveBytes(t for p in model.parameters() for t in (p, p.grad) if t is not None) as live:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            hidden = model.base_model(input_ids=ids, use_cache=False, **layout).last_hidden_state
            activations = live.now
            dtype = torch.bfloat16 if bf16 else torch.float32
            weight = model.get_output_embeddings().weight
            loss = _PlannedHead.apply(hidden.to(dtype), weight.to(dtype), workspace)
            head = live.now - activations + workspace
        loss.backward()
    return _Used(activations, head, live.peak)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still there (`now`), and the most at a time (`peak`)."""

    def __init__(self, before: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._before = [t.untyped_storage() for t in before]
        self._known = {storage._cdata for storage in self._before}  # views of these are no new memory

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


class _PlannedHead(torch.autograd.Function):
    """In the place of the fused head: its workspace for a moment, its gradients until the backward takes them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, workspace: int) -> Tensor:
        grads = [torch.empty_like(t) if t.requires_grad else None for t in (hidden, weight)]
        ctx.save_for_backward(*grads)
        torch.empty(workspace, dtype=torch.uint8)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        if upstream.device.type != "cpu":  # multiplied by the upstream gradient, which a CPU sees to be 1
            grads = [None if g is None else torch.empty_like(g) for g in grads]
        return *grads, None


def _workspace_of_head(weight: Tensor, rows: Sequence[int], bf16: bool, device: torch.device) -> int:
    """Bytes. One row each of hidden states and head stands for all: a plan depends on sizes alone."""
    dtype = torch.bfloat16 if bf16 else torch.float32

    def of_size(length: int, needs_grad: bool) -> Tensor:
        return torch.empty(1, weight.shape[1], dtype=dtype, device=device).expand(length, -1).requires_grad_(needs_grad)

    hidden, head = of_size(sum(rows), True), of_size(weight.shape[0], weight.requires_grad)
    labels = torch.zeros(sum(rows), dtype=torch.int64, device=device)
    starts = torch.tensor([0, *accumulate(rows)], dtype=torch.int32, device=device)
    return explain(fused_logprob_loss, hidden, head, labels, cu_seqlens=starts).workspace_bytes


def _replace_by_fakes(model: nn.Module) -> None:
    """Parameters and buffers on the meta device by fake ones on the device of the context; tied ones stay tied."""
    made: dict[Tensor, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made[old]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _at_hand(device: torch.device) -> bool:
    return device.type == "cpu" or torch.get_device_module(device).is_available()


def _resident_bytes() -> int:
    """What the process holds now. The peak of `getrusage` begins with that of the process that started this one."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
