"""The output head of a Hugging Face model, and what the model does to its logits.

There is no table of architectures. The model's own forward runs with a probe in place of its head. The probe records
the hidden states that it is called with and returns a few test values instead of logits. Comparing these with the
model's output reveals what the model does to its logits, whatever its configuration calls it: logit_scale,
logits_scaling, lm_head_multiplier, softcaps.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Test values: the first gives the slope at 0, the second the limit; the others must agree with both.
PROBE = (1e-6, 1e30, -40.0, -3.0, 0.5, 7.0, 60.0)

Forward = Callable[[Tensor], object]  # forward of a linear layer
Fused = Callable[[Tensor, Tensor, Tensor | None], object]  # (hidden, weight, bias) -> result in place of the logits


class CausalLM(Protocol):
    """The part of the interface of a transformers causal language model that is used here."""

    config: Any  # its fields depend on the architecture

    def get_output_embeddings(self) -> nn.Module | None: ...

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None: ...


class ModulesToSaveWrapper(Protocol):
    """PEFT's wrapper of a fully trained layer: the original layer, and a copy per adapter."""

    original_module: nn.Module
    modules_to_save: nn.ModuleDict


class HeadProbe(nn.Module):
    """Replaces the head during the model's forward: returns (1, 1, V) test values on the CPU instead of logits.

    They are on the CPU so that reading the result forces no device sync. There are V of them so that a model that cuts
    or masks the vocabulary is detected. Calls from other threads get the logits of the real head.
    """

    head: nn.Module

    def __init__(self, head: nn.Module, vocab_size: int):
        super().__init__()
        vars(self)["head"] = head  # bypasses nn.Module: the head must not become a submodule of the probe
        self.thread = threading.get_ident()
        self.hidden: Tensor | None = None
        self.logits = torch.ones(1, 1, vocab_size, dtype=torch.float64)
        self.logits[..., : len(PROBE)] = torch.tensor(PROBE[:vocab_size], dtype=torch.float64)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the real head: a model may read its weight, for example for the dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["head"], name)

    def forward(self, hidden: Tensor) -> Tensor:
        if threading.get_ident() != self.thread:
            return cast(Tensor, self.head(hidden))
        self.hidden = hidden
        return self.logits.clone()  # the model may scale them in place

    def logit_function(self, logits: Tensor | None) -> tuple[float, float | None]:
        """(logit_scale, softcap) such that the model's output is softcap tanh(scale z / softcap) of the test values z.

        Raises:
            NotImplementedError: the model does something else to its logits.
        """
        z = self.logits
        if self.hidden is None:
            raise NotImplementedError(
                "the model's forward did not call its output head, so no fused head can take its place: use "
                "npo_kernels.sequence_logprobs on the last hidden states"
            )
        if not isinstance(logits, Tensor) or logits.shape != z.shape:
            received = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise NotImplementedError(
                f"the model turned logits (..., {z.shape[-1]}) into {received}: a fused head does not support logits "
                "that are cut or rearranged; use npo_kernels.sequence_logprobs on the last hidden states"
            )
        logits = logits.detach().to("cpu", torch.float64)
        scale = (logits.flatten()[0] / z.flatten()[0]).item()
        limit = logits.flatten()[1].item() if z.shape[-1] > 1 else scale * PROBE[1]
        softcap = None if abs(limit) > 1e-3 * abs(scale) * PROBE[1] else abs(limit)
        expected = z * scale if softcap is None else softcap * torch.tanh(z * (scale / (softcap or 1.0)))
        if not torch.allclose(logits, expected, rtol=1e-5, atol=1e-12):
            raise NotImplementedError(
                f"the model turned logits {z.flatten()[2:7].tolist()} into {logits.flatten()[2:7].tolist()}: a fused "
                "head supports a scale and a tanh softcap only; use npo_kernels.sequence_logprobs on the last hidden "
                "states"
            )
        return scale, softcap


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def head_of(model: CausalLM) -> nn.Module:
    """The output head of a model, even while another thread has replaced it by a probe.

    Raises:
        ValueError: the model has no output head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError("the model has no output embeddings: expected a causal language model (AutoModelForCausalLM)")
    return head.head if isinstance(head, HeadProbe) else head


@contextmanager
def locked(head: nn.Module) -> Iterator[None]:
    """Lock for a fused call, one thread at a time: it replaces the head of the model, which all threads share."""
    with _locks_guard:
        lock = _locks.setdefault(head, threading.RLock())
    with lock:
        yield


@contextmanager
def probed(model: CausalLM, head: nn.Module) -> Iterator[HeadProbe]:
    """Context in which a probe replaces the head of the model."""
    probe = HeadProbe(head, plain_linears(head)[0].out_features)
    model.set_output_embeddings(probe)
    try:
        yield probe
    finally:
        model.set_output_embeddings(head)


@contextmanager
def head_computes(head: nn.Module, function: Fused) -> Iterator[None]:
    """Context in which calling the head computes `function(hidden, weight, bias)`.

    The head is still called as a module, so that hooks run: FSDP2 and DeepSpeed ZeRO-3 gather its weight, accelerate
    moves it to the device, and PEFT picks the trained copy. Calls from other threads get the logits.
    """
    linears = plain_linears(head)
    for linear in linears:
        name = "_old_forward" if hasattr(linear, "_hf_hook") else "forward"  # accelerate's hooks replace forward
        saved = vars(linear).get(name)
        vars(linear)[name] = _forward_of(linear, function, saved or functools.partial(type(linear).forward, linear))
        vars(linear)["_npo_saved"] = (name, saved)
    try:
        yield
    finally:
        for linear in linears:
            name, saved = vars(linear).pop("_npo_saved")
            if saved is None:
                del vars(linear)[name]
            else:
                vars(linear)[name] = saved


def _forward_of(linear: nn.Linear, function: Fused, elsewhere: Forward) -> Forward:
    """A forward that calls `function` in this thread and `elsewhere` in other threads."""
    thread = threading.get_ident()

    def forward(hidden: Tensor) -> object:
        if threading.get_ident() != thread:
            return elsewhere(hidden)
        return function(hidden, linear.weight, linear.bias)

    return forward


def plain_linears(head: nn.Module) -> list[nn.Linear]:
    """The linear layers that a call of the head may run: the head itself, or the copies in PEFT's ModulesToSaveWrapper.

    Raises:
        ValueError: the head is not a plain linear layer; the message says what to do.
    """
    names = {cls.__name__ for cls in type(head).__mro__}
    if "BaseTunerLayer" in names:
        raise ValueError(
            f"the output head carries an adapter ({type(head).__name__}), which a fused head would train as if it were "
            "not there: remove 'lm_head' from target_modules, train the head itself with modules_to_save=['lm_head'], "
            "or merge the adapter first (merge_and_unload())"
        )
    linears = [head]
    if "ModulesToSaveWrapper" in names:
        wrapper = cast(ModulesToSaveWrapper, head)
        linears = [wrapper.original_module, *wrapper.modules_to_save.values()]
    for linear in linears:
        if getattr(type(linear), "forward", None) is not nn.Linear.forward:
            raise ValueError(
                f"the output head is a {type(linear).__name__}: expected torch.nn.Linear. Keep the head of a quantised "
                "model out of quantisation (llm_int8_skip_modules=['lm_head'], modules_to_not_convert=['lm_head']), or "
                "replace it by a plain one (model.set_output_embeddings)"
            )
        if type(linear.weight) not in (Tensor, nn.Parameter, DTensor) and not _deepspeed(linear.weight):
            raise ValueError(
                f"the output head's weight is a {type(linear.weight).__name__}, quantised or packed: expected a plain "
                "tensor. Keep 'lm_head' out of quantisation, or dequantise it"
            )
    return cast(list[nn.Linear], linears)


def _deepspeed(weight: object) -> bool:
    return hasattr(weight, "ds_id")
