"""Operators from records: a field is an argument of the operator, of its fake and of its backward, and nothing else
has to be told of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from typing import get_type_hints

import pytest
import torch
from torch import Tensor

from npo_kernels.call.arguments import CallOptions
from npo_kernels.call.call import Call
from npo_kernels.call.prepare import CARRIED
from npo_kernels.ops.logprobs import LogpsCall, token_logps
from npo_kernels.ops.schema import Operator, Schema
from tests import support
from tests.support import make_batch


@dataclass(frozen=True)
class Scale:
    factor: Tensor
    power: float | None


@dataclass(frozen=True)
class Arguments:
    x: Tensor
    scale: Scale
    name: str
    sizes: Sequence[int]
    label_smoothing: float


@dataclass(frozen=True)
class Results:
    y: Tensor
    total: Tensor


@dataclass(frozen=True)
class Saved:
    arguments: Arguments


def values() -> Arguments:
    x, factor = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return Arguments(x, Scale(factor, None), "name", (1, 2), 0.25)


def test_a_record_is_flattened_in_order_and_built_again():
    schema, record = Schema(Arguments), values()
    flat = schema.flatten(record)
    assert list(schema.leaves) == ["x", "scale.factor", "scale.power", "name", "sizes", "label_smoothing"]
    assert flat[0] is record.x and flat[1] is record.scale.factor and list(flat[2:]) == [None, "name", (1, 2), 0.25]
    again = schema.build(flat)
    assert again.scale.factor is record.scale.factor and again.name == "name" and again.label_smoothing == 0.25


@pytest.fixture(scope="module")
def smoothed() -> Operator[Arguments, Results]:
    """y = (1 - label_smoothing) factor x."""

    def run(arguments: Arguments) -> Results:
        y = (1 - arguments.label_smoothing) * arguments.scale.factor * arguments.x
        return Results(y, y.sum())

    def save(arguments: Arguments, results: Results) -> Saved:
        return Saved(arguments)

    def backward(saved: Saved, upstream: Results) -> tuple[Tensor | None, ...]:
        given = saved.arguments
        grad = torch.zeros_like(given.x) if upstream.y is None else upstream.y
        grad = grad if upstream.total is None else grad + upstream.total
        kept = 1 - given.label_smoothing
        return kept * grad * given.scale.factor, kept * grad * given.x

    made = Operator("test_smoothed", run)
    made.register_fake(lambda arguments: Results(torch.empty_like(arguments.x), arguments.x.new_empty(())))
    made.register_backward(save, backward, of=("x", "scale.factor"))
    return made


def test_every_field_reaches_operator_fake_and_backward(smoothed):
    support.opcheck(smoothed, values())
    record = values()
    results = smoothed(record)
    (2 * results.y.sum() + results.total).backward()
    assert torch.allclose(results.y, 0.75 * record.scale.factor * record.x)
    assert torch.allclose(record.x.grad, 3 * 0.75 * record.scale.factor)
    assert torch.allclose(record.scale.factor.grad, 3 * 0.75 * record.x)


def test_a_gradient_of_what_is_no_argument_is_refused(smoothed):
    with pytest.raises(ValueError, match=r"no arguments \['factor'\].*scale.factor"):
        smoothed.register_backward(lambda a, r: Saved(a), lambda saved, upstream: (), of=("factor",))


def test_a_field_of_a_call_is_an_argument_of_the_operators():
    """What a new argument of all losses takes: a line in CallOptions, a field of Call, the formula that uses it."""
    names = [argument.name for argument in token_logps.op._opoverload._schema.arguments]
    assert names == [name.replace(".", "_") for name in Schema(LogpsCall).leaves]
    assert names[:-1] == [f"call_{name.replace('.', '_')}" for name in Schema(Call).leaves]
    call = support.call_of(make_batch(layout="packed"), "torch")
    wider = make_dataclass("Wider", [*get_type_hints(Call).items(), ("label_smoothing", float)])
    flat = Schema(wider).flatten(wider(**call._asdict(), label_smoothing=0.1))
    assert len(flat) == len(names) and flat[-1] == 0.1


def test_options_that_are_fields_of_a_call_travel_as_they_are():
    assert set(CARRIED) == {"cu_seqlens", "shift", "ignore_index", "num_rows"}
    assert set(CARRIED) == set(Call._fields) & set(CallOptions.__annotations__)
