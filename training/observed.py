"""Collects the loss terms and log-probabilities of a step for trackers (`training.tracking`).

An `Objective` records detached values, so training gives the same bits with and without it. The values stay on the
device until the end of the step and are then copied in one transfer.
"""

import torch
from accelerate.utils import gather_object
from torch import Tensor

from training import distributed

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


class Observed:
    """One step: `begin` before its passes, `take` after them."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._rows: dict[str, list[Tensor]] = {}

    def term(self, name: str, value: Tensor, weight: float) -> None:
        """A term of the loss without its weight: this pass's share of the step."""
        value = value.detach().float()
        self._terms[name] = self._terms[name] + value if name in self._terms else value
        self._weights[name] = weight

    def rows(self, name: str, values: Tensor, num_tokens: Tensor) -> None:
        """(n,) numbers, one a row. Rows without a scored token do not count."""
        self._rows.setdefault(name, []).append(values.detach().float().where(num_tokens > 0, torch.nan))

    def take(self) -> dict[str, float]:
        """{name in a tracker: number} of the whole step, over all processes. Every process must call this."""
        names, kinds = list(self._terms), list(self._rows)
        pieces = [torch.cat(self._rows[kind]) for kind in kinds]
        sums = [torch.stack([self._terms[name] for name in names])] if names else []
        mine: list[float] = torch.cat([*sums, *pieces]).tolist() if sums or pieces else []
        found: dict[str, float] = {}
        shares = gather_object([mine[: len(names)]])  # of every process
        for name, parts in zip(names, zip(*shares, strict=True), strict=True):
            found[f"loss/{name}"] = sum(parts) / distributed.count()
            found[f"loss_weight/{name}"] = self._weights[name]
        first = len(names)
        for kind, piece in zip(kinds, pieces, strict=True):
            values = torch.tensor(gather_object(mine[first : (first := first + len(piece))]))
            values = values[~values.isnan()]
            if len(values):
                found |= _described(kind, values)
        self.begin()
        return found


def _described(name: str, values: Tensor) -> dict[str, float]:
    """The mean; of log-ratios the quantiles as well."""
    if name != "log_ratio":
        return {name: values.mean().item()}
    levels = torch.tensor(list(QUANTILES.values()))
    found = dict(zip(QUANTILES, values.quantile(levels).tolist(), strict=True))
    return {"log_ratio/mean": values.mean().item()} | {f"log_ratio/{key}": value for key, value in found.items()}
