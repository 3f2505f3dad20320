"""Objectives for `model(**rows, fused_unlearning=objective)`, a forward that forms no logits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels import fused_linear_kl, fused_logprob_loss, fused_token_loss, sequence_logprobs, token_statistics
from training.data import IGNORE_INDEX, next_labels, row_of_position
from training.dual import DualWeight
from training.methods import Batch, Head, Method, Reference, Rows, Settings
from training.observed import Observed
from training.require import require
from training.scoring import Scores


def token_nll(num_tokens: float | None = None) -> Callable[..., Tensor]:
    """Cross-entropy over the scored tokens: -sum_s logp_s / sum_s |y_s|, or divided by `num_tokens`."""

    def of_logps(logps: Tensor, counts: Tensor) -> Tensor:
        return -logps.sum() / (counts.sum() if num_tokens is None else num_tokens)

    def objective(hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        return fused_logprob_loss(hidden, lm_head_weight, labels, of_logps, **options)

    return objective


@dataclass(frozen=True)
class Activations:
    """Outputs of a layer for the rows of one forward: of the trained model and of the frozen model."""

    read: Callable[[], Tensor]  # -> (B, S, H), or (1, T, H) packed, of the current forward
    positions: Tensor  # bool, (B, S) or (T,) packed: where they count
    frozen: Tensor | None  # (T, H) there


@dataclass(frozen=True)
class Objective:
    """A method on rows of the kinds `method.kinds`, in that order, `num_rows` of each: all in one call of the head."""

    method: Method
    settings: Settings
    num_rows: dict[str, int]
    references: Mapping[str, Scores]  # kind -> of the frozen model, for these rows
    num_sequences: float | None = None  # of the whole step, and so below: see `Batch`
    num_tokens: dict[str, float] | None = None
    idk_ratio: Tensor | float | None = None
    num_counted: float | None = None
    num_scored: Mapping[str, int] = field(default_factory=dict)  # kind -> scored tokens here, of a method on tokens
    teacher: Reference | None = None  # for the tokens of the forget rows that count
    activations: Activations | None = None
    dual: DualWeight | None = field(default=None, compare=False)
    observed: Observed | None = field(default=None, compare=False)

    def __call__(self, hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        """The loss, through the function of npo_kernels that returns what the method reads."""
        reads = self.method.reads
        if reads == "sequence":
            return fused_logprob_loss(hidden, lm_head_weight, labels, self.of_logps, **options)
        if reads == "token":
            return fused_token_loss(hidden, lm_head_weight, labels, self.of_token_logps, **options)
        if reads == "statistics":
            return self.of_statistics(hidden, lm_head_weight, labels, **options)
        if reads == "activations":
            return self.of_activations(hidden, lm_head_weight, labels, **options)
        return self.of_hidden(hidden, lm_head_weight, labels, **options)

    def of_logps(self, logps: Tensor, num_tokens: Tensor) -> Tensor:
        """The loss of the (B,) log-probabilities and token counts."""
        self._check(len(logps))
        return self._loss(num_tokens, logps)

    def of_token_logps(self, token_logps: Tensor, sequence: Tensor, num_tokens: Tensor) -> Tensor:
        """The loss of the (T,) log-probabilities of the scored tokens, of the rows `sequence`."""
        self._check(len(num_tokens))
        logps = token_logps.new_zeros(len(num_tokens)).index_add(0, sequence, token_logps)
        return self._loss(num_tokens, logps, sequence, of_tokens={"token_logps": token_logps})

    def of_statistics(self, hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        """The loss of statistics of the (T,) next-token distributions where a token is scored."""
        num_rows = self._num_rows(labels, options.get("cu_seqlens"))
        targets, row = self._targets(labels, len(lm_head_weight), options.get("cu_seqlens"))
        which: Any = ["logp", *self.method.statistics]
        found = token_statistics(hidden, lm_head_weight, targets, which, **options | {"shift": False})
        mask = targets != IGNORE_INDEX
        picked, sequence = {name: values[mask] for name, values in found.items()}, row[mask]
        logps = picked["logp"].new_zeros(num_rows).index_add(0, sequence, picked["logp"])
        counts = torch.bincount(sequence, minlength=num_rows)
        picked["token_logps"] = picked.pop("logp")
        return self._loss(counts, logps, sequence, of_tokens=picked)

    def of_hidden(self, hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        """The loss of the (T, H) hidden states where a token is scored; with logits for a method that reads them."""
        targets, row = self._targets(labels, len(lm_head_weight), options.get("cu_seqlens"))
        mask = targets != IGNORE_INDEX
        head = Head(lm_head_weight, **{name: options[name] for name in Head._fields[1:] if name in options})
        of_tokens = {"hidden": hidden[mask], "targets": targets[mask]}
        if self.method.reads == "logits":
            logits = torch.nn.functional.linear(of_tokens["hidden"], head.weight, head.bias).float() * head.logit_scale
            of_tokens["logits"] = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
        logps, num_tokens = self._retain_logps(hidden, lm_head_weight, labels, row, options)
        return self._loss(num_tokens, logps, row[mask], head, of_tokens)

    def of_activations(self, hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        """The loss of the (T, H) outputs of a layer where tokens count."""
        given = require(self.activations, "activations")
        row = row_of_position(labels, options.get("cu_seqlens"))
        of_tokens = {"activations": given.read().flatten(0, 1)[given.positions.flatten()]}
        if given.frozen is not None:
            of_tokens["ref_activations"] = given.frozen
        logps, num_tokens = self._retain_logps(hidden, lm_head_weight, labels, row, options)
        return self._loss(num_tokens, logps, row[given.positions], of_tokens=of_tokens)

    def _targets(self, labels: Tensor, vocab_size: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """(what each position is scored on, its row), of the shape of labels; IGNORE_INDEX where nothing is scored."""
        row = row_of_position(labels, cu_seqlens)
        forget = row < self.num_rows["forget"] if "forget" in self.method.rows else torch.zeros_like(row).bool()
        return targets_of(self.method, self.settings, labels, forget, vocab_size, cu_seqlens), row

    def _retain_logps(
        self, hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, row: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor]:
        """(logps (B,), num_tokens (B,)); log-probabilities of the retain rows alone, where their NLL counts."""
        num_rows = self._num_rows(labels, options.get("cu_seqlens"))
        scored = next_labels(labels, options.get("cu_seqlens")) != IGNORE_INDEX
        num_tokens = torch.bincount(row[scored], minlength=num_rows)
        if self.method.retain != "nll":
            return None, num_tokens
        forget = row < num_rows - self.num_rows["retain"]
        kept = labels.masked_fill(forget, IGNORE_INDEX)
        return sequence_logprobs(hidden, lm_head_weight, kept, **options)[0], num_tokens

    def _num_rows(self, labels: Tensor, cu_seqlens: Tensor | None) -> int:
        """The number of rows in the batch, checked against the expected kinds."""
        rows = len(labels) if cu_seqlens is None else len(cu_seqlens) - 1
        self._check(rows)
        return rows

    def _check(self, rows: int) -> None:
        expected = {kind: self.num_rows[kind] for kind in self.method.kinds}
        if sum(expected.values()) != rows:
            raise ValueError(f"{self.method.label}: expected rows {expected}, got {rows} sequences")

    def _loss(
        self,
        num_tokens: Tensor,
        logps: Tensor | None,
        sequence: Tensor | None = None,
        head: Head | None = None,
        of_tokens: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Split the batch into the rows of each kind and compute the loss."""
        kinds: dict[str, Rows] = {}
        first = first_token = 0
        for kind in self.method.kinds:
            rows = slice(first, first := first + self.num_rows[kind])
            reference = self.references.get(kind)
            cut: dict[str, Any] = {}
            if sequence is not None:
                mine: Tensor | slice = (sequence >= rows.start) & (sequence < rows.stop)
                if self.num_scored:  # known beforehand: no GPU is waited for
                    mine = slice(first_token, first_token := first_token + self.num_scored[kind])
                cut = {name: values[mine] for name, values in (of_tokens or {}).items()}
                cut |= {"sequence": sequence[mine] - rows.start}
                cut["statistics"] = {name: cut.pop(name) for name in self.method.statistics}
            kinds[kind] = Rows(
                num_tokens[rows],
                None if logps is None else logps[rows],
                None if reference is None else reference.logps,
                ref_token_logps=None if reference is None else reference.token_logps,
                head=head,
                teacher=self.teacher if kind == "forget" else None,
                **cut,
            )
        batch = Batch(kinds, self.num_sequences, self.num_tokens, self.idk_ratio, self.num_counted)
        settings = self._settings(batch)
        if self.observed is None:
            return self.method.total(batch, settings)
        self._observe(batch, settings, self.observed)
        return self.method.total(batch, settings, self.observed.term)

    @torch.no_grad()
    def _observe(self, batch: Batch, settings: Settings, observed: Observed) -> None:
        """Record log-probabilities and log-ratios of the rows, if the method reads log-probabilities."""
        for kind, rows in batch.kinds.items():
            scored = kind == "retain" or self.method.reads in ("sequence", "token", "statistics")
            if scored and rows.summed is not None:
                observed.rows(f"logps/{kind}", rows.summed, rows.num_tokens)
        forget = batch.kinds.get("forget")
        if forget is not None and forget.summed is not None and forget.ref_logps is not None:
            observed.rows("log_ratio", forget.ratio, forget.num_tokens)
        if forget is not None and self.method.row_weight is not None:
            observed.rows("npo/weight", self.method.row_weight(batch, settings), forget.num_tokens)

    def _settings(self, batch: Batch) -> Settings:
        """Settings with the current retain weight; records the retain term for its next update."""
        if self.dual is None or self.method.retain != "nll":
            return self.settings
        weight, tokens = self.dual.weight, batch.rows("retain").num_tokens.sum()
        self.dual.observe(-batch.rows("retain").logps.detach().sum(), tokens)
        return replace(self.settings, retain_weight=weight)


def targets_of(
    method: Method, settings: Settings, labels: Tensor, forget: Tensor, vocab_size: int, cu_seqlens: Tensor | None
) -> Tensor:
    """The target of each position, of the shape of labels; IGNORE_INDEX where nothing is scored.

    Usually the next label. With `published_rows` the forget rows, those of the mask, have the positions of
    `Method.published_rows`: "label", that of the token itself; "every", all of a padded batch up to the last label, on
    token V - 100 where there is no label.
    """
    targets = next_labels(labels, cu_seqlens)
    if not settings.published_rows or method.published_rows is None:
        return targets
    if method.published_rows == "label":
        return torch.where(forget, labels, targets)
    if cu_seqlens is not None:
        raise ValueError("--published_rows: this method counts the padding of a batch; expected --packing off")
    labelled = (forget & (labels != IGNORE_INDEX)).any(0)
    before_last = labelled.flip(0).cumsum(0).flip(0)[1:] > 0  # the last label is of the longest row
    counted = forget & torch.nn.functional.pad(before_last, (0, 1))
    return torch.where(counted & (targets == IGNORE_INDEX), vocab_size + IGNORE_INDEX, targets)


@torch.no_grad()
def reference_of(model: PreTrainedModel, rows: dict[str, Tensor]) -> Reference:
    """Hidden states and head of the frozen model, from one forward without logits."""

    def taken(hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **_: Any):
        return hidden, Reference(hidden, lm_head_weight, bias)  # where a loss and its statistics would be

    return model(**rows, fused_unlearning=taken).stats


def kl_to_reference(
    reference: Reference,
    mask: Tensor,
    weight: float = 1.0,
    num_positions: float | None = None,
    dual: DualWeight | None = None,
    epsilon: float = 0.0,
    observed: Observed | None = None,
) -> Callable[..., Tensor]:
    """weight * mean KL(reference || model) over the mask, (R, S) or (T,) bool; `num_positions` replaces its count.

    With a `dual` weight: weight * (KL - epsilon). The KL is recorded for the update of the weight.
    """

    def objective(
        hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *, bias=None, logit_scale=1.0, softcap=None, **_: Any
    ) -> Tensor:
        kl = fused_linear_kl(
            hidden,
            lm_head_weight,
            reference.hidden,
            reference.weight,
            mask=mask,
            reduction="sum",
            bias=bias,
            ref_bias=reference.bias,
            logit_scale=logit_scale,
            softcap=softcap,
        )
        count = mask.sum()
        positions = count.clamp(min=1) if num_positions is None else num_positions
        if dual is None:
            if observed is not None:
                observed.term("retain", kl / positions, weight)
            return weight * kl / positions
        now, over = dual.weight, kl / positions - epsilon * count / positions
        dual.observe(kl.detach(), count)
        if observed is not None:
            observed.term("retain", over, now)
        return now * over

    return objective
