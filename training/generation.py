"""Answers of a model, greedy or sampled, to one prompt or many."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from training.interruption import check, check_alone
from training.model import autocast, check_length, skips_other_rows
from training.progress import OnRows, nothing
from training.templates import Format

# Two float32 logits of a row that differ by less than so many units in the last place of its largest one (by magnitude)
# may change places in another batch, as matrix products of another shape add in another order. Margins of SmolLM2-135M
# move by up to 4, those of 24 random layers with weights of deviation 0.3 by up to 64.
CLOSE = 128


def complete(model: PreTrainedModel, format: Format, question: str, max_new_tokens: int = 48) -> str:
    """The model's greedy answer to one question."""
    (answer,) = complete_all(model, format, [question], max_new_tokens)
    return answer


def complete_all(
    model: PreTrainedModel,
    format: Format,
    questions: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 32,
    on_rows: OnRows = nothing,
    temperature: float = 0.0,
) -> list[str]:
    """Answers to questions in the template of the model, as `generate` makes them."""
    prompts = [format.prompt_ids(question) for question in questions]
    return generate(model, prompts, format, max_new_tokens, batch_size, on_rows, temperature)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    format: Format,
    max_new_tokens: int,
    batch_size: int = 32,
    on_rows: OnRows = nothing,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
) -> list[str]:
    """Greedy texts in the order of the prompts, each up to the token that ends it or the first of the `stop` texts.

    Prompts of similar length share a batch, padded on the left, with a key-value cache. Arithmetic is in the dtype of
    the weights, here float32, for any training precision. An answer then does not depend on its batch: if the two best
    logits of a step are closer than rounding errors (`CLOSE`), the answer is generated again alone. With 16-bit
    weights, and with flash attention, which requires them, too many steps are that close, and an answer may depend on
    its batch.

    A `temperature` above 0 samples answers instead, with the current state of torch's generators.

    The generation settings in a chat model's folder (temperature, repetition penalty) are ignored, since ROUGE of
    sampled text differs from run to run.
    """
    longest = max(map(len, prompts), default=0)
    check_length(model, longest + max_new_tokens, "a prompt and its answer")
    was_training = model.training
    model.eval()
    writer = _Writer(model, format, max_new_tokens, temperature, stop)
    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    for start in range(0, len(by_length), batch_size):
        members = by_length[start : start + batch_size]
        written, num_tokens = writer.write([prompts[i] for i in members])
        for i, text in zip(members, written, strict=True):
            texts[i] = text
        on_rows(len(members), num_tokens)
        check()
    model.train(was_training)
    return texts


class _Writer:
    """Generates texts for batches of prompts."""

    def __init__(
        self, model: PreTrainedModel, format: Format, max_new_tokens: int, temperature: float, stop: Sequence[str]
    ):
        if not all(stop):
            raise ValueError(f"stop: expected texts with at least one character, got {list(stop)}")
        self.model, self.format, self.stop = model, format, stop
        self.flash = skips_other_rows(model.config._attn_implementation)
        greedy = temperature == 0
        self.exact = greedy and not self.flash and model.dtype == torch.float32
        self.settings = GenerationConfig(
            do_sample=not greedy,
            **({} if greedy else {"temperature": temperature, "top_k": 0}),
            max_new_tokens=max_new_tokens,
            pad_token_id=format.pad_token_id,
            bos_token_id=format.tokenizer.bos_token_id,
            eos_token_id=format.stop_ids,
        )

    def write(self, prompts: Sequence[list[int]]) -> tuple[list[str], int]:
        """The texts and their total number of tokens."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        filled = [[self.format.pad_token_id] * p + ids for p, ids in zip(padding, prompts, strict=True)]
        mask = [[0] * p + [1] * (longest - p) for p in padding]
        margins = _Margins()
        criteria: list[StoppingCriteria] = [_Interruptible()]
        if self.stop:
            criteria.append(_StopTexts(self.format, self.stop, longest))
        run = cast(Callable[..., Tensor], self.model.generate)  # a mix-in of causal models has it, not their base class
        with self._own_settings(), autocast(self.model) if self.flash else contextlib.nullcontext():
            output = run(
                torch.tensor(filled, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                generation_config=self.settings,
                logits_processor=LogitsProcessorList([margins] if self.exact and len(prompts) > 1 else []),
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        texts, total = [], 0
        for i, tokens in enumerate(output[:, longest:].tolist()):
            text, count = self._text(tokens)
            if margins.close(i, count):
                (text,), count = self.write([prompts[i]])
            texts.append(text)
            total += count
        return texts, total

    @contextlib.contextmanager
    def _own_settings(self) -> Iterator[None]:
        """Generation settings without the defaults of the model's folder."""
        kept = self.model.generation_config
        self.model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            self.model.generation_config = kept

    def _text(self, tokens: list[int]) -> tuple[str, int]:
        """(text, number of tokens including the end token). The tokens after it are padding and are dropped."""
        end = next((n for n, token in enumerate(tokens) if token in self.format.stop_ids), len(tokens))
        text = self.format.decode(tokens[:end], skip_special_tokens=True)
        if not any(stop in text for stop in self.stop):
            return text.strip(), min(end + 1, len(tokens))
        written = (self.format.decode(tokens[: n + 1], skip_special_tokens=True) for n in range(end))
        count = next(n for n, so_far in enumerate(written, 1) if any(stop in so_far for stop in self.stop))
        for stop in self.stop:
            text = text.partition(stop)[0]
        return text.strip(), count


class _Margins(LogitsProcessor):
    """Records at each step whether the two largest logits of a row are nearly equal. Does not change them."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []  # (B,) bool each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first, second = scores.topk(2).values.unbind(-1)
        largest = scores.masked_fill(scores.isinf(), 0).abs().amax(-1)
        self.steps.append(first - second <= CLOSE * torch.finfo(torch.float32).eps * largest)  # not where one is NaN
        return scores

    def close(self, row: int, count: int) -> bool:
        """Whether they were nearly equal in one of the first `count` steps."""
        return bool(self.steps) and bool(torch.stack(self.steps[:count])[:, row].any())


class _Interruptible(StoppingCriteria):
    """Never stops a row; lets a signal end a long batch."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        check_alone()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _StopTexts(StoppingCriteria):
    """Stops a row when its new text contains one of the stop texts."""

    def __init__(self, format: Format, stop: Sequence[str], prompt_length: int):
        self.format, self.stop, self.first = format, stop, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        texts = (self.format.decode(ids, skip_special_tokens=True) for ids in input_ids[:, self.first :].tolist())
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)
