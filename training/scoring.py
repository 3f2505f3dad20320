"""What a model gives to answers: their log-probabilities, without logits, and the tokens it would have said instead."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels import sequence_logprobs, token_logprobs
from training import distributed
from training.data import IGNORE_INDEX, Example, collate, next_labels, pack
from training.model import autocast

ROWS_AT_ONCE = 512  # of the head, where the most likely token is asked for: 256 MiB of float32 logits at V=128256
PerToken = Literal["token_logps", "hidden"]


class Scores(NamedTuple):
    """Of N rows with T scored tokens in all, which are in the order of rows and positions."""

    logps: Tensor  # (N,) float32 on the CPU, summed log-probability of the answer and <eos>
    num_tokens: Tensor  # (N,) int64
    token_logps: Tensor | None = None  # (T,) float32, where they were asked for
    hidden: Tensor | None = None  # (T, H) what the head saw where a token is scored, likewise

    @property
    def answer_probability(self) -> Tensor:
        """(N,) exp(logp / number of tokens), the geometric mean of the token probabilities (TOFU's Probability)."""
        return torch.exp(self.logps / self.num_tokens)

    def rows(self, members: Sequence[int], device: torch.device) -> "Scores":
        """Of some of the rows, on a device."""
        index = torch.tensor(members, dtype=torch.int64)
        counts = self.num_tokens[index]
        first = (self.num_tokens.cumsum(0) - self.num_tokens)[index]
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        tokens = first.repeat_interleave(counts) + within
        picked = (None if t is None else t[tokens].to(device) for t in (self.token_logps, self.hidden))
        return Scores(self.logps[index].to(device), counts.to(device), *picked)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 64,
    packing: bool = False,
    on_rows: Callable[[int], None] = lambda count: None,
    per_token: PerToken | None = None,
) -> Scores:
    """Scores of all examples, in their order; in eval mode (no dropout), the mode of the model is restored.

    Several processes share every batch, and all get all scores. `packing` puts a batch in one row without padding,
    for models whose attention keeps its sequences apart (`training.data.pack`). `per_token`: what to keep of tokens.
    """
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
        on_rows(len(members))
    model.train(was_training)
    scores = Scores(distributed.total(logps).cpu(), distributed.total(num_tokens).cpu())
    if per_token is None:
        return scores
    kept = torch.zeros(0) if tokens is None else tokens
    whole = kept if distributed.count() == 1 else distributed.total(kept.to(device)).cpu()  # zeros where others were
    return scores._replace(**{per_token: whole})


def _with_tokens(model: PreTrainedModel, batch: dict[str, Tensor], kind: PerToken) -> tuple[Tensor, Tensor, Tensor]:
    """(logps (B,), num_tokens (B,), log-probabilities (T,) or hidden states (T, H) of the scored tokens)."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        scored = next_labels(labels, options.get("cu_seqlens")) != IGNORE_INDEX
        of_all = hidden if kind == "hidden" else token_logprobs(hidden, lm_head_weight, labels, **options)
        sums = sequence_logprobs(hidden, lm_head_weight, labels, **options)
        kept.append((*sums, of_all[scored]))
        return sums[0].sum()

    model(**batch, fused_unlearning=keep)
    return kept[0]


@torch.no_grad()
def predicted_answers(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch_size: int = 64
) -> list[tuple[list[int], list[int]]]:
    """(most likely, true) tokens of every answer, <eos> left out, each given the true tokens before it.

    Only the answers' hidden states meet the head, at most `ROWS_AT_ONCE` of them, so logits stay small. Scaling and
    soft-capping of logits keep their order and are not applied.
    """
    was_training, device, head = model.training, model.device, model.get_output_embeddings()
    model.eval()
    backbone = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    found: list[tuple[list[int], list[int]]] = [([], [])] * len(examples)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    for start in range(0, len(by_length), batch_size):
        members = by_length[start : start + batch_size]
        batch = collate([examples[i] for i in members], pad_id, device)
        answers = batch["labels"][:, 1:] != IGNORE_INDEX
        with autocast(model):
            hidden = backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            rows = hidden[:, :-1][answers].split(ROWS_AT_ONCE)
            predicted = torch.cat([head(r).argmax(-1) for r in rows])
        lengths = answers.sum(1).tolist()
        true = batch["labels"][:, 1:][answers]
        for i, p, t in zip(members, predicted.split(lengths), true.split(lengths), strict=True):
            found[i] = p[:-1].tolist(), t[:-1].tolist()
    model.train(was_training)
    return found
