"""Score answers without forming logits: log-probabilities, and the other per-token numbers that metrics need."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels import sequence_logprobs, token_logprobs, token_statistics
from training import distributed
from training.data import IGNORE_INDEX, Example, collate, next_labels, pack, row_of_position
from training.interruption import check, check_alone
from training.model import autocast, check_length
from training.progress import OnRows, nothing

PerToken = Literal["token_logps", "hidden", "statistics"]


class AnswerScores(NamedTuple):
    """Numbers of the n scored tokens of one example, (n,) each; n may be 0."""

    logps: np.ndarray  # float64, log-probability of each token
    mean: np.ndarray  # of the log-probability of a token that is drawn from the model there
    std: np.ndarray
    hits: np.ndarray  # bool: the token is the most likely one

    @property
    def nll(self) -> float:
        """Mean negative log-probability of a token, in nats; 0 without tokens."""
        return -float(self.logps.mean()) if len(self.logps) else 0.0

    @property
    def body(self) -> "AnswerScores":
        """Without the last token, which ends an answer."""
        return AnswerScores(*(values[:-1] for values in self))


class Scores(NamedTuple):
    """Scores of N rows with T scored tokens in total, ordered by row and position."""

    logps: Tensor  # (N,) float32 on the CPU, summed log-probability of the answer and <eos>
    num_tokens: Tensor  # (N,) int64
    token_logps: Tensor | None = None  # (T,) float32, where they were asked for
    hidden: Tensor | None = None  # (T, H) what the head saw where a token is scored, likewise
    statistics: Tensor | None = None  # (T, 4) float32: log-probability, its mean and variance, 1 for the likeliest

    @property
    def answer_probability(self) -> Tensor:
        """(N,) exp(logp / number of tokens), the geometric mean of the token probabilities (TOFU's Probability)."""
        return torch.exp(self.logps / self.num_tokens)

    def rows(self, members: Sequence[int], device: torch.device) -> "Scores":
        """The scores of some rows, moved to a device."""
        index = torch.tensor(members, dtype=torch.int64)
        counts = self.num_tokens[index]
        first = (self.num_tokens.cumsum(0) - self.num_tokens)[index]
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        tokens = first.repeat_interleave(counts) + within
        picked = (None if t is None else t[tokens].to(device) for t in self[2:])
        return Scores(self.logps[index].to(device), counts.to(device), *picked)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 64,
    packing: bool = False,
    on_rows: OnRows = nothing,
    per_token: PerToken | None = None,
) -> Scores:
    """Scores of all examples, in their order; in eval mode (no dropout), the mode of the model is restored.

    Several processes share every batch, and all get all scores. `packing` puts a batch in one row without padding,
    for models whose attention keeps its sequences apart (`training.data.pack`). `per_token`: what to keep of tokens.
    """
    check_length(model, max((len(e.input_ids) for e in examples), default=0), "an example")
    was_training, device = model.training, model.device
    model.eval()
    logps = torch.zeros(len(examples), device=device)
    num_tokens = torch.zeros(len(examples), dtype=torch.int64, device=device)
    counts = torch.tensor([sum(label != IGNORE_INDEX for label in e.labels[1:]) for e in examples], dtype=torch.int64)
    first = counts.cumsum(0) - counts
    tokens: Tensor | None = None
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))  # little padding
    for start in range(0, len(by_length), batch_size):
        members = by_length[start : start + batch_size]
        mine, rows = distributed.share(examples, members)
        with autocast(model):
            batch = pack(rows, device) if packing else collate(rows, pad_id, device)
            if per_token is None:
                out = model(**batch, fused_unlearning=True)
                logps[mine], num_tokens[mine] = out.logps, out.num_tokens
            else:
                sums, number, found = _with_tokens(model, batch, per_token)
                logps[mine], num_tokens[mine] = sums, number
                if tokens is None:
                    tokens = torch.zeros(int(counts.sum()), *found.shape[1:], dtype=found.dtype)
                pieces = found.cpu().split(number.tolist())
                for i, piece in zip(mine, pieces, strict=True):
                    tokens[first[i] : first[i] + len(piece)] = piece
        on_rows(len(members), sum(len(examples[i].input_ids) for i in members))
        check()
    model.train(was_training)
    scores = Scores(distributed.total(logps).cpu(), distributed.total(num_tokens).cpu())
    if per_token is None:
        return scores
    kept = torch.zeros(0) if tokens is None else tokens
    whole = kept if distributed.count() == 1 else distributed.total(kept.to(device)).cpu()  # zeros where others were
    return scores._replace(**{per_token: whole})


def answer_scores(
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 64,
    on_rows: OnRows = nothing,
) -> list[AnswerScores]:
    """The per-token numbers for all metrics of an answer, from one pass with one product with the head."""
    found = score(model, examples, pad_id, batch_size, on_rows=on_rows, per_token="statistics")
    assert found.statistics is not None
    pieces = found.statistics.double().reshape(-1, 4).numpy().T
    ends = found.num_tokens.cumsum(0).tolist()[:-1]
    logps, mean, variance, hits = (np.split(values, ends) if len(examples) else [] for values in pieces)
    spread = [np.sqrt(values) for values in variance]
    return [AnswerScores(*some) for some in zip(logps, mean, spread, (h > 0.5 for h in hits), strict=True)]


Kept = tuple[Tensor, Tensor, Tensor]  # logps (B,), num_tokens (B,), and something of each of the T scored tokens


def _with_tokens(model: PreTrainedModel, batch: dict[str, Tensor], kind: PerToken) -> Kept:
    """Log-probabilities (T,), hidden states (T, H) or statistics (T, 4) of the scored tokens."""
    kept: list[Kept] = []

    def keep(hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        cu_seqlens = options.get("cu_seqlens")
        following = next_labels(labels, cu_seqlens)
        scored = following != IGNORE_INDEX
        if kind == "statistics":
            found = _statistics(hidden, lm_head_weight, labels, following, options)
            row, lines = row_of_position(labels, cu_seqlens), len(labels) if cu_seqlens is None else len(cu_seqlens) - 1
            counts = torch.bincount(row[scored], minlength=lines)
            sums = hidden.new_zeros(lines, dtype=torch.float64).index_add_(0, row[scored], found[scored, 0].double())
            kept.append((sums.float(), counts, found[scored]))
        else:
            of_all = hidden if kind == "hidden" else token_logprobs(hidden, lm_head_weight, labels, **options)
            kept.append((*sequence_logprobs(hidden, lm_head_weight, labels, **options), of_all[scored]))
        return kept[0][0].sum()

    model(**batch, fused_unlearning=keep)
    return kept[0]


def _statistics(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, following: Tensor, options: dict[str, Any]
) -> Tensor:
    """(..., 4): log-probability of the token, mean and variance of those the model could draw, 1 for the likeliest."""
    which: Any = ["logp", "entropy", "var_logp", "argmax"]
    found = token_statistics(hidden, lm_head_weight, labels, which, **options)
    return torch.stack(
        (found["logp"], -found["entropy"], found["var_logp"], (found["argmax"] == following).float()), -1
    )


def gradient_norms(model: PreTrainedModel, examples: Sequence[Example]) -> list[float]:
    """Mean over the parameters of the Euclidean norm of the gradient of an example's loss, one example at a time.

    The loss is the mean over the scored tokens but the last; 0 where that leaves none. All parameters count, whether or
    not they are trained, and keep the gradients that they have. ValueError in several processes.
    """
    if distributed.count() > 1:
        raise ValueError("--mia_gradnorm: expected one process; evaluate the saved model in one")
    was_training, device = model.training, model.device
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    trained = [parameter.requires_grad for parameter in parameters]
    model.requires_grad_(True)
    norms = torch.zeros(len(examples), device=device)
    with torch.enable_grad():
        for i, row in enumerate(examples):
            check_alone()
            labels = list(row.labels)
            last = max((t for t, label in enumerate(labels) if label != IGNORE_INDEX), default=0)
            labels[last] = IGNORE_INDEX
            if any(label != IGNORE_INDEX for label in labels[1:]):
                with autocast(model):
                    out = model(**collate([Example(row.input_ids, labels)], 0, device), fused_unlearning=True)
                grads = torch.autograd.grad(-(out.logps / out.num_tokens).sum(), parameters, allow_unused=True)
                norms[i] = torch.stack([g.norm() for g in grads if g is not None]).mean()
    for parameter, flag in zip(parameters, trained, strict=True):
        parameter.requires_grad_(flag)
    model.train(was_training)
    return norms.tolist()
