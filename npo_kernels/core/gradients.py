"""dWeight and dBias: accumulated in float32 over slabs and vocabulary slices, rounded once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from npo_kernels.core.matmul import matmul
from npo_kernels.core.plan import GRAD_SLICE
from npo_kernels.core.task import BIAS_COLUMNS, Task

SMALLEST = torch.finfo(torch.float32).tiny
LARGEST_FLOAT16 = 15  # operands of a product are scaled to at most 2^15; float16 overflows at 2^16


@dataclass
class Gradients:
    """Gradients with the shapes and dtypes of the inputs (but see `Task.upstream_later`); None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None  # to be multiplied by `unit`, if there is one
    bias: Tensor | None
    unit: Tensor | None = None  # (V,) float32


def _power_of_two(value: Tensor) -> Tensor:
    """The smallest power of two above `value` > 0; dividing and multiplying by it changes no mantissa.

    Computed as a quotient, which every device rounds correctly. ldexp computes 2**n, which not every device does
    exactly.
    """
    return value / torch.frexp(value).mantissa


class HeadGradients:
    """Accumulates dWeight and dBias in float32 and rounds them once.

    With `accumulate`, or if the gradient is float32 anyway, the sum over chunks is kept in a float32 buffer of full
    size. Otherwise there is only one set of rows, and each vocabulary slice is finished in a float32 buffer of its own
    width. The bias is treated as the weight of a constant feature 1 (`BIAS_COLUMNS`).
    """

    def __init__(self, task: Task, accumulate: bool):
        self.backend = task.backend
        self.dtype, self.bias_dtype = task.head.weight.dtype, task.wide_dtype
        self.in_place = accumulate or self.dtype == torch.float32
        vocab_size, hidden_size = task.head.weight.shape
        device = task.head.weight.device
        dtype = torch.float32 if self.in_place else self.dtype
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device) if task.needs.weight else None
        self.bias = (
            torch.empty(vocab_size, BIAS_COLUMNS, dtype=torch.float32, device=device) if task.needs.bias else None
        )
        self.first = False  # True during the first set of rows, which writes the buffers that later ones add to
        self.empty = True
        in_units = task.needs.weight and task.upstream_later and self.dtype == torch.float16
        self.row_unit = torch.empty(vocab_size, dtype=torch.float32, device=device) if in_units else None

    def take_rows(
        self,
        x: Tensor,
        row_coef: Tensor,
        target_coef: Tensor,
        target: Tensor | None,
        peaks: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Set the rows for the following calls of `add`. Without a target there are no target terms.

        `peaks` (coefficients, columns) add one more term per row.
        """
        self.first, self.empty = self.empty, False
        # float16 underflows at 6e-8, so the operand is divided by a power of two that is multiplied back in float32. It
        # puts the largest entry near the upper end of the range, so that small rows lose as few digits as possible
        self.unit = None
        if self.dtype == torch.float16 and row_coef.numel():
            largest = row_coef.abs().amax() * torch.linalg.vector_norm(x, torch.inf).float().clamp(min=1)
            unit = (_power_of_two(largest) * 2**-LARGEST_FLOAT16).clamp(min=SMALLEST)  # tiny gradients: not 0
            self.unit = torch.where(largest > 0, unit, 1.0)
            row_coef, target_coef = row_coef / self.unit, target_coef / self.unit
            peaks = None if peaks is None else (peaks[0] / self.unit, peaks[1])
        wanted = self.weight is not None or self.bias is not None
        terms = ([] if target is None else [(target_coef, target)]) + ([] if peaks is None else [peaks])
        self.terms = [(coef, self.backend.group_targets(column)) for coef, column in terms if wanted]
        self.parts = []
        for grad in (self.weight, self.bias):
            if grad is not None:
                features = x if grad is self.weight else x.new_ones(x.shape[0], BIAS_COLUMNS)
                self.parts.append((features, self.backend.scale_rows(features, row_coef, sign=-1.0), grad))

    def add(self, slab: Tensor, begin: int, end: int) -> None:
        """Add the contribution of a slab, the exponentials of the vocabulary slice [begin, end)."""
        for features, scaled, grad in self.parts:
            part = grad[begin:end] if self.in_place else None
            if part is not None and self.unit is not None and not self.first:
                part /= self.unit
            part = matmul(slab.t(), scaled, out=part, accumulate=not self.first)
            for coef, targets in self.terms:
                self.backend.add_targets(part, features, coef, targets, (begin, end))
            if self.unit is not None:
                part *= self.unit
            if not self.in_place:
                if grad is self.weight:
                    self._take_units(part, begin, end)
                grad[begin:end] = part  # rounds and writes in one kernel

    def _take_units(self, part: Tensor, begin: int, end: int) -> None:
        """For float16 with `upstream_later`: compute the units of the finished rows [begin, end) and divide by them."""
        if self.row_unit is not None:
            largest = torch.linalg.vector_norm(part, torch.inf, dim=1)
            self.row_unit[begin:end] = torch.where(largest > 0, _power_of_two(largest), 1.0)
            part /= self.row_unit[begin:end, None]

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dWeight, dBias, unit)."""
        weight, bias = self.weight, None
        if self.weight is not None and self.weight.dtype != self.dtype and self.row_unit is None:
            weight = self.weight.to(self.dtype)
        elif self.weight is not None and self.weight.dtype != self.dtype:
            weight = torch.empty_like(self.weight, dtype=self.dtype)
            for i in range(0, weight.shape[0], GRAD_SLICE):
                rows = slice(i, i + GRAD_SLICE)
                self._take_units(self.weight[rows], rows.start, rows.stop)
                weight[rows] = self.weight[rows]
        if self.bias is not None:
            bias = self.bias[:, 0].to(self.bias_dtype).contiguous()
        return weight, bias, self.row_unit
