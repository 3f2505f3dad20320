"""Operators whose arguments and results are records: named tuples and dataclasses.

torch passes flat lists of tensors and numbers to an operator, to its fake, to the setup of its autograd and to its
backward. Here the list is derived from a record: its fields in order, with nested records expanded in place. Each
argument is declared only once, and no code depends on positions in the list.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from itertools import count
from operator import attrgetter, itemgetter
from types import GenericAlias
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor

Record = TypeVar("Record")
Arguments = TypeVar("Arguments")
Results = TypeVar("Results")
Saved = TypeVar("Saved")

SECOND_DERIVATIVE = (
    "npo_kernels has no second derivatives: the kernels form first gradients only. Use impl='reference' where "
    "create_graph=True is needed, or detach the loss from the part that is differentiated twice"
)


class Schema(Generic[Record]):
    """Converts between a record and its flat list of values.

    Every call of an operator converts several times, so the conversions are made once from the fields. Dynamo cannot
    trace these; under torch.compile the fields are walked instead.
    """

    def __init__(self, record: type[Record]):
        self.record = record
        self.fields: list[tuple[str, Schema[Any] | None]] = []  # a nested record has a schema of its own
        self.leaves: dict[str, Any] = {}  # dotted name -> annotation
        for name, annotation in get_type_hints(record).items():
            nested: Schema[Any] | None = Schema(annotation) if is_record(annotation) else None
            self.fields.append((name, nested))
            leaves = {"": annotation} if nested is None else {f".{leaf}": a for leaf, a in nested.leaves.items()}
            self.leaves |= {name + leaf: a for leaf, a in leaves.items()}
        values = attrgetter(*self.leaves)
        self._flatten = values if len(self.leaves) > 1 else lambda record: (values(record),)
        self._build = self._builder(count())

    def flatten(self, record: Record) -> Sequence[Any]:
        """The values of a record."""
        if not torch.compiler.is_compiling():
            return self._flatten(record)
        flat: list[Any] = []
        for name, nested in self.fields:
            value = getattr(record, name)
            flat += [value] if nested is None else nested.flatten(value)
        return flat

    def build(self, flat: Sequence[Any]) -> Record:
        """The record of a list of values."""
        if not torch.compiler.is_compiling():
            return self._build(flat)
        values, i = [], 0
        for _, nested in self.fields:
            width = 1 if nested is None else len(nested.leaves)
            values.append(flat[i] if nested is None else nested.build(flat[i : i + width]))
            i += width
        return self.record(*values)

    def _builder(self, positions: Iterator[int]) -> Callable[[Sequence[Any]], Record]:
        """A function that builds the record from the values at the next positions of a flat list."""
        parts = [
            itemgetter(next(positions)) if nested is None else nested._builder(positions) for _, nested in self.fields
        ]
        return lambda flat: self.record(*[part(flat) for part in parts])


def is_record(annotation: Any) -> bool:
    return is_dataclass(annotation) or hasattr(annotation, "_fields")


class Operator(Generic[Arguments, Results]):
    """A custom torch operator, npo_kernels::<name>, from a function that maps a record to a record of tensors.

    It must be functional: no state, no mutation, and no result that is a view of an argument or another result.
    """

    def __init__(self, name: str, run: Callable[[Arguments], Results]):
        self.name = name
        arguments, results = get_type_hints(run).values()
        self.arguments: Schema[Arguments] = Schema(arguments)
        self.results: Schema[Results] = Schema(results)

        def run_flat(*flat: Any) -> tuple[Tensor, ...]:
            with without_autocast(flat[0]):
                return tuple(self.results.flatten(run(self.arguments.build(flat))))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            inspect.Parameter(name.replace(".", "_"), kind, annotation=annotation)
            for name, annotation in self.arguments.leaves.items()
        ]
        returns = GenericAlias(tuple, tuple(self.results.leaves.values()))
        vars(run_flat)["__signature__"] = inspect.Signature(parameters, return_annotation=returns)  # read by torch
        self.op = torch.library.custom_op(f"npo_kernels::{name}", run_flat, mutates_args=())
        self.function: type[torch.autograd.Function] | None = None  # the operator and its backward

    def __call__(self, arguments: Arguments) -> Results:
        flat = self.arguments.flatten(arguments)
        # The autograd that torch makes for an operator converts its whole schema twice for each argument, which takes a
        # third of a millisecond with 23 of them. An autograd.Function around the operator does the same without that.
        # torch.compile and the transforms of torch.func need the operator itself.
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if self.function is None or traced or not torch.is_grad_enabled():
            return self.results.build(self.op(*flat))
        return self.results.build(self.function.apply(*flat))  # type: ignore[no-untyped-call]

    def register_fake(self, fake: Callable[[Arguments], Results]) -> None:
        """Register the fake implementation: shapes and dtypes of the results, for tracing."""

        @self.op.register_fake
        def _(*flat: Any) -> tuple[Tensor, ...]:
            return tuple(self.results.flatten(fake(self.arguments.build(flat))))

    def register_backward(
        self,
        save: Callable[[Arguments, Results], Saved],
        backward: Callable[[Saved, Results], Sequence[Tensor | None]],
        of: Sequence[str],
    ) -> None:
        """Register the backward.

        `save(arguments, results)` returns what the backward needs. `backward(saved, upstream)` gets the upstream
        gradients of the results (None for a result without one) and returns the gradients of the arguments with the
        dotted names `of`.
        """
        unknown = set(of) - set(self.arguments.leaves)
        if unknown:
            raise ValueError(
                f"no arguments {sorted(unknown)} of the operator: expected some of {[*self.arguments.leaves]}"
            )
        saved: Schema[Saved] = Schema(next(iter(get_type_hints(backward).values())))

        def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.set_materialize_grads(False)  # do not allocate zeros for results without gradient
            flat = saved.flatten(save(self.arguments.build(inputs), self.results.build(output)))
            # autograd refuses to save inference tensors (a teacher's hidden states), which have no version counter to
            # detect in-place changes; they are kept on ctx instead
            saves = [isinstance(value, Tensor) and not value.is_inference() for value in flat]
            ctx.save_for_backward(*(value if saved else None for value, saved in zip(flat, saves, strict=True)))
            ctx.constants = [None if saved else value for value, saved in zip(flat, saves, strict=True)]

        def run_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            flat = [c if t is None else t for t, c in zip(ctx.saved_tensors, ctx.constants, strict=True)]
            grads = dict(zip(of, backward(saved.build(flat), self.results.build(upstream)), strict=True))
            return tuple(grads.get(name) for name in self.arguments.leaves)

        self.op.register_autograd(run_backward, setup_context=setup)

        def run(ctx: Any, *flat: Any) -> tuple[Tensor, ...]:
            output: tuple[Tensor, ...] = self.op(*flat)
            setup(ctx, flat, output)
            return output

        methods = {"forward": staticmethod(run), "backward": staticmethod(run_backward)}
        self.function = type(self.name, (torch.autograd.Function,), methods)  # autograd's errors show the name

    def refuse_second_derivative(self) -> None:
        """Make a second derivative of an operator that computes gradients raise, instead of being zero."""
        self.op.register_autograd(no_second_derivative)


def operator(name: str) -> Callable[[Callable[[Arguments], Results]], Operator[Arguments, Results]]:
    """Decorate a function to make it an `Operator`."""
    return lambda run: Operator(name, run)


@contextmanager
def without_autocast(tensor: Tensor) -> Iterator[None]:
    """Context without autocast, with the device of the tensor as the current one.

    Autocast was already applied to the inputs, and here it would round float32 sums. Triton launches on the current
    device.
    """
    kind = tensor.device.type
    off = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with off, torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        yield


def no_second_derivative(ctx: Any, *_: Any) -> None:
    """The backward of operators that compute gradients: raises NotImplementedError."""
    raise NotImplementedError(SECOND_DERIVATIVE)
