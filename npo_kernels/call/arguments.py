"""Each argument of a public function by itself: its type and its range, for all functions in one table.

`checked` wraps a public function. Every parameter of the function must have a rule in `RULES`, or importing the package
fails, so that no function and no argument can be forgotten. What depends on two arguments (shapes, dtypes, devices) is
checked by `npo_kernels.call.checks` afterwards.
"""

import functools
import inspect
import reprlib
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

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
FORWARD_MODE = (
    "{}: forward-mode derivatives (torch.func.jvp, jacfwd, hessian, dual tensors) do not exist here, and the tangent "
    "would be lost: use torch.autograd.grad, or impl='reference', which has derivatives of any kind"
)
FUNCTIONAL = (
    "{}: the derivatives of torch.func (grad, vjp, jacrev, hessian) do not reach custom operators: use "
    "torch.autograd.grad, or impl='reference', which has derivatives of any kind"
)


def checked(function: Callable) -> Callable:
    """A public function that checks each of its arguments before it runs, and refuses those it does not have."""
    names = tuple(inspect.signature(function).parameters)
    missing = [name for name in names if name not in RULES]
    if missing:
        raise NotImplementedError(f"{function.__name__}: no rule in npo_kernels.call.arguments.RULES for {missing}")

    @functools.wraps(function)
    def call(*args, **kwargs):
        check_each(function.__name__, names, args, kwargs)
        return function(*args, **kwargs)

    return call


def check_each(function: str, names: tuple[str, ...], args: tuple, kwargs: dict) -> None:
    """Every given argument against its rule."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name, value in given.items():
        if name not in names:
            hint = _ELSEWHERE.get(name, f"see help(npo_kernels.{function}) for the arguments it takes")
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}': {hint}")
        RULES[name](name, value)
    if given.get("impl") != "reference" and not torch.compiler.is_compiling():
        for name, value in given.items():
            _plain_autograd(name, value)


def _plain_autograd(name: str, value) -> None:
    """Refuse tensors of the derivatives that operators with a backward of their own do not have."""
    if not isinstance(value, Tensor):
        return
    if forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(FORWARD_MODE.format(name))
    if torch._C._functorch.is_gradtrackingtensor(value):
        raise NotImplementedError(FUNCTIONAL.format(name))


def describe(value) -> str:
    """What came, in a line: shape, dtype and device of a tensor, the beginning of anything else."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    text = reprlib.repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ---------------------------------------------------------------------------------------------------------------------
# Rules: (name, value) -> None, or an error
# ---------------------------------------------------------------------------------------------------------------------


def _tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(value)}")
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        kind = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        way = "dequantize()" if value.is_quantized else "to_padded_tensor(0.0)" if value.is_nested else "to_dense()"
        raise TypeError(f"{name}: expected a dense torch.Tensor, got a {kind} one: convert it with .{way}")


def _values(name: str, value) -> None:
    """A tensor that is not on meta. Those that are not checked here are told by the device of `hidden`."""
    _tensor(name, value)
    if value.device.type == "meta":
        raise ValueError(
            f"{name}: expected a tensor with values, got {describe(value)}, where tensors have shapes only: load the "
            "model's weights, or move it to a device (module.to_empty(device=...)), first"
        )


def _number(condition: Callable[[float], bool], expected: str, optional: bool = False) -> Callable:
    def rule(name: str, value) -> None:
        if optional and value is None:
            return
        if not _is_number(value) or not (abs(value) <= sys.float_info.max and condition(value)):
            wanted = f"{expected} or None" if optional else expected
            raise ValueError(f"{name}: expected {wanted}, got {_short(value)}")

    return rule


def _choice(*options: str) -> Callable:
    def rule(name: str, value) -> None:
        if not isinstance(value, str) or value not in options:
            raise ValueError(f"{name}: expected one of {options}, got {_short(value)}")

    return rule


def _flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_short(value)}")


def _ignore_index(name: str, value) -> None:
    if not _is_int(value):
        raise TypeError(f"{name}: expected an int, got {_short(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int that int64 labels can hold, got {value}")


def _num_rows(name: str, value) -> None:
    if value is None or isinstance(value, torch.SymInt):
        return
    if not _is_int(value) or not 0 <= value < 2**63:
        raise ValueError(f"{name}: expected the number of scored positions or None, got {_short(value)}")


def _normalizer(name: str, value) -> None:
    if not isinstance(value, Tensor):
        _number(lambda x: x > 0, "a positive number or a 0-d tensor")(name, value)
        return
    _values(name, value)
    real = value.is_floating_point() or (not value.is_complex() and value.dtype != torch.bool)
    if value.dim() != 0 or not real:
        raise ValueError(f"{name}: expected a positive number or a 0-d tensor, got {describe(value)}")
    _constant(name, value, "count sequences under torch.no_grad()")


def _ref_logps(name: str, value) -> None:
    _tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: expected float32, got {describe(value)}; a 16-bit sum near -1000 is off by several nats, "
            "cache it from sequence_logprobs, which returns float32"
        )
    _constant(name, value, "compute it under torch.no_grad()")


def _constant(name: str, value: Tensor, way: str) -> None:
    """Of a tensor that gets no gradient: one that wants one would lose it without a word."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a constant, got {describe(value)} that requires grad: {way}, or detach() it"
        )


def _process_group(name: str, value) -> None:
    if value is not None and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(
            f"{name}: expected a torch.distributed.ProcessGroup or None, got {_short(value)}; "
            "a device mesh has one: mesh.get_group('tp')"
        )


def _loss_fn(name: str, value) -> None:
    if not callable(value):
        raise TypeError(f"{name}: expected a function loss_fn(logps, num_tokens), got {_short(value)}")
    if torch.compiler.is_compiling():
        return
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"{name}: expected a function loss_fn(logps, num_tokens) of two positional arguments, got one that takes "
            f"{signature}: {error}; functools.partial fixes further arguments"
        ) from None


def _optional(rule: Callable) -> Callable:
    return lambda name, value: None if value is None else rule(name, value)


def _is_number(value) -> bool:
    return isinstance(value, int | float | torch.SymFloat | torch.SymInt) and not isinstance(value, bool)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value) -> str:
    """What came where a number or a name was expected; the type only where the value does not show it."""
    plain = value is None or isinstance(value, bool | int | float | str | torch.SymInt | torch.SymFloat)
    return reprlib.repr(value) if plain else describe(value)


_positive = _number(lambda x: x > 0, "a positive number")
RULES: dict[str, Callable] = {
    "hidden": _values,
    "lm_head_weight": _tensor,
    "labels": _tensor,
    "bias": _optional(_tensor),
    "cu_seqlens": _optional(_tensor),
    "ref_hidden": _values,
    "ref_lm_head_weight": _tensor,
    "ref_bias": _optional(_tensor),
    "mask": _optional(_tensor),
    "ref_logps": _ref_logps,
    "loss_fn": _loss_fn,
    "beta": _positive,
    "gamma": _number(lambda x: True, "a finite number"),
    "logit_scale": _number(lambda x: x != 0, "a finite non-zero number"),
    "softcap": _number(lambda x: x > 0, "a positive number", optional=True),
    "workspace_mb": _number(lambda x: x > 0, "a positive number of MiB", optional=True),
    "normalizer": _optional(_normalizer),
    "num_rows": _num_rows,
    "ignore_index": _ignore_index,
    "shift": _flag,
    "return_stats": _flag,
    "reduction": _choice(*REDUCTIONS),
    "impl": _choice(*IMPLS),
    "process_group": _process_group,
}
