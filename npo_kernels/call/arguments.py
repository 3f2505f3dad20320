"""Each argument of a public function by itself: its type, its default and the rule that its value has to obey.

`CallOptions` declares the keywords that all losses and log-probability functions share, a line each. The functions take
them as `**options: Unpack[CallOptions]`, which type checkers read. `checked` wraps a public function: it shows the
whole signature to `help` and `inspect`, puts the defaults in, and checks every value. A parameter without a rule fails
at import, so that none can be forgotten. What depends on two arguments (shapes, dtypes, devices) is checked by
`npo_kernels.call.checks` afterwards.
"""

import functools
import inspect
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ForwardRef, Literal, NamedTuple, ParamSpec, TypedDict, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from npo_kernels.core.row_moments import WITH_ARGMAX

Impl = Literal["auto", "triton", "torch", "reference"]
Reduction = Literal["mean", "sum", "none"]
Direction = Literal["forward", "reverse"]
Rule = Callable[[str, Any], None]  # (name, value) -> None, or an error
P = ParamSpec("P")
R = TypeVar("R")

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


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A public function that checks each of its arguments before it runs, and refuses those it does not have."""
    signature = full_signature(function)
    rules = rules_of(function.__name__, signature)
    defaults = {name: option.default for name, option in OPTIONS.items() if name in rules}
    takes_options = signature != inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_each(function.__name__, rules, args, kwargs)
        if takes_options:
            return function(*args, **{**defaults, **kwargs})
        return function(*args, **kwargs)

    vars(call)["__signature__"] = signature
    return call


def full_signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function, `**options: Unpack[SomeTypedDict]` replaced by the keywords it stands for."""
    signature = inspect.signature(function)
    *parameters, last = signature.parameters.values()
    if last.kind is not inspect.Parameter.VAR_KEYWORD:
        return signature
    (options,) = get_args(last.annotation)
    for name, annotation in options.__annotations__.items():
        declared, default = annotation.__origin__, annotation.__metadata__[0].default
        if isinstance(declared, ForwardRef):  # a type that is missing where torch has no distributed package
            declared = declared.__forward_arg__
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=declared))
    return signature.replace(parameters=parameters)


def rules_of(function: str, signature: inspect.Signature) -> dict[str, Rule]:
    """The rule of each parameter, in order; None passes where it is the default."""
    parameters = signature.parameters
    missing = [name for name in parameters if name not in RULES]
    if missing:
        raise NotImplementedError(f"{function}: no rule in npo_kernels.call.arguments for {missing}")
    return {name: _optional(RULES[name]) if p.default is None else RULES[name] for name, p in parameters.items()}


def check_each(function: str, rules: dict[str, Rule], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Every given argument against its rule."""
    given = {**dict(zip(rules, args, strict=False)), **kwargs}
    for name, value in given.items():
        if name not in rules:
            hint = _ELSEWHERE.get(name, f"see help(npo_kernels.{function}) for the arguments it takes")
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}': {hint}")
        rules[name](name, value)
    if given.get("impl") != "reference" and not torch.compiler.is_compiling():
        for name, value in given.items():
            _plain_autograd(name, value)


def _plain_autograd(name: str, value: Any) -> None:
    """Refuse tensors of the derivatives that operators with a backward of their own do not have."""
    if not isinstance(value, Tensor):
        return
    if forward_ad.unpack_dual(value).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(FORWARD_MODE.format(name))
    if torch._C._functorch.is_gradtrackingtensor(value):
        raise NotImplementedError(FUNCTIONAL.format(name))


def describe(value: Any) -> str:
    """What came, in a line: shape, dtype and device of a tensor, the beginning of anything else."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    text = reprlib.repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ---------------------------------------------------------------------------------------------------------------------
# Rules: (name, value) -> None, or an error
# ---------------------------------------------------------------------------------------------------------------------


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(value)}")
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        kind = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        way = "dequantize()" if value.is_quantized else "to_padded_tensor(0.0)" if value.is_nested else "to_dense()"
        raise TypeError(f"{name}: expected a dense torch.Tensor, got a {kind} one: convert it with .{way}")


def _values(name: str, value: Any) -> None:
    """A tensor that is not on meta. Those that are not checked here are told by the device of `hidden`."""
    _tensor(name, value)
    if value.device.type == "meta":
        raise ValueError(
            f"{name}: expected a tensor with values, got {describe(value)}, where tensors have shapes only: load the "
            "model's weights, or move it to a device (module.to_empty(device=...)), first"
        )


def _number(condition: Callable[[float], bool], expected: str, optional: bool = False) -> Rule:
    def rule(name: str, value: Any) -> None:
        if optional and value is None:
            return
        if not _is_number(value) or not (abs(value) <= sys.float_info.max and condition(value)):
            wanted = f"{expected} or None" if optional else expected
            raise ValueError(f"{name}: expected {wanted}, got {_short(value)}")

    return rule


def _choice(*options: str) -> Rule:
    def rule(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in options:
            raise ValueError(f"{name}: expected one of {options}, got {_short(value)}")

    return rule


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_short(value)}")


def _ignore_index(name: str, value: Any) -> None:
    if not _is_int(value):
        raise TypeError(f"{name}: expected an int, got {_short(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int that int64 labels can hold, got {value}")


def _num_rows(name: str, value: Any) -> None:
    if value is None or isinstance(value, torch.SymInt):
        return
    if not _is_int(value) or not 0 <= value < 2**63:
        raise ValueError(f"{name}: expected the number of scored positions or None, got {_short(value)}")


def _normalizer(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        _number(lambda x: x > 0, "a positive number or a 0-d tensor")(name, value)
        return
    _values(name, value)
    real = value.is_floating_point() or (not value.is_complex() and value.dtype != torch.bool)
    if value.dim() != 0 or not real:
        raise ValueError(f"{name}: expected a positive number or a 0-d tensor, got {describe(value)}")
    _constant(name, value, "count sequences under torch.no_grad()")


def _ref_logps(name: str, value: Any) -> None:
    _tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: expected float32, got {describe(value)}; a 16-bit sum near -1000 is off by several nats, "
            "cache it from sequence_logprobs, which returns float32"
        )
    _constant(name, value, "compute it under torch.no_grad()")


def _weights(name: str, value: Any) -> None:
    _tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name}: expected real factors, got {describe(value)}")
    _constant(name, value, "compute the influence of a sequence under torch.no_grad()")


def _constant(name: str, value: Tensor, way: str) -> None:
    """Of a tensor that gets no gradient: one that wants one would lose it without a word."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a constant, got {describe(value)} that requires grad: {way}, or detach() it"
        )


def _process_group(name: str, value: Any) -> None:
    if value is not None and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(
            f"{name}: expected a torch.distributed.ProcessGroup or None, got {_short(value)}; "
            "a device mesh has one: mesh.get_group('tp')"
        )


def _loss_fn(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name}: expected a function that returns the loss, got {_short(value)}")


def check_loss_fn(value: Callable[..., Any], arguments: str) -> None:
    """That it takes such positional arguments, as far as its signature says."""
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
            f"{signature}: {error}; functools.partial fixes further arguments"
        ) from None


def _which(name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list of names out of {WITH_ARGMAX}, got {_short(value)}")
    for one in value:
        if not isinstance(one, str) or one not in WITH_ARGMAX:
            raise ValueError(f"{name}: expected names out of {WITH_ARGMAX}, got {_short(one)}")


def _optional(rule: Rule) -> Rule:
    return lambda name, value: None if value is None else rule(name, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | torch.SymFloat | torch.SymInt) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """What came where a number or a name was expected; the type only where the value does not show it."""
    plain = value is None or isinstance(value, bool | int | float | str | torch.SymInt | torch.SymFloat)
    return reprlib.repr(value) if plain else describe(value)


# ---------------------------------------------------------------------------------------------------------------------
# The arguments
# ---------------------------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """What a keyword is when it is not given, and what it has to be when it is."""

    default: Any
    rule: Rule


class CallOptions(TypedDict, total=False):
    """Keywords of every loss and log-probability function; `sequence_logprobs` says what they mean."""

    bias: Annotated[Tensor | None, Option(None, _optional(_tensor))]
    shift: Annotated[bool, Option(True, _flag)]
    cu_seqlens: Annotated[Tensor | None, Option(None, _optional(_tensor))]
    ignore_index: Annotated[int, Option(-100, _ignore_index)]
    logit_scale: Annotated[float, Option(1.0, _number(lambda x: x != 0, "a finite non-zero number"))]
    softcap: Annotated[float | None, Option(None, _number(lambda x: x > 0, "a positive number", optional=True))]
    impl: Annotated[Impl, Option("auto", _choice(*get_args(Impl)))]
    workspace_mb: Annotated[
        float | None, Option(None, _number(lambda x: x > 0, "a positive number of MiB", optional=True))
    ]
    num_rows: Annotated[int | None, Option(None, _num_rows)]
    process_group: Annotated["dist.ProcessGroup | None", Option(None, _process_group)]


class LossOptions(CallOptions, total=False):
    """Those of the losses that reduce over sequences; `fused_npo_loss` says what they mean."""

    reduction: Annotated[Reduction, Option("mean", _choice(*get_args(Reduction)))]
    normalizer: Annotated[float | Tensor | None, Option(None, _optional(_normalizer))]
    weights: Annotated[Tensor | None, Option(None, _optional(_weights))]


OPTIONS: dict[str, Option] = {
    name: annotation.__metadata__[0] for name, annotation in LossOptions.__annotations__.items()
}
RULES: dict[str, Rule] = {
    "hidden": _values,
    "lm_head_weight": _tensor,
    "labels": _tensor,
    "ref_hidden": _values,
    "ref_lm_head_weight": _tensor,
    "ref_bias": _optional(_tensor),
    "mask": _optional(_tensor),
    "ref_logps": _ref_logps,
    "loss_fn": _loss_fn,
    "which": _which,
    "beta": _number(lambda x: x > 0, "a positive number"),
    "gamma": _number(lambda x: True, "a finite number"),
    "target_shift": _number(lambda x: abs(x) <= torch.finfo(torch.float32).max, "a number that float32 can hold"),
    "direction": _choice(*get_args(Direction)),
    "return_stats": _flag,
    **{name: option.rule for name, option in OPTIONS.items()},
}
