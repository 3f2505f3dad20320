"""Answer probabilities, without logits: what a model gives to the true answers, token by token."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from npo_kernels import sequence_logprobs
from training.data import PROMPT, Example, collate
from training.model import autocast, hidden_states


class Scores(NamedTuple):
    logps: Tensor  # (N,) float32 on the CPU, summed log-probability of the answer and <eos>
    num_tokens: Tensor  # (N,) int64

    @property
    def answer_probability(self) -> Tensor:
        """(N,) exp(logp / number of tokens), the geometric mean of the token probabilities (TOFU's Probability)."""
        return torch.exp(self.logps / self.num_tokens)


@torch.no_grad()
def score(model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch_size: int = 64) -> Scores:
    """Scores of all examples, in their order; in eval mode (no dropout), the mode of the model is restored."""
    was_training, device = model.training, model.device
    model.eval()
    logps = torch.zeros(len(examples))
    num_tokens = torch.zeros(len(examples), dtype=torch.int64)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))  # little padding
    for start in range(0, len(by_length), batch_size):
        members = by_length[start : start + batch_size]
        batch = collate([examples[i] for i in members], pad_id, device)
        with autocast(device):
            sums, counts = sequence_logprobs(hidden_states(model, batch), model.lm_head.weight, batch["labels"])
        logps[members], num_tokens[members] = sums.cpu(), counts.cpu()
    model.train(was_training)
    return Scores(logps, num_tokens)


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str, max_new_tokens: int = 48
) -> str:
    """The model's greedy answer, one prompt at a time (so there is no padding to get wrong)."""
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(PROMPT.format(question=question), add_special_tokens=False)]
    input_ids = torch.tensor([prompt], device=model.device)
    output = model.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
