"""Answer probabilities, without logits: what a model gives to the true answers, token by token."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from training import processes
from training.data import PROMPT, Example, collate
from training.model import autocast


class Scores(NamedTuple):
    logps: Tensor  # (N,) float32 on the CPU, summed log-probability of the answer and <eos>
    num_tokens: Tensor  # (N,) int64

    @property
    def answer_probability(self) -> Tensor:
        """(N,) exp(logp / number of tokens), the geometric mean of the token probabilities (TOFU's Probability)."""
        return torch.exp(self.logps / self.num_tokens)


@torch.no_grad()
def score(model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch_size: int = 64) -> Scores:
    """Scores of all examples, in their order; in eval mode (no dropout), the mode of the model is restored.

    Several processes share every batch, and all get all scores.
    """
    was_training, device = model.training, model.device
    model.eval()
    logps = torch.zeros(len(examples), device=device)
    num_tokens = torch.zeros(len(examples), dtype=torch.int64, device=device)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))  # little padding
    for start in range(0, len(by_length), batch_size):
        members = by_length[start : start + batch_size]
        mine, rows = processes.share(examples, members)
        with autocast(device):
            out = model(**collate(rows, pad_id, device), fused_unlearning=True)
        logps[mine], num_tokens[mine] = out.logps, out.num_tokens
    model.train(was_training)
    return Scores(processes.total(logps).cpu(), processes.total(num_tokens).cpu())


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str, max_new_tokens: int = 48
) -> str:
    """The model's greedy answer, one prompt at a time (so there is no padding to get wrong)."""
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(PROMPT.format(question=question), add_special_tokens=False)]
    input_ids = torch.tensor([prompt], device=model.device)
    output = model.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
