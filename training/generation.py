"""Answers of a model, greedy or drawn: one prompt, or many at a time."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from training.model import autocast
from training.templates import Format


def complete(model: PreTrainedModel, format: Format, question: str, max_new_tokens: int = 48) -> str:
    """The model's greedy answer to one question."""
    (answer,) = complete_all(model, format, [question], max_new_tokens)
    return answer


@torch.no_grad()
def complete_all(
    model: PreTrainedModel,
    format: Format,
    questions: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda num_questions: None,
    temperature: float = 0.0,
) -> list[str]:
    """Greedy answers in the order of the questions, each up to the token that ends it; prompts are padded on the left.

    A `temperature` above 0 draws them from the model, with torch's generators as they are.

    A chat model's own generation settings (temperature, repetition penalty) are not used, whatever its folder says:
    ROUGE of sampled text is another number every time.
    """
    was_training = model.training
    model.eval()
    generate = cast(Callable[..., Tensor], model.generate)  # a mix-in of causal models has it, not their base class
    settings = GenerationConfig(
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}),
        max_new_tokens=max_new_tokens,
        pad_token_id=format.pad_token_id,
        bos_token_id=format.tokenizer.bos_token_id,
        eos_token_id=format.stop_ids,
    )
    prompts = [format.prompt_ids(question) for question in questions]
    answers = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    for start in range(0, len(by_length), batch_size):
        members = by_length[start : start + batch_size]
        longest = len(prompts[members[-1]])
        padding = [longest - len(prompts[i]) for i in members]
        rows = zip(padding, members, strict=True)
        input_ids = torch.tensor([[format.pad_token_id] * p + prompts[i] for p, i in rows], device=model.device)
        mask = torch.tensor([[0] * p + [1] * (longest - p) for p in padding], device=model.device)
        with autocast(model):  # the arithmetic that probabilities are computed in
            output = generate(input_ids, attention_mask=mask, generation_config=settings)
        for i, tokens in zip(members, output[:, longest:], strict=True):
            answers[i] = _text(format, tokens.tolist())
        on_batch(len(members))
    model.train(was_training)
    return answers


def _text(format: Format, tokens: list[int]) -> str:
    """What comes before the first token that ends an answer; behind it is filler, which may decode to anything."""
    end = next((n for n, token in enumerate(tokens) if token in format.stop_ids), len(tokens))
    return format.decode(tokens[:end], skip_special_tokens=True).strip()
