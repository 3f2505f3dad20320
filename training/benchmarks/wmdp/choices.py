"""Log-probabilities of the letters A to D behind a question, tokenised and scored as lm-evaluation-harness does it.

The tokens of " A" are those that prompt + " A" has behind the tokens of the prompt, so a tokenizer that puts a space
before every text puts none there. No token begins the prompt, unless <bos> is asked for (its `add_bos_token`). What is
longer than the model's positions loses its beginning.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npo_kernels import token_logprobs
from training import distributed
from training.benchmarks.wmdp.questions import LETTERS
from training.config import Switch
from training.data import IGNORE_INDEX, Example, collate
from training.model import autocast
from training.progress import OnRows, nothing
from training.scoring import score


class Encoded(NamedTuple):
    prompt: list[int]
    letters: list[list[int]]  # token ids of each, behind the prompt

    @property
    def single(self) -> bool:
        """Whether each letter is one token."""
        return all(len(ids) == 1 for ids in self.letters)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, bos: bool = False) -> Encoded:
    """ValueError where a letter has no token of its own, or there is no <bos> to begin with."""
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("--bos on: expected a tokenizer with bos_token, got one without; choose off")
    first = [tokenizer.bos_token_id] if bos else []
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    wholes = (tokenizer.encode(f"{prompt} {letter}", add_special_tokens=False) for letter in LETTERS)
    letters = [whole[len(ids) :] for whole in wholes]
    if not all(letters):
        raise ValueError(f"the tokenizer merges {prompt[-12:]!r} and a letter behind it into one token")
    return Encoded(first + ids, letters)


def begins_with_bos(switch: Switch, model: PreTrainedModel) -> bool:
    """auto: for Gemma alone, which is lost without it; as in lm-evaluation-harness."""
    return switch == "on" or (switch == "auto" and "gemma" in model.config.model_type)


def letter_logps(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    pad_id: int,
    batch_size: int = 32,
    on_rows: OnRows = nothing,
) -> list[list[float]]:
    """Of each question, the log-probability of each letter in nats, in float32; in eval mode.

    One forward of the prompt where the letters are single tokens: the head then meets the last hidden state alone.
    Otherwise one of each continuation.
    """
    found: list[list[float]] = [[]] * len(encoded)
    for scored, single in ((_last_state, True), (_continuations, False)):
        members = [i for i, one in enumerate(encoded) if one.single == single]
        some = [encoded[i] for i in members]
        for i, logps in zip(members, scored(model, some, pad_id, batch_size, on_rows), strict=True):
            found[i] = logps
    return found


@torch.no_grad()
def _last_state(
    model: PreTrainedModel, encoded: Sequence[Encoded], pad_id: int, batch_size: int, on_rows: OnRows
) -> list[list[float]]:
    was_training, device = model.training, model.device
    model.eval()
    examples = [Example(ids, [IGNORE_INDEX] * len(ids)) for ids in (_cut(model, one.prompt) for one in encoded)]
    letters = torch.tensor([[ids[0] for ids in one.letters] for one in encoded], dtype=torch.int64, device=device)
    logps = torch.zeros(len(encoded), len(LETTERS), device=device)
    by_length = sorted(range(len(encoded)), key=lambda i: len(examples[i].input_ids))  # little padding
    for start in range(0, len(by_length), batch_size):
        members = by_length[start : start + batch_size]
        part = distributed.parts(members)[0]
        rows = distributed.rows(examples, part, members)
        with autocast(model):
            of_rows = _next_token(model, collate(rows, pad_id, device), letters[part or members[:1]])
        if part:
            logps[part] = of_rows
        on_rows(len(members), sum(len(examples[i].input_ids) for i in members))
    model.train(was_training)
    return distributed.total(logps).tolist()


def _next_token(model: PreTrainedModel, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Log-probabilities (B, K) float32 of `tokens` (B, K) behind each row of a batch that is padded on the right."""
    found: list[Tensor] = []
    rows, last = torch.arange(len(tokens), device=tokens.device), batch["attention_mask"].sum(1) - 1

    def read(hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        states = hidden[rows, last].unsqueeze(1).expand(-1, tokens.shape[1], -1)
        found.append(token_logprobs(states, lm_head_weight, tokens, **options | {"shift": False}))
        return found[0].sum()

    model(**batch, fused_unlearning=read)
    return found[0]


def _continuations(
    model: PreTrainedModel, encoded: Sequence[Encoded], pad_id: int, batch_size: int, on_rows: OnRows
) -> list[list[float]]:
    examples = []
    for one in encoded:
        for ids in one.letters:
            labels = [IGNORE_INDEX] * len(one.prompt) + ids
            examples.append(Example(_cut(model, one.prompt + ids), _cut(model, labels)))
    logps = score(model, examples, pad_id, batch_size).logps.view(len(encoded), len(LETTERS))
    on_rows(len(encoded), sum(len(example.input_ids) for example in examples))
    return logps.tolist()


def _cut(model: PreTrainedModel, ids: list[int]) -> list[int]:
    return ids[-(getattr(model.config.get_text_config(), "max_position_embeddings", None) or len(ids)) :]
