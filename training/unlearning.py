"""The steps of unlearning: a method on its forget and retain rows and its reference, pass by pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training import distributed
from training.config import TrainConfig
from training.data import IGNORE_INDEX, Example, next_labels
from training.dual import DualWeight
from training.layers import LayerTap
from training.methods import Method, Reference, Settings
from training.objective import Activations, Objective, kl_to_reference, reference_of, targets_of
from training.observed import Observed
from training.require import require
from training.scoring import PerToken, Scores
from training.steps import Batches, Pass, Plan, lengths_of, num_tokens_of, scored_tokens


@dataclass(frozen=True)
class Frozen:
    """The reference of a method: cached numbers of the model before the first step, or that model itself."""

    scores: Mapping[str, Scores] = field(default_factory=dict)  # kind of rows -> of all of them
    model: PreTrainedModel | None = field(default=None, repr=False)  # with a fused head
    head: Reference | None = None  # of the hidden states in `scores`, without any
    tap: LayerTap | None = None  # of `model`, for a method on activations


def cached_per_token(method: Method, settings: Settings) -> PerToken | None:
    """What is cached per scored token before the first step, in addition to the sums of the rows."""
    if method.teacher and not method.taught_by_model(settings):
        return "hidden"
    return "token_logps" if method.reference and method.reads == "token" else None


def kept_head(model: PreTrainedModel) -> Reference:
    """The current head, for use with cached hidden states. Copied if training changes the model's own."""

    def kept(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if tensor.requires_grad else tensor.detach()

    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    weight = kept(head.weight)
    return Reference(weight.new_empty(0), weight, None if bias is None else kept(bias))


@dataclass(frozen=True)
class UnlearningSteps:
    """A method on its rows: `rows` by kind, forget, retain and idk or alternate (one for each of `plan.idk`)."""

    method: Method
    settings: Settings
    plan: Plan
    rows: Mapping[str, Sequence[Example]]
    frozen: Frozen
    config: TrainConfig
    batches: Batches
    tap: LayerTap | None = None  # of the model that is trained, for a method on activations
    dual: DualWeight | None = None
    observed: Observed | None = None

    def __len__(self) -> int:
        return len(self.plan.steps)

    def passes(self, model: torch.nn.Module, step: int) -> list[Pass]:
        members, n = self.plan.steps[step]._asdict(), distributed.count()
        members["alternate"] = members["idk"]  # both are other answers to the questions of the forget rows
        parts = self._parts(members)
        if self.dual is not None:
            self.dual.begin_step(step)
        ratio = self._idk_ratio(model, members["idk"], parts["idk"]) if "idk" in self.method.scored else None
        totals = {
            "num_sequences": len(members["forget"]) / n,
            "num_tokens": {kind: scored_tokens(self.rows[kind], members[kind]) / n for kind in self.method.kinds},
            "idk_ratio": ratio,
            "num_counted": self._counted(members["forget"]) / n,
        }
        passes = []
        for i in range(max(map(len, parts.values()))):
            mine = {kind: parts[kind][i] for kind in self.method.kinds}
            passes.append(self._pass(mine, members, totals))
        if self.method.retain == "kl":
            passes += self._kl_passes(members["retain"], parts["retain"])
        return passes

    def _pass(self, mine: dict[str, list[int]], members: dict[str, list[int]], totals: dict[str, Any]) -> Pass:
        rows = {kind: distributed.rows(self.rows[kind], part, members[kind]) for kind, part in mine.items()}
        together = [row for some in rows.values() for row in some]
        inputs = self.batches(together)
        of_tokens = rows if self.method.reads == "token" else {}
        objective = Objective(
            self.method,
            self.settings,
            {kind: len(some) for kind, some in rows.items()},
            {kind: self._scores(kind, mine[kind], members[kind]) for kind in mine.keys() & self.frozen.scores.keys()},
            num_scored={kind: scored_tokens(some, range(len(some))) for kind, some in of_tokens.items()},
            teacher=self._teacher(mine["forget"], members["forget"]) if self.method.teacher else None,
            activations=self._activations(inputs) if self.method.reads == "activations" else None,
            dual=self.dual,
            observed=self.observed,
            **totals,
        )
        return Pass(inputs, objective, sum(len(row.input_ids) for row in together))

    def _parts(self, members: dict[str, list[int]]) -> dict[str, list[list[int]]]:
        """{kind: micro-batches}. A forget row and its other answer stay together: preference methods compare them."""
        lengths = {kind: lengths_of(self.rows[kind], members[kind]) for kind in self.method.needs}
        pairs = [some for kind, some in lengths.items() if kind != "retain"]
        longer = [max(pair) for pair in zip(*pairs, strict=True)]
        return {
            kind: self.batches.pieces(members[kind], lengths[kind] if kind == "retain" else longer, self.config)
            for kind in self.method.needs
        }

    def _counted(self, members: list[int]) -> int:
        """Scored tokens of forget rows after the first `skip_tokens` of each."""
        skip = self.settings.skip_tokens
        return sum(max(0, scored_tokens(self.rows["forget"], [i]) - skip) for i in members)

    def _kl_passes(self, members: list[int], parts: list[list[int]]) -> list[Pass]:
        """The passes of a KL term: the retain rows alone, with hidden states of both models."""
        count = scored_tokens if self.settings.kl_positions == "answer" else num_tokens_of
        positions = count(self.rows["retain"], members) / distributed.count()
        passes = []
        for part in parts:
            inputs = self.batches(distributed.rows(self.rows["retain"], part, members))
            mask = self._positions(inputs)
            if not part:
                mask = torch.zeros_like(mask)
            reference = reference_of(self._frozen_model, inputs)
            objective = kl_to_reference(
                reference,
                mask,
                self.settings.retain_weight,
                positions,
                self.dual,
                self.settings.epsilon,
                self.observed,
            )
            passes.append(Pass(inputs, objective, num_tokens_of(self.rows["retain"], part)))
        return passes

    def _teacher(self, part: list[int], members: list[int]) -> Reference:
        """The teacher's hidden states at the counted positions of the forget rows: cached, or from the frozen model."""
        if self.frozen.head is not None:
            hidden = self._scores("forget", part, members).hidden
            return self.frozen.head._replace(hidden=require(hidden, "hidden states of the teacher"))
        inputs = self.batches(distributed.rows(self.rows["forget"], part, members))
        found = reference_of(self._frozen_model, inputs)
        labels, cu_seqlens = inputs["labels"], inputs.get("cu_seqlens")
        labels = labels if cu_seqlens is None else labels[0]
        everywhere = torch.ones_like(labels, dtype=torch.bool)
        targets = targets_of(self.method, self.settings, labels, everywhere, len(found.weight), cu_seqlens)
        hidden = found.hidden if cu_seqlens is None else found.hidden.reshape(len(labels), -1)
        return found._replace(hidden=hidden[targets != IGNORE_INDEX])

    def _activations(self, inputs: dict[str, Tensor]) -> Activations:
        positions, frozen = self._positions(inputs), None
        if self.settings.published_rows:
            positions = (inputs["labels"] if "cu_seqlens" not in inputs else inputs["labels"][0]) != IGNORE_INDEX
        if self.method.ref_activations or self.method.retain == "activations":
            reference_of(self._frozen_model, inputs)
            output = require(self.frozen.tap, "a tap of the frozen layer").read()
            frozen = output.flatten(0, 1)[positions.flatten()]  # a step holds those of all its micro-batches
        return Activations(require(self.tap, "a tap of the layer").read, positions, frozen)

    def _positions(self, inputs: dict[str, Tensor]) -> Tensor:
        return answer_positions(inputs) if self.settings.kl_positions == "answer" else real_positions(inputs)

    @torch.no_grad()
    def _idk_ratio(self, model: torch.nn.Module, members: list[int], parts: list[list[int]]) -> Tensor:
        """Mean log-ratio of the step's IDK answers, over all processes; without dropout, as the reference's."""
        ratio, was_training = torch.zeros((), device=self.batches.device), model.training
        model.eval()
        for part in parts:
            out = model(**self.batches(distributed.rows(self.rows["idk"], part, members)), fused_unlearning=True)
            refs = self._scores("idk", part, members).logps
            ratio += (out.logps - refs).where(out.num_tokens > 0, 0.0).sum()
        model.train(was_training)
        return distributed.total(ratio) / len(members)

    def _scores(self, kind: str, part: list[int], members: list[int]) -> Scores:
        """Scores of the rows of a piece. For an empty piece: of one row that scores nothing (`distributed.rows`)."""
        found = self.frozen.scores[kind].rows(part or members[:1], self.batches.device)
        if part:
            return found
        of_tokens = (None if t is None else t[:0] for t in (found.token_logps, found.hidden))
        return Scores(found.logps, found.num_tokens * 0, *of_tokens)

    @property
    def _frozen_model(self) -> PreTrainedModel:
        return require(self.frozen.model, "the frozen model")


def answer_positions(inputs: dict[str, Any]) -> Tensor:
    """Where the next token is scored: (B, S) bool, or (T,) of a packed row, whose sequences begin with a prompt."""
    labels, cu_seqlens = inputs["labels"], inputs.get("cu_seqlens")
    return next_labels(labels if cu_seqlens is None else labels[0], cu_seqlens) != IGNORE_INDEX


def real_positions(inputs: dict[str, Any]) -> Tensor:
    """Where there is no padding: (B, S) bool, or (T,) all true of a packed row."""
    if "cu_seqlens" in inputs:
        return torch.ones_like(inputs["labels"], dtype=torch.bool).flatten()
    return inputs["attention_mask"].bool()
