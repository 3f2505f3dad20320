"""The arguments of the public functions: their types, defaults, and the rule that checks each value.

`CallOptions` declares the keywords shared by all losses and log-probability functions, one per line. The functions take
them as `**options: Unpack[CallOptions]`, which type checkers understand. `checked` wraps a public function: it exposes
the complete signature to `help` and `inspect`, fills in the defaults, and checks every value. A parameter without a
rule raises at import, so none can be forgotten. Conditions on several arguments (shapes, dtypes, devices) are checked
afterwards by `npo_kernels.call.checks`.

Tensors must be a dense torch.Tensor or torch.nn.Parameter, or a subclass that does not override its operations.
Subclasses that do (quantised, masked, DTensor except for a head) are refused, and so are sparse, nested and complex
tensors. Numbers must be Python numbers that float32 can hold.
"""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, ForwardRef, Literal, NamedTuple, ParamSpec, TypedDict, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from npo_kernels.call import rules
from npo_kernels.call.rules import Rule, describe, optional

Impl = Literal["auto", "triton", "torch", "reference"]
Reduction = Literal["mean", "sum", "none"]
Direction = Literal["forward", "reverse"]
P = ParamSpec("P")
R = TypeVar("R")

# {argument name in other libraries: {argument of this function: hint}}: shown if the function has that argument.
_HINTS = {
    "attention_mask": {
        "cu_seqlens": "mask positions by setting their label to ignore_index (packed batches take cu_seqlens alone)",
        "mask": "mask takes the positions that count, as bool",
    },
    "position_ids": {"cu_seqlens": "packed batches take cu_seqlens (B+1,)"},
    "cu_seq_lens_q": {"cu_seqlens": "it is called cu_seqlens here"},
    "shift_labels": {"shift": "pass them as labels with shift=False", "labels": "pass them as labels"},
    "target": {"labels": "it is called labels here"},
    "weight": {"lm_head_weight": "it is called lm_head_weight here"},
    "linear_bias": {"bias": "it is called bias here"},
    "lm_head_bias": {"bias": "it is called bias here"},
    "temperature": {"logit_scale": "use logit_scale=1/temperature"},
    "final_logit_softcapping": {"softcap": "it is called softcap here"},
    "ref_hidden": {"ref_logps": "the reference enters as ref_logps, its cached sequence log-probabilities"},
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
    """Decorate a public function: check each argument before it runs, and refuse unknown ones with a hint."""
    signature = full_signature(function)
    arguments = Arguments.of(function.__name__, signature)
    defaults = {name: option.default for name, option in OPTIONS.items() if name in arguments.rules}
    takes_options = signature != inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments.check(args, kwargs)
        if takes_options:
            return function(*args, **{**defaults, **kwargs})
        return function(*args, **kwargs)

    vars(call)["__signature__"] = signature
    return call


def full_signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function, with `**options: Unpack[SomeTypedDict]` expanded into its keywords."""
    signature = inspect.signature(function)
    *parameters, last = signature.parameters.values()
    if last.kind is not inspect.Parameter.VAR_KEYWORD:
        return signature
    (options,) = get_args(last.annotation)
    for name, annotation in options.__annotations__.items():
        declared, default = annotation.__origin__, annotation.__metadata__[0].default
        if isinstance(declared, ForwardRef):  # ProcessGroup does not exist in a torch without distributed
            declared = declared.__forward_arg__
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=declared))
    return signature.replace(parameters=parameters)


class Arguments(NamedTuple):
    """The parameters of a public function, with their rules."""

    function: str
    rules: dict[str, Rule]  # for each parameter, in order; None is accepted if it is the default
    positional: int  # how many parameters may be passed by position

    @classmethod
    def of(cls, function: str, signature: inspect.Signature) -> "Arguments":
        parameters = signature.parameters
        missing = [name for name in parameters if name not in RULES]
        if missing:
            raise NotImplementedError(f"{function}: no rule in npo_kernels.call.arguments for {missing}")
        rules = {name: optional(RULES[name]) if p.default is None else RULES[name] for name, p in parameters.items()}
        return cls(function, rules, sum(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in parameters.values()))

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check every argument against its rule, and all tensors for unsupported modes of torch."""
        given = {**dict(zip(self.rules, args, strict=False)), **kwargs}
        if len(args) > self.positional or len(given) < len(args) + len(kwargs):
            self._refuse_positions(args, kwargs)
        for name, value in given.items():
            if name not in self.rules:
                raise TypeError(f"{self.function}() got an unexpected keyword argument '{name}': {self._hint(name)}")
            self.rules[name](name, value)
        if not torch.compiler.is_compiling():
            tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
            _check_modes(tensors)
            if given.get("impl") != "reference":
                for name, value in tensors.items():
                    _plain_autograd(name, value)

    def _refuse_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(self.rules)[: self.positional]
        if len(args) > self.positional:
            raise TypeError(
                f"{self.function}() takes {len(names)} positional arguments ({', '.join(names)}), got {len(args)}: "
                f"pass {list(self.rules)[len(names)]} and all further arguments by name"
            )
        twice = next(name for name in names[: len(args)] if name in kwargs)
        raise TypeError(f"{self.function}() got '{twice}' twice, by position and by name: leave one out")

    def _hint(self, name: str) -> str:
        """A hint for an argument that does not exist: what to write instead."""
        for instead, hint in _HINTS.get(name, {}).items():
            if instead in self.rules:
                return hint
        close = difflib.get_close_matches(name, self.rules, n=1, cutoff=0.7)
        see = f"see help(npo_kernels.{self.function}) for the arguments it takes"
        return f"did you mean '{close[0]}'? Or {see}" if close else see


def _check_modes(tensors: dict[str, Tensor]) -> None:
    """Refuse what torch would refuse deep inside an operator: a mix of fake and real tensors, and autograd's
    ZeroTensors, which have no memory that a kernel could read."""
    fake = [name for name, value in tensors.items() if type(value).__name__ == "FakeTensor"]
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if fake or mode is not None:
        of: Any = mode or tensors[fake[0]]
        allowed = getattr(of, "fake_mode", of).allow_non_fake_inputs
        real = [name for name, value in tensors.items() if type(value) in (Tensor, torch.nn.Parameter)]
        real = [name for name in real if not _is_wrapped(tensors[name])]
        if real and not allowed:
            beside = f"the FakeTensor {fake[0]}" if fake else "an active FakeTensorMode"
            raise TypeError(
                f"{real[0]}: expected a FakeTensor, got {describe(tensors[real[0]])} with values beside {beside}: make "
                "all tensors of a call fake (mode.from_tensor), or none"
            )
    for name, value in tensors.items():
        if value._is_zerotensor():
            raise TypeError(
                f"{name}: expected a tensor with a memory, got a ZeroTensor {describe(value)} of torch's autograd: "
                "clone() it"
            )


def _is_wrapped(value: Tensor) -> bool:
    """Whether functorch or functionalization wraps it in a C++ class; the wrapped tensor may be fake."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value) or torch._is_functional_tensor(value)


def _plain_autograd(name: str, value: Tensor) -> None:
    """Refuse dual tensors and torch.func gradient tensors: custom operators support neither."""
    if forward_ad.unpack_dual(value).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(FORWARD_MODE.format(name))
    if torch._C._functorch.is_gradtrackingtensor(value):
        raise NotImplementedError(FUNCTIONAL.format(name))


# ---------------------------------------------------------------------------------------------------------------------
# The arguments
# ---------------------------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """The default of a keyword, and the rule for its value."""

    default: Any
    rule: Rule


class CallOptions(TypedDict, total=False):
    """Keywords of every loss and log-probability function; documented in `sequence_logprobs`."""

    bias: Annotated[Tensor | None, Option(None, optional(rules.head_tensor))]
    shift: Annotated[bool, Option(True, rules.flag)]
    cu_seqlens: Annotated[Tensor | None, Option(None, optional(rules.tensor))]
    ignore_index: Annotated[int, Option(-100, rules.integer)]
    logit_scale: Annotated[float, Option(1.0, rules.number(rules.nonzero, "a finite non-zero number"))]
    softcap: Annotated[float | None, Option(None, optional(rules.number(rules.positive, "a positive number or None")))]
    impl: Annotated[Impl, Option("auto", rules.choice(*get_args(Impl)))]
    workspace_mb: Annotated[
        float | None, Option(None, optional(rules.number(rules.any_positive, "a positive number of MiB or None")))
    ]
    num_rows: Annotated[int | None, Option(None, optional(rules.num_rows))]
    process_group: Annotated["dist.ProcessGroup | None", Option(None, optional(rules.process_group))]


class LossOptions(CallOptions, total=False):
    """Keywords of the losses that reduce over sequences; documented in `fused_npo_loss`."""

    reduction: Annotated[Reduction, Option("mean", rules.choice(*get_args(Reduction)))]
    normalizer: Annotated[float | Tensor | None, Option(None, optional(rules.normalizer))]
    weights: Annotated[Tensor | None, Option(None, optional(rules.weights))]


OPTIONS: dict[str, Option] = {
    name: annotation.__metadata__[0] for name, annotation in LossOptions.__annotations__.items()
}
RULES: dict[str, Rule] = {
    "hidden": rules.values,
    "lm_head_weight": rules.head_tensor,
    "labels": rules.tensor,
    "ref_hidden": rules.values,
    "ref_lm_head_weight": rules.head_tensor,
    "ref_bias": optional(rules.head_tensor),
    "mask": optional(rules.tensor),
    "ref_logps": rules.ref_logps,
    "loss_fn": rules.loss_fn,
    "which": rules.statistics,
    "beta": rules.number(rules.positive, "a positive number"),
    "gamma": rules.number(rules.finite, "a finite number"),
    "target_shift": rules.number(rules.finite, "a finite number"),
    "direction": rules.choice(*get_args(Direction)),
    "return_stats": rules.flag,
    **{name: option.rule for name, option in OPTIONS.items()},
}
