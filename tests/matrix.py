"""Every mode x dtype x head, with layouts and sets of gradients in rotation: what the two `test_execute.py` run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from tests import support
from tests.support import DTYPES, HEADS, LAYOUTS, TINY, Batch, make_batch

HEAD_NEEDS = (
    ("hidden", "weight", "bias"),
    ("weight",),
    ("hidden", "weight"),
    ("bias",),
    ("weight", "bias"),
    ("hidden", "bias"),
)


@dataclass(frozen=True)
class Mode:
    """How to make a call run in a mode, and what its plan then says."""

    objectives: tuple[Callable, ...]
    plan: str
    needs: tuple[tuple[str, ...], ...]
    workspace: str = "default"  # "default" | "chunks" | "tiny"

    def workspace_mb(self, batch: Batch, impl: str, needs: Sequence[str]) -> float | None:
        if self.workspace == "chunks":
            return support.workspace_for(batch, impl, True, needs)
        return TINY if self.workspace == "tiny" else None


LOSSES = (support.npo, support.simnpo, support.user_loss)
OUTSIDE = (support.tokens, support.sequences)
MODES = {
    "no_grad": Mode((*LOSSES, *OUTSIDE), "no_grad", ((),)),
    "frozen": Mode(LOSSES, "frozen", (("hidden",),)),
    "frozen, sliced": Mode(LOSSES, "frozen", (("hidden",),), "tiny"),
    "slab": Mode(LOSSES, "slab", HEAD_NEEDS),
    "slab, chunks": Mode(LOSSES[:2], "slab", HEAD_NEEDS, "chunks"),
    "recompute, sliced": Mode(LOSSES, "recompute", HEAD_NEEDS, "tiny"),
    "outside": Mode(OUTSIDE, "recompute", HEAD_NEEDS),
    "outside, sliced": Mode(OUTSIDE, "recompute", HEAD_NEEDS, "tiny"),
    "outside, frozen, sliced": Mode(OUTSIDE, "frozen", (("hidden",),), "tiny"),
}


def cases() -> list[tuple[str, torch.dtype, str, str, tuple[str, ...], int]]:
    """(mode, dtype, head, layout, needs, seed)."""
    found = []
    for mode, dtype, head in product(MODES, DTYPES, HEADS):
        possible = [needs for needs in MODES[mode].needs if HEADS[head][0] or "bias" not in needs]
        number = len(found)
        # 5 heads: both layouts meet every head, and consecutive cases take different gradients
        found.append((mode, dtype, head, LAYOUTS[number % 2], possible[number // 2 % len(possible)], number))
    return found


def case_id(case: Sequence) -> str:
    mode, dtype, head, layout, needs, _ = case
    return "-".join((mode, support.name_of(dtype), head, layout, support.name_of(needs)))


def check(impl: str, case: Sequence, plans: list, **shape) -> None:
    """The expected mode ran, and its loss and gradients are as close to float64 as those of plain PyTorch."""
    name, dtype, head, layout, needs, seed = case
    mode = MODES[name]
    batch = make_batch(dtype, head, layout, seed=seed, **shape)
    objective = mode.objectives[seed % len(mode.objectives)]
    plain, oracle = support.evaluate_plain_and_oracle(objective, batch, needs)
    ours = support.evaluate(
        objective, batch, needs, impl=impl, workspace_mb=mode.workspace_mb(batch, impl, needs), num_rows=None
    )
    assert {plan.mode for plan in plans} == {mode.plan}
    if mode.workspace == "chunks":
        assert len(plans[0].chunks) > 1
    if mode.workspace == "tiny":
        assert len(plans[0].slices) > 1
    support.assert_no_worse_than_plain(ours, plain, oracle)
