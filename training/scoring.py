"""What a model gives to answers: their log-probabilities, without logits, and the tokens it would have said instead."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from training import distributed
from training.data import IGNORE_INDEX, Example, collate, pack
from training.model import autocast

ROWS_AT_ONCE = 512  # of the head, where the most likely token is asked for: 256 MiB of float32 logits at V=128256


class Scores(NamedTuple):
    logps: Tensor  # (N,) float32 on the CPU, summed log-probability of the answer and <eos>
    num_tokens: Tensor  # (N,) int64

    @property
    def answer_probability(self) -> Tensor:
        """(N,) exp(logp / number of tokens), the geometric mean of the token probabilities (TOFU's Probability)."""
        return torch.exp(self.logps / self.num_tokens)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 64,
    packing: bool = False,
    on_rows: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Scores of all examples, in their order; in eval mode (no dropout), the mode of the model is restored.

    Several processes share every batch, and all get all scores. `packing` puts a batch in one row without padding,
    for models whose attention keeps its sequences apart (`training.data.pack`).
    """
    was_training, device = model.training, model.device
    model.eval()
    logps = torch.zeros(len(examples), device=device)
    num_tokens = torch.zeros(len(examples), dtype=torch.int64, device=device)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))  # little padding
    for start in range(0, len(by_length), batch_size):
        members = by_length[start : start + batch_size]
        mine, rows = distributed.share(examples, members)
        with autocast(model):
            batch = pack(rows, device) if packing else collate(rows, pad_id, device)
            out = model(**batch, fused_unlearning=True)
        logps[mine], num_tokens[mine] = out.logps, out.num_tokens
        on_rows(len(members))
    model.train(was_training)
    return Scores(distributed.total(logps).cpu(), distributed.total(num_tokens).cpu())


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
