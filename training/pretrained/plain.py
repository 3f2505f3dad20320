"""The methods in plain PyTorch on full logits, to compare the fused losses with.

    z    = model(**rows).logits.float()                      # (B, S, V)
    logp = z.log_softmax(-1).gather(-1, next label)          # summed over the answer, as the TOFU and NPO code does

The methods are those of the registry, on rows that come from these logits. Where a method compares with the reference,
the frozen model gives its logits in every step, in the place of a cache. So this is also a second implementation, by
which the fused one is checked.

Logits and log-probabilities of a batch are there once each: nothing is copied that the formulas do not need.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from training.data import IGNORE_INDEX, Example, next_labels
from training.methods import Batch, Method, Rows, Settings
from training.require import require
from training.steps import Batches, Pass, Plan, num_tokens_of
from training.unlearning import answer_positions, real_positions

OnLogits = Callable[[Tensor, Tensor], Tensor]  # (logits (B, S, V), labels (B, S)) -> loss
Statistic = Callable[[Tensor, Tensor], Tensor]  # (logits, log-probabilities), (T, V) each -> (T,)

STATISTICS: Mapping[str, Statistic] = {  # as `npo_kernels.token_statistics` has them
    "entropy": lambda z, logp: -(logp.exp() * logp).sum(-1),
    "max_logit": lambda z, logp: z.max(-1).values,
    "mean_logit": lambda z, logp: z.mean(-1),
}


class PlainModel(nn.Module):
    """Called as a model with a fused head is: `model(**rows, fused_unlearning=...)`, with a function of logits."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.autocast_dtype = getattr(model, "autocast_dtype", None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, labels: Tensor, fused_unlearning: OnLogits, **inputs: Tensor) -> CausalLMOutput:
        return CausalLMOutput(loss=fused_unlearning(logits_of(self.model, inputs), labels))


def logits_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, S, V) in float32, or in float64 of a model in float64."""
    found = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
    return found if found.dtype == torch.float64 else found.float()


class Scored(NamedTuple):
    """Rows with T scored tokens in all."""

    logps: Tensor  # (n,) sums over the answers
    num_tokens: Tensor  # (n,)
    token_logps: Tensor  # (T,)
    sequence: Tensor  # (T,) which row each is of
    full: Tensor  # (T, V) log-probabilities; empty where they are not asked for


def scored(logits: Tensor, labels: Tensor, full: bool = False) -> Scored:
    """What log-softmax and gather give to (n, S) labels that are aligned with the (n, S, V) logits."""
    targets = next_labels(labels, None)
    mask = targets != IGNORE_INDEX
    logp = logits.log_softmax(-1)
    picked = logp.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1).where(mask, 0.0)
    sequence = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)[mask]
    return Scored(picked.sum(1), mask.sum(1), picked[mask], sequence, logp[mask] if full else logp.new_empty(0))


def undial(batch: Batch, settings: Settings, teacher: Tensor) -> Tensor:
    """mean_t KL(softmax(z_ref - beta onehot_y) || p) for the teacher's (T, V) logits z_ref."""
    rows = batch.rows("forget")
    logits, targets = require(rows.logits, "logits"), require(rows.targets, "labels")
    lowered = teacher.scatter_add(1, targets[:, None], torch.full_like(teacher[:, :1], -settings.beta))
    kl = F.kl_div(logits.log_softmax(-1), lowered.log_softmax(-1), reduction="sum", log_target=True)
    return kl / batch.tokens("forget")


# Of methods whose function takes hidden states and a head: the same of logits and the teacher's.
ON_LOGITS: Mapping[str, Callable[[Batch, Settings, Tensor], Tensor]] = {"undial": undial}


@dataclass(frozen=True)
class PlainSteps:
    """A method on its rows, as `training.unlearning.UnlearningSteps`, for a `PlainModel` in one process.

    ValueError where a method has no plain form here: one on activations, which needs no logits, one on hidden states
    that is not in `ON_LOGITS`, one with rows that are scored beforehand, or `published_rows`.
    """

    method: Method
    settings: Settings
    plan: Plan
    rows: Mapping[str, Sequence[Example]]
    batches: Batches
    frozen: PreTrainedModel | None = field(default=None, repr=False)

    def __post_init__(self):
        method = self.method
        known = method.reads in ("sequence", "token", "statistics", "logits") or method.family in ON_LOGITS
        if not known or method.scored or self.settings.published_rows or set(method.statistics) - STATISTICS.keys():
            raise ValueError(
                f"{method.label}: expected a method on log-probabilities, logits or {', '.join(STATISTICS)}, or one of "
                f"{', '.join(ON_LOGITS)}, whose rows all have gradients; got one that reads {method.reads}"
            )
        if self.batches.packing:
            raise ValueError("plain logits: expected padded batches, --packing off")

    def __len__(self) -> int:
        return len(self.plan.steps)

    def passes(self, model: nn.Module, step: int) -> list[Pass]:
        """The rows of all kinds in one forward; the retain rows of a KL term in one of their own."""
        members = self.plan.steps[step]._asdict()
        members["alternate"] = members["idk"]
        picked = {kind: [self.rows[kind][i] for i in members[kind]] for kind in self.method.needs}
        together = [row for kind in self.method.kinds for row in picked[kind]]
        objective = partial(self._loss, {kind: len(picked[kind]) for kind in self.method.kinds}, self._compared(picked))
        passes = [Pass(self.batches(together), objective, num_tokens_of(together, [*range(len(together))]))]
        if self.method.retain == "kl":
            passes.append(self._kl(picked["retain"]))
        return passes

    @torch.no_grad()
    def _compared(self, picked: Mapping[str, Sequence[Example]]) -> tuple[dict[str, Scored], Tensor | None]:
        """Of the frozen model, in this step: {kind: log-probabilities}, and a teacher's logits (T, V)."""
        if not (self.method.reference or self.method.teacher):
            return {}, None
        some = {kind: picked[kind] for kind in self.method.rows}
        inputs = self.batches([row for rows in some.values() for row in rows])
        logits = logits_of(require(self.frozen, "the frozen model"), inputs)
        if self.method.teacher:
            return {}, logits[answer_positions(inputs)]
        sizes = [len(rows) for rows in some.values()]
        pieces = zip(some, logits.split(sizes), inputs["labels"].split(sizes), strict=True)
        return {kind: scored(z, labels) for kind, z, labels in pieces}, None

    def _loss(
        self,
        num_rows: Mapping[str, int],
        compared: tuple[Mapping[str, Scored], Tensor | None],
        logits: Tensor,
        labels: Tensor,
    ) -> Tensor:
        (references, teacher), sizes, method = compared, [*num_rows.values()], self.method
        kinds = {
            kind: self._rows(kind, z, some, references.get(kind))
            for kind, z, some in zip(num_rows, logits.split(sizes), labels.split(sizes), strict=True)
        }
        if method.family in ON_LOGITS:
            function, given = ON_LOGITS[method.family], require(teacher, "the teacher's logits")
            method = replace(method, loss=lambda batch, settings: function(batch, settings, given))
        return method.total(Batch(kinds), self.settings)

    def _rows(self, kind: str, logits: Tensor, labels: Tensor, reference: Scored | None) -> Rows:
        """What the method reads of the rows of a kind."""
        if kind != "retain" and self.method.reads in ("hidden", "logits"):
            targets = next_labels(labels, None)
            mask = targets != IGNORE_INDEX
            sequence = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)[mask]
            return Rows(mask.sum(1), sequence=sequence, targets=targets[mask], logits=logits[mask])
        statistics = self.method.statistics if kind != "retain" else ()
        found = scored(logits, labels, full=bool(statistics))
        z = logits[next_labels(labels, None) != IGNORE_INDEX] if {"max_logit", "mean_logit"} & {*statistics} else logits
        return Rows(
            found.num_tokens,
            found.logps,
            None if reference is None else reference.logps,
            token_logps=found.token_logps,
            ref_token_logps=None if reference is None else reference.token_logps,
            statistics={name: STATISTICS[name](z, found.full) for name in statistics},
            sequence=found.sequence,
        )

    def _kl(self, retain: Sequence[Example]) -> Pass:
        inputs = self.batches(retain)
        mask = (answer_positions if self.settings.kl_positions == "answer" else real_positions)(inputs)
        with torch.no_grad():
            reference = logits_of(require(self.frozen, "the frozen model"), inputs).log_softmax(-1)

        def objective(logits: Tensor, labels: Tensor) -> Tensor:
            kl = F.kl_div(logits.log_softmax(-1), reference, reduction="none", log_target=True).sum(-1)
            return self.settings.retain_weight * kl.where(mask, 0.0).sum() / mask.sum()

        return Pass(inputs, objective, num_tokens_of(retain, [*range(len(retain))]))
