"""What every step of a training run consists of, known before it begins.

A plan is a function of the seed: which rows step k takes, which retain rows and refusals go with its forget rows. A
step is a list of `Pass`es, forward and backward one after the other, whose losses are divided by the totals of the
whole step. So gradient accumulation gives the gradient of the larger batch, n processes that of one (wrappers average
over processes: totals are divided by n), and a run that is resumed at step k goes on as if it had not stopped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training import distributed
from training.config import TrainConfig
from training.data import IGNORE_INDEX, Example, collate, pack, shuffled_batches
from training.methods import Method, Settings
from training.objective import Objective, kl_to_reference, reference_of, token_nll
from training.require import require


class Pass(NamedTuple):
    """One forward and backward: `model(**inputs, fused_unlearning=objective).loss`, a share of the step's loss."""

    inputs: dict[str, Tensor]
    objective: Callable[..., Tensor]
    num_tokens: int = 0  # without padding, for the rate that is shown


class Step(NamedTuple):
    """Rows of an unlearning step, as many of each kind."""

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
    """Rows as a model takes them, on its device: packed without padding, or padded on the right."""

    pad_id: int
    device: torch.device
    packing: bool

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return pack(examples, self.device) if self.packing else collate(examples, self.pad_id, self.device)

    def pieces(self, members: list[int], lengths: Sequence[int], config: TrainConfig) -> list[list[int]]:
        """This process's share of a step's rows, cut into micro-batches; padded ones of rows of similar length.

        What is in one micro-batch changes rounding alone: losses are divided by the totals of the step.

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
        return [
            Pass(self.batches(distributed.rows(self.examples, part, members)), objective, _tokens(self.examples, part))
            for part in self.batches.pieces(members, _lengths(self.examples, members), self.config)
        ]


@dataclass(frozen=True)
class UnlearningSteps:
    """A method on its rows: `rows` and `ref_logps` by kind, forget, retain and idk (one for each of `plan.idk`)."""

    method: Method
    settings: Settings
    plan: Plan
    rows: Mapping[str, Sequence[Example]]
    ref_logps: dict[str, Tensor]  # (rows of the kind,) float32
    config: TrainConfig
    batches: Batches
    reference: PreTrainedModel | None = field(default=None, repr=False)  # of the KL term, frozen, with a fused head

    def __len__(self) -> int:
        return len(self.plan.steps)

    def passes(self, model: torch.nn.Module, step: int) -> list[Pass]:
        members, n = self.plan.steps[step]._asdict(), distributed.count()
        parts = self._parts(members)
        tokens = {kind: scored_tokens(self.rows[kind], members[kind]) / n for kind in self.method.kinds}
        ratio = self._idk_ratio(model, members["idk"], parts["idk"]) if "idk" in self.method.scored else None
        passes = []
        for i in range(max(map(len, parts.values()))):
            mine = {kind: parts[kind][i] for kind in self.method.kinds}
            rows = {kind: distributed.rows(self.rows[kind], part, members[kind]) for kind, part in mine.items()}
            objective = Objective(
                self.method,
                self.settings,
                {kind: len(some) for kind, some in rows.items()},
                {kind: self._refs(kind, part, members[kind]) for kind, part in mine.items() if kind in self.ref_logps},
                num_sequences=len(members["forget"]) / n,
                num_tokens=tokens,
                idk_ratio=ratio,
                num_scored={kind: scored_tokens(some, range(len(some))) for kind, some in rows.items()},
            )
            together = [row for some in rows.values() for row in some]
            passes.append(Pass(self.batches(together), objective, sum(len(row.input_ids) for row in together)))
        if self.method.retain == "kl":
            passes += self._kl_passes(members["retain"], parts["retain"])
        return passes

    def _parts(self, members: dict[str, list[int]]) -> dict[str, list[list[int]]]:
        """{kind: micro-batches}. A forget row and its refusal stay together, as preference methods compare them."""
        lengths = {kind: _lengths(self.rows[kind], members[kind]) for kind in self.method.needs}
        pairs = [lengths[kind] for kind in ("forget", "idk") if kind in lengths]
        longer = [max(pair) for pair in zip(*pairs, strict=True)]
        return {
            kind: self.batches.pieces(members[kind], lengths[kind] if kind == "retain" else longer, self.config)
            for kind in self.method.needs
        }

    def _kl_passes(self, members: list[int], parts: list[list[int]]) -> list[Pass]:
        """The retain rows once more by themselves: their hidden states meet two heads."""
        count = scored_tokens if self.settings.kl_positions == "answer" else _tokens
        positions = count(self.rows["retain"], members) / distributed.count()
        passes = []
        for part in parts:
            inputs = self.batches(distributed.rows(self.rows["retain"], part, members))
            mask = answer_positions(inputs) if self.settings.kl_positions == "answer" else real_positions(inputs)
            if not part:
                mask = torch.zeros_like(mask)
            reference = reference_of(require(self.reference, "the reference model of the KL term"), inputs)
            objective = kl_to_reference(reference, mask, self.settings.retain_weight, positions)
            passes.append(Pass(inputs, objective, _tokens(self.rows["retain"], part)))
        return passes

    @torch.no_grad()
    def _idk_ratio(self, model: torch.nn.Module, members: list[int], parts: list[list[int]]) -> Tensor:
        """Mean log-ratio of the step's IDK answers, over all processes; without dropout, as the reference's."""
        ratio, was_training = torch.zeros((), device=self.batches.device), model.training
        model.eval()
        for part in parts:
            out = model(**self.batches(distributed.rows(self.rows["idk"], part, members)), fused_unlearning=True)
            refs = self._refs("idk", part, members)
            ratio += (out.logps - refs).where(out.num_tokens > 0, 0.0).sum()
        model.train(was_training)
        return distributed.total(ratio) / len(members)

    def _refs(self, kind: str, part: list[int], members: list[int]) -> Tensor:
        return self.ref_logps[kind][part or members[:1]].to(self.batches.device)


def scored_tokens(examples: Sequence[Example], members: Iterable[int]) -> int:
    """No example scores its first token, which nothing precedes."""
    return sum(label != IGNORE_INDEX for i in members for label in examples[i].labels[1:])


def _lengths(examples: Sequence[Example], members: list[int]) -> list[int]:
    return [len(examples[i].input_ids) for i in members]


def _tokens(examples: Sequence[Example], members: list[int]) -> int:
    return sum(len(examples[i].input_ids) for i in members)


def answer_positions(inputs: dict[str, Any]) -> Tensor:
    """Where the next token is scored: (B, S) bool, or (T,) of a packed row, whose sequences begin with a prompt."""
    mask = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    mask[:, :-1] = inputs["labels"][:, 1:] != IGNORE_INDEX
    return mask.flatten() if "cu_seqlens" in inputs else mask


def real_positions(inputs: dict[str, Any]) -> Tensor:
    """Where there is no padding: (B, S) bool, or (T,) all true of a packed row."""
    if "cu_seqlens" in inputs:
        return torch.ones_like(inputs["labels"], dtype=torch.bool).flatten()
    return inputs["attention_mask"].bool()
