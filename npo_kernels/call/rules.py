"""Rules for the value of a single argument: functions (name, value) -> None that raise if the value is wrong.

Every error starts with the name of the argument and gives the value expected, the value received, and the remedy. Long
values are abbreviated. `npo_kernels.call.arguments` assigns the rules to the arguments.
"""

import inspect
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from npo_kernels.core.row_moments import WITH_ARGMAX

Rule = Callable[[str, Any], None]

FLOAT32 = torch.finfo(torch.float32)
# Dtypes accepted for factors (normalizer, weights): those that torch can compare on every device.
REAL = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip
# Subclasses in torch itself that behave like a plain tensor in a call: tensors without values, tensors still being
# received from another rank, and those used for tracing. DTensor is handled by the rules `tensor` and `head_tensor`.
_AS_ANY_TENSOR = ("FakeTensor", "AsyncCollectiveTensor", "FunctionalTensor", "DTensor")


def describe(value: Any) -> str:
    """A value in one line: shape, dtype and device of a tensor, the abbreviated repr of anything else."""
    if isinstance(value, Tensor):
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            return f"{type(value).__name__} without a shape"
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    text = " ".join(reprlib.repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def short(value: Any) -> str:
    """A value where a number or a name was expected; with its type only if the repr does not show it."""
    plain = value is None or isinstance(value, bool | int | float | str | torch.SymInt | torch.SymFloat)
    return reprlib.repr(value) if plain else describe(value)


def optional(rule: Rule) -> Rule:
    """The same rule, but None is accepted."""
    return lambda name, value: None if value is None else rule(name, value)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


def head_tensor(name: str, value: Any) -> None:
    """A dense tensor of the head. It may be a DTensor (a head sharded along the vocabulary, with `process_group`)."""
    kind = type(value)
    if kind is not Tensor and kind is not nn.Parameter:
        _check_class(name, value)
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        received = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        remedy = "dequantize()" if value.is_quantized else "to_padded_tensor(0.0)" if value.is_nested else "to_dense()"
        raise TypeError(f"{name}: expected a dense torch.Tensor, got a {received} one: convert it with .{remedy}")


def _check_class(name: str, value: Any) -> None:
    """Refuse subclasses that override the operations of a tensor (quantised, masked)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(value)}")
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        raise TypeError(
            f"{name}: expected a tensor with a shape, got {describe(value)}: run the lazy module once, which makes it"
        )
    kind = type(value)
    own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    if own and kind.__name__ not in _AS_ANY_TENSOR:
        raise TypeError(
            f"{name}: expected a torch.Tensor or torch.nn.Parameter, got a {kind.__name__}, a class with operations of "
            "its own: pass the plain tensor that it stands for (a quantised or masked one has a method that returns it)"
        )


def tensor(name: str, value: Any) -> None:
    """A dense tensor that is entirely on this rank: no DTensor."""
    head_tensor(name, value)
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain torch.Tensor, got a DTensor {describe(value)}: pass the part of this rank "
            "(to_local()), or the whole (full_tensor())"
        )


def values(name: str, value: Any) -> None:
    """A tensor that is not on the meta device. Other tensors on meta are caught because hidden is on another device."""
    tensor(name, value)
    if value.device.type == "meta":
        raise ValueError(
            f"{name}: expected a tensor with values, got {describe(value)}, where tensors have shapes only: load the "
            "model's weights, or move it to a device (module.to_empty(device=...)), first"
        )


def normalizer(name: str, value: Any) -> None:
    """A positive number, or a 0-d tensor."""
    if not isinstance(value, Tensor):
        number(positive, "a positive number or a 0-d tensor")(name, value)
        return
    values(name, value)
    if value.dim() != 0 or value.dtype not in REAL:
        raise ValueError(f"{name}: expected a positive number or a 0-d tensor, got {describe(value)}")
    _constant(name, value, "count sequences under torch.no_grad()")


def ref_logps(name: str, value: Any) -> None:
    """Sequence log-probabilities in float32 or float64, without gradient."""
    tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: expected float32, got {describe(value)}; a 16-bit sum near -1000 is off by several nats, "
            "cache it from sequence_logprobs, which returns float32"
        )
    _constant(name, value, "compute it under torch.no_grad()")


def weights(name: str, value: Any) -> None:
    """Factors of any real dtype; `npo_kernels.core.value_checks` checks that they are not negative."""
    tensor(name, value)
    if value.dtype not in (*REAL, torch.bool):
        raise TypeError(f"{name}: expected a tensor of real numbers, for example float32, got {describe(value)}")
    _constant(name, value, "compute the influence of a sequence under torch.no_grad()")


def _constant(name: str, value: Tensor, remedy: str) -> None:
    """Refuse a tensor that requires grad where no gradient is computed: it would be lost silently."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a constant, got {describe(value)} that requires grad: {remedy}, or detach() it"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, names and flags
# ---------------------------------------------------------------------------------------------------------------------


def positive(x: float) -> bool:
    """Positive and finite in float32, the dtype of the losses."""
    return FLOAT32.tiny <= x <= FLOAT32.max


def any_positive(x: float) -> bool:
    """Positive and finite as a Python float, for numbers that do not enter a loss."""
    return 0 < x <= sys.float_info.max


def finite(x: float) -> bool:
    """Finite in float32."""
    return abs(x) <= FLOAT32.max


def nonzero(x: float) -> bool:
    """Nonzero and finite in float32."""
    return FLOAT32.tiny <= abs(x) <= FLOAT32.max


def number(condition: Callable[[float], bool], expected: str) -> Rule:
    """A Python number that satisfies a condition (numpy.float64 is a Python float). The error says how to convert."""

    def rule(name: str, value: Any) -> None:
        if not _is_number(value) or not condition(value):
            raise ValueError(f"{name}: expected {expected}, got {short(value)}{_way_to_a_number(name, value)}")

    return rule


def _way_to_a_number(name: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return f"; pass {name}.item()" if value.numel() == 1 and not value.is_complex() else ""
    if _is_number(value):
        magnitude = abs(value)
        beyond = 0 < magnitude < FLOAT32.tiny or FLOAT32.max < magnitude
        return f"; float32 holds {FLOAT32.tiny:.3g} to {FLOAT32.max:.3g}" if beyond else ""
    converts = hasattr(value, "__float__") and not isinstance(value, bool) and getattr(value, "size", 1) == 1
    return f"; pass float({name})" if converts else ""


def integer(name: str, value: Any) -> None:
    """An int that fits in int64."""
    if not _is_int(value):
        raise TypeError(f"{name}: expected an int, got {short(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int that int64 labels can hold, got {short(value)}")


def num_rows(name: str, value: Any) -> None:
    """A count: an int >= 0."""
    if isinstance(value, torch.SymInt):
        return
    if not _is_int(value) or not 0 <= value < 2**63:
        raise ValueError(f"{name}: expected the number of scored positions or None, got {short(value)}")


def choice(*options: str) -> Rule:
    """One of the given names."""

    def rule(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in options:
            raise ValueError(f"{name}: expected one of {options}, got {short(value)}")

    return rule


def flag(name: str, value: Any) -> None:
    """True or False; other truthy or falsy values are refused."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {short(value)}")


def statistics(name: str, value: Any) -> None:
    """A list of names for `token_statistics`."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list of names out of {WITH_ARGMAX}, got {short(value)}")
    for one in value:
        if not isinstance(one, str) or one not in WITH_ARGMAX:
            raise ValueError(f"{name}: expected names out of {WITH_ARGMAX}, got {short(one)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | torch.SymFloat | torch.SymInt) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------------------------------
# Functions and groups
# ---------------------------------------------------------------------------------------------------------------------


def process_group(name: str, value: Any) -> None:
    """A torch.distributed.ProcessGroup."""
    if not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(
            f"{name}: expected a torch.distributed.ProcessGroup or None, got {short(value)}; "
            "a device mesh has one: mesh.get_group('tp')"
        )


def loss_fn(name: str, value: Any) -> None:
    """A callable; `check_loss_fn` checks its signature."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function that returns the loss, got {short(value)}")


def check_loss_fn(value: Callable[..., Any], arguments: str) -> None:
    """Check that a loss function accepts these positional arguments, if its signature is known."""
    if torch.compiler.is_compiling():
        return
    count = arguments.count(",") + 1
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        raise TypeError(
            f"loss_fn: expected a function loss_fn({arguments}) of {count} positional arguments, got one that takes "
            f"{reprlib.repr(str(signature))[1:-1]}: {error}; functools.partial fixes further arguments"
        ) from None
