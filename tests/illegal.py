"""Wrong values for the arguments of a public function, made from its signature.

The annotation of a parameter says of what kind it is, and a kind has its wrong values. So a new parameter gets its
illegal calls without anybody writing them, and one whose kind is not known here fails.
"""

import collections
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import as_masked_tensor

import npo_kernels

B, S, H, V = 2, 5, 8, 20
FUNCTIONS = {
    name: getattr(npo_kernels, name)
    for name in npo_kernels.__all__
    if inspect.isfunction(getattr(npo_kernels, name)) and name not in ("explain", "set_debug")
}
generator = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


REQUIRED = {
    "hidden": draw(B, S, H),
    "lm_head_weight": draw(V, H),
    "labels": torch.randint(0, V, (B, S), generator=generator),
    "ref_logps": torch.tensor([-9.0, -12.0]),
    "loss_fn": lambda logps, *counts: logps.sum(),
    "which": ["entropy"],
    "ref_hidden": draw(B, S, H),
    "ref_lm_head_weight": draw(V, H),
}
# the form of an optional tensor
OPTIONAL = {
    "bias": draw(V),
    "ref_bias": draw(V),
    "mask": torch.ones(B, S, dtype=torch.bool),
    "labels": REQUIRED["labels"],
    "weights": torch.tensor([1.0, 0.5]),
    "normalizer": torch.tensor(2.0),
    "cu_seqlens": torch.tensor([0, S, B * S], dtype=torch.int32),
}
FLOATS = (torch.float32,)  # of hidden; a head has the same
REAL = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip
LEGAL_DTYPES = {
    "hidden": FLOATS,
    "lm_head_weight": FLOATS,
    "bias": FLOATS,
    "ref_hidden": FLOATS,
    "ref_lm_head_weight": FLOATS,
    "ref_bias": FLOATS,
    "labels": (torch.int64,),
    "cu_seqlens": (torch.int32, torch.int64),
    "mask": (torch.bool,),
    "ref_logps": (torch.float32, torch.float64),
    "weights": (*REAL, torch.bool),
    "normalizer": REAL,
}
ALL_DTYPES = (
    *REAL, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Kinds
# ---------------------------------------------------------------------------------------------------------------------


def kinds_of(parameter: inspect.Parameter) -> set[type]:
    """The types that an annotation allows, of a generic one its origin; NoneType is one of them."""
    annotation = parameter.annotation
    if isinstance(annotation, str):
        return {getattr(torch.distributed, name.removeprefix("dist."), NoneType) for name in annotation.split(" | ")}
    if get_origin(annotation) in (Union, UnionType):
        parts = get_args(annotation)
    else:
        parts = (annotation,)
    return {get_origin(part) or part for part in parts}


def wrong_values(name: str, parameter: inspect.Parameter) -> Iterator[tuple[str, Any]]:
    """(what is wrong, value) for one parameter."""
    kinds = kinds_of(parameter)
    unknown = kinds - WRONG.keys() - {NoneType}
    if unknown or not kinds - {NoneType}:
        raise NotImplementedError(f"{name}: tests/illegal.py does not know what is wrong for {parameter.annotation}")
    for kind in kinds - {NoneType}:
        for what, value in WRONG[kind](name):
            other = Tensor if isinstance(value, Tensor) else type(value)
            if other is kind or other not in kinds:  # a value allowed by another part of the union is not wrong
                yield what, value
    if NoneType not in kinds:
        yield "None", None
    for value in OUT_OF_RANGE.get(name, ()):
        yield f"{value!r}"[:40], value


class Opaque:
    """An object that is no valid value of any kind, with a description of several lines."""

    def __repr__(self) -> str:
        return "an\nopaque\nthing " * 100


def no_number(name: str) -> Iterator[tuple[str, Any]]:
    one = torch.tensor(1.0)
    yield from {
        "string": "0.1", "empty string": "", "bytes": b"1", "list": [1.0], "long list": [0.5] * 10_000,
        "dict": {"a": 1}, "function": lambda: 0, "class": float, "object": Opaque(), "complex": 1j, "tensor": one,
        "vector": torch.ones(3), "tensor that requires grad": torch.tensor(1.0, requires_grad=True),
        "meta tensor": torch.ones((), device="meta"),
        "numpy.float32": np.float32(0.5), "numpy.int64": np.int64(3), "0-d array": np.array(0.5), "array": np.ones(9),
        "numpy.bool": np.bool_(True), "Decimal": Decimal("0.5"), "Fraction": Fraction(1, 2), "NaN": math.nan,
        "infinity": math.inf, "minus infinity": -math.inf, "huge int": 10**400, "minus huge int": -(10**400),
    }.items()  # fmt: skip


def no_float(name: str) -> Iterator[tuple[str, Any]]:
    yield from no_number(name)
    yield from {"True": True, "False": False}.items()
    if name != "workspace_mb":  # no factor of a loss: there may be as much as anybody likes
        yield from {"beyond float32": 1e39, "minus that": -1e39}.items()


def no_int(name: str) -> Iterator[tuple[str, Any]]:
    yield from no_number(name)
    yield from {"float": 3.0, "True": True, "False": False, "beyond int64": 2**63, "below int64": -(2**63) - 1}.items()


def no_flag(name: str) -> Iterator[tuple[str, Any]]:
    yield from no_number(name)
    yield from {"0": 0, "1": 1, "2.0": 2.0, "bool tensor": torch.tensor(True)}.items()


def no_choice(name: str) -> Iterator[tuple[str, Any]]:
    yield from no_number(name)
    yield from {"unknown": "unknown", "capital": "Mean", "with a space": "mean ", "True": True, "0": 0}.items()
    yield "long name", "mean" * 1000


def no_function(name: str) -> Iterator[tuple[str, Any]]:
    for what, value in no_number(name):
        if not callable(value):
            yield what, value
    yield from {"no arguments": lambda: 0, "one": lambda a: a, "four": lambda a, b, c, d: a, "a class": Opaque}.items()
    yield "many names", lambda *, first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth: 0


def no_names(name: str) -> Iterator[tuple[str, Any]]:
    for what, value in no_number(name):
        if what != "dict":
            yield what, value
    yield from {
        "one name": "entropy", "unknown": ["entropies"], "a number": [1], "None": [None], "list": [["entropy"]],
        "a set": {"entropy"}, "a generator": (n for n in ["entropy"]), "a dict": {"entropy": 1}, "bytes": [b"logp"],
        "array": np.array(["entropy"]),
    }.items()  # fmt: skip


def no_group(name: str) -> Iterator[tuple[str, Any]]:
    yield from no_number(name)
    yield from {"a name": "tp", "a rank": 0, "a class": torch.distributed.ProcessGroup}.items()


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


class Quantised(torch.Tensor):
    """As torchao and others have them: a tensor of floats to look at, with operations of its own."""

    @staticmethod
    def __new__(cls, plain: Tensor) -> "Quantised":
        return torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype, device=plain.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"deep inside: {function}")


def distributed_tensor(plain: Tensor) -> Tensor:
    """A DTensor on one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return DTensor.from_local(plain, init_device_mesh("cpu", (1,)), [Replicate()], run_check=False)


MAKERS: dict[str, Callable[[Tensor], Any]] = {
    "list": Tensor.tolist,
    "tuple": lambda t: tuple(t.flatten().tolist()),
    "array": lambda t: t.numpy(),
    "class": lambda t: Tensor,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse CSR": lambda t: t.to_sparse_csr(),
    "sparse CSC": lambda t: t.to_sparse_csc(),
    "sparse BSR": lambda t: t.to_sparse_bsr((1, 1)),
    "sparse BSC": lambda t: t.to_sparse_bsc((1, 1)),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "quantized by channel": lambda t: torch.quantize_per_channel(t, torch.ones(t.shape[0]), torch.zeros(t.shape[0]), 0,
                                                                 torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor([*t, t[0, :1]], layout=torch.jagged),
    "quantised subclass": Quantised,
    "masked": lambda t: as_masked_tensor(t, torch.ones_like(t, dtype=torch.bool)),
    "DTensor": distributed_tensor,
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "fake on another device": lambda t: FakeTensorMode().from_tensor(t.to("meta")),
    "zeros without a memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "lazy": lambda t: torch.nn.UninitializedParameter(dtype=t.dtype, requires_grad=False),
    "lazy buffer": lambda t: torch.nn.UninitializedBuffer(dtype=t.dtype),
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "two dimensions more": lambda t: t[None, None],
    "one sequence less": lambda t: t[:-1],
    "the last dimension longer": lambda t: torch.cat((t, t[..., :1]), -1),
    "the last dimension empty": lambda t: t[..., :0],
    "transposed": lambda t: t.transpose(0, -1) if len(set(t.shape)) > 1 else t[None],
}  # fmt: skip
# What is right after all: name of the parameter -> what
RIGHT = {
    "lm_head_weight": ("one sequence less",),  # without a bias, any V
    "ref_lm_head_weight": (),
    "cu_seqlens": ("one dimension less", "one sequence less", "the last dimension longer", "the last dimension empty"),
    "normalizer": ("list",),  # which is a number
}
CONSTANTS = ("ref_logps", "weights", "normalizer")


def no_tensor(name: str) -> Iterator[tuple[str, Any]]:
    for what, value in no_number(name):
        if not isinstance(value, Tensor):
            yield what, value
    good = OPTIONAL.get(name, REQUIRED.get(name))
    if good is None or name not in LEGAL_DTYPES:
        raise NotImplementedError(f"{name}: tests/illegal.py has no good tensor of this name, or not its dtypes")
    for dtype in set(ALL_DTYPES) - set(LEGAL_DTYPES[name]):
        yield str(dtype), good.to(dtype)
    if name in CONSTANTS:
        yield "requires grad", good.clone().requires_grad_()
        yield "part of a graph", good.clone().requires_grad_() * 2
    for what, make in MAKERS.items():
        if what not in RIGHT.get(name, ()):
            try:
                value = make(good)
            except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
                continue  # there is none of this dtype or rank
            yield what, value
    for what, value in WRONG_VALUES.get(name, lambda good: {})(good).items():
        yield what, value


def with_last(good: Tensor, value: float) -> Tensor:
    wrong = good.clone()
    wrong.view(-1)[-1] = value
    return wrong


# what is free to read on a CPU
WRONG_VALUES: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "labels": lambda t: {f"a label {x}": with_last(t, x) for x in (V, -1, -99, 2**40, -(2**63))},
    "cu_seqlens": lambda t: {f"offsets {x}": torch.tensor(x, dtype=torch.int32) for x in (
        [1, 5, 10], [0, 5, 9], [0, 5, 11], [0, 11, 10], [0, -1, 10], [5, 0, 10], [0, 5, 2**31 - 1], [0, 0, 0])},
    "ref_logps": lambda t: {f"{x}": with_last(t, x) for x in (math.nan, math.inf, -math.inf)},
    "weights": lambda t: {f"{x}": with_last(t, x) for x in (math.nan, math.inf, -math.inf, -1.0, -1e-30)},
    "normalizer": lambda t: {f"tensor({x})": torch.tensor(x) for x in (math.nan, math.inf, -math.inf, 0.0, -1.0, 0)},
}  # fmt: skip
# of numbers: what the kind does not say
OUT_OF_RANGE: dict[str, Sequence[Any]] = {
    "beta": (0, 0.0, -0.0, -0.1, 1e-39, -math.pi),
    "logit_scale": (0, 0.0, -0.0, 1e-39, -1e-39),
    "softcap": (0, 0.0, -30.0, 1e-39),
    "workspace_mb": (0, 0.0, -1, -0.5),
    "normalizer": (0, 0.0, -1, -2.5, 1e-39),
    "num_rows": (-1, -(2**40), 0, 3),  # too few
}
WRONG: dict[type, Callable[[str], Iterator[tuple[str, Any]]]] = {
    Tensor: no_tensor,
    float: no_float,
    int: no_int,
    bool: no_flag,
    Literal: no_choice,  # type: ignore[dict-item]
    collections.abc.Callable: no_function,
    collections.abc.Sequence: no_names,
    torch.distributed.ProcessGroup: no_group,
}


def good_arguments(function: Callable[..., Any], without_padding: bool = False) -> dict[str, Any]:
    """The arguments that have to be given; of a packed batch with its cu_seqlens."""
    parameters = inspect.signature(function).parameters
    good = {name: REQUIRED[name] for name, p in parameters.items() if p.default is p.empty}
    if without_padding:
        good |= {"hidden": good["hidden"].flatten(0, 1), "labels": good["labels"].flatten()}
        good["cu_seqlens"] = OPTIONAL["cu_seqlens"]
    return good
