"""Train a small tokenizer; hash a tokenizer."""

import hashlib
import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.data import Row

PLAIN_PROMPT = "Question: {question}\nAnswer:"
PLAIN_ANSWER = " {answer}"


def train_tokenizer(rows: Iterable[Row], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the text itself: no unknown tokens, and short answers even with a small vocabulary.

    Rows are questions with answers, or {"text"}.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((part for row in rows for part in _parts(row)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def _parts(row: Row) -> tuple[str, ...]:
    """The texts, each tokenised separately."""
    return (row["text"],) if "text" in row else (PLAIN_PROMPT.format(**row), PLAIN_ANSWER.format(**row))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # in Python, without a description of itself
        state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:  # the last call's padding and truncation are part of it, and not of the tokenizer
        state = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
