"""The steps of a training run, planned before it begins.

A plan is a function of the seed: which rows step k takes, which retain rows and refusals go with its forget rows. A
step is a list of `Pass`es, each a forward and a backward, whose losses are divided by the totals of the whole step. So
gradient accumulation gives the gradient of the larger batch, n processes give that of one (wrappers average over
processes, so totals are divided by n), and a run resumed at step k continues as if it had not stopped.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from training import distributed
from training.config import TrainConfig
from training.data import IGNORE_INDEX, Example, collate, pack, shuffled_batches
from training.objective import token_nll


class Pass(NamedTuple):
    """One forward and backward: `model(**inputs, fused_unlearning=objective).loss`, a share of the step's loss."""

    inputs: dict[str, Tensor]
    objective: Callable[..., Tensor]
    num_tokens: int = 0  # without padding, for the rate that is shown


class Step(NamedTuple):
    """Rows of an unlearning step, equally many of each kind."""

    forget: list[int]
    retain: list[int]
    idk: list[int]  # into `Plan.idk`


class Plan(NamedTuple):
    steps: list[Step]
    idk: list[tuple[int, int]]  # (row of the forget set, refusal)


def plan_unlearning(
    num_forget: int, num_retain: int, num_refusals: int, config: TrainConfig, fixed_partners: bool = False
) -> Plan:
    """Every epoch takes the forget set once, in a new order, with retain rows and refusals drawn anew.

    Retain rows repeat only when all have been used. `fixed_partners`: row i of the forget set has the same retain row
    and refusal in every epoch, drawn from a generator seeded with i, as in the NPO paper's code.
    """
    generator = torch.Generator().manual_seed(config.seed)
    refusals = torch.Generator().manual_seed(config.seed)
    partners = _shuffled_forever(num_retain, generator)
    fixed = [_fixed_partners(i, num_retain, num_refusals) for i in range(num_forget if fixed_partners else 0)]
    steps: list[Step] = []
    pairs: dict[tuple[int, int], int] = {}
    for _ in range(config.epochs):
        for forget in _shuffled(num_forget, config.batch_size, generator):
            if fixed_partners:
                retain, refused = (list(drawn) for drawn in zip(*(fixed[i] for i in forget), strict=True))
            else:
                retain = list(islice(partners, len(forget)))
                refused = torch.randint(max(num_refusals, 1), (len(forget),), generator=refusals).tolist()
            idk = [pairs.setdefault(pair, len(pairs)) for pair in zip(forget, refused, strict=True)]
            steps.append(Step(forget, retain, idk))
    return Plan(steps, list(pairs))


def _shuffled(num_rows: int, batch_size: int, generator: torch.Generator) -> list[list[int]]:
    order = torch.randperm(num_rows, generator=generator).tolist()
    return [order[i : i + batch_size] for i in range(0, num_rows, batch_size)]


def _shuffled_forever(num_rows: int, generator: torch.Generator) -> Iterator[int]:
    while num_rows:
        yield from torch.randperm(num_rows, generator=generator).tolist()


def _fixed_partners(row: int, num_retain: int, num_refusals: int) -> tuple[int, int]:
    generator = torch.Generator().manual_seed(row)
    retain, refusal = (int(torch.randint(max(n, 1), (), generator=generator)) for n in (num_retain, num_refusals))
    return retain, refusal


@dataclass(frozen=True)
class Batches:
    """Makes model inputs from rows: packed without padding, or padded on the right."""

    pad_id: int
    device: torch.device
    packing: bool

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return pack(examples, self.device) if self.packing else collate(examples, self.pad_id, self.device)

    def pieces(self, members: list[int], lengths: Sequence[int], config: TrainConfig) -> list[list[int]]:
        """This process's share of a step's rows, cut into micro-batches; padded ones of rows of similar length.

        The division into micro-batches affects only rounding: losses are divided by the totals of the step.

        Args:
            members: the rows of the step.
            lengths: of each of them, by which they are sorted.
        """
        share = -(-len(members) // distributed.count())
        size = config.piece(share)
        if size < share and not self.packing:
            members = [members[i] for i in sorted(range(len(members)), key=lengths.__getitem__)]
        return distributed.parts(members, size)


class FinetuningSteps:
    """The answers' negative log-likelihood, on every example once an epoch."""

    def __init__(self, examples: Sequence[Example], config: TrainConfig, batches: Batches):
        self.examples, self.config, self.batches = examples, config, batches
        generator = torch.Generator().manual_seed(config.seed)
        pool = 1 if batches.packing else 16  # padded rows are sorted by length, within pools of 16 batches
        self.steps = [
            members
            for _ in range(config.epochs)
            for members in shuffled_batches(examples, config.batch_size, generator, pool)
        ]

    def __len__(self) -> int:
        return len(self.steps)

    def passes(self, model: torch.nn.Module, step: int) -> list[Pass]:
        members = self.steps[step]
        objective = token_nll(scored_tokens(self.examples, members) / distributed.count())
        passes = []
        for part in self.batches.pieces(members, lengths_of(self.examples, members), self.config):
            inputs = self.batches(distributed.rows(self.examples, part, members))
            passes.append(Pass(inputs, objective, num_tokens_of(self.examples, part)))
        return passes


def scored_tokens(examples: Sequence[Example], members: Iterable[int]) -> int:
    """Number of scored tokens. The first token of an example is never scored."""
    return sum(label != IGNORE_INDEX for i in members for label in examples[i].labels[1:])


def lengths_of(examples: Sequence[Example], members: list[int]) -> list[int]:
    return [len(examples[i].input_ids) for i in members]


def num_tokens_of(examples: Sequence[Example], members: list[int]) -> int:
    return sum(len(examples[i].input_ids) for i in members)
