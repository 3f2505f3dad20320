"""Examples from plain text: corpora in pieces of equal length, single documents, and continuations of a prompt.

Rows of a corpus are {"text": ...}. Every token is scored except the first of an example.
"""

from collections.abc import Iterable, Sequence

from training.data import IGNORE_INDEX, Example, Row
from training.templates import Format


def texts_of(rows: Iterable[Row]) -> list[str]:
    return [row["text"] for row in rows]


def chunks(format: Format, texts: Sequence[str], max_tokens: int) -> list[Example]:
    """The documents, joined by a blank line, in pieces of `max_tokens` tokens, the last one shorter.

    Each piece begins with <bos> where the tokenizer has prompts begin with it. A last piece with nothing to score is
    left out.
    """
    bos = format.text_ids("")
    size = max_tokens - len(bos)
    if size < 2:
        raise ValueError(f"max_tokens: expected at least {len(bos) + 2}, got {max_tokens}")
    ids = format.text_ids("\n\n".join(texts))[len(bos) :]
    pieces = (bos + ids[start : start + size] for start in range(0, len(ids), size))
    return [_scored(piece) for piece in pieces if len(piece) > 1]


def documents(format: Format, texts: Iterable[str], max_tokens: int) -> list[Example]:
    """Each text separately, cut to its first `max_tokens` tokens."""
    return [_scored(format.text_ids(text)[:max_tokens]) for text in texts]


def continuation(format: Format, prompt: str, text: str) -> Example:
    """The prompt and its continuation, tokenised separately, without an end token. Only the continuation is scored."""
    before, after = format.text_ids(prompt), format.continued_ids(text)
    return Example(before + after, [IGNORE_INDEX] * len(before) + after)


def _scored(ids: list[int]) -> Example:
    return Example(ids, [IGNORE_INDEX, *ids[1:]])
