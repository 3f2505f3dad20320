"""The reference log-probabilities of the forget set, computed once: two numbers a sequence instead of a second model.

One safetensors file: `logps` (N,) float32 sums and `num_tokens` (N,) int64, and in its header what they belong to:
hashes of the weights, the tokenizer and the data, and the numerical settings. A file that does not match is refused.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from training.data import Example, data_hash
from training.model import weights_hash
from training.processes import on_main
from training.scoring import Scores, score
from training.stages import renamed_when_done
from training.templates import Format

FORMAT = "1"


class StaleReferenceError(ValueError):
    """The cache is unreadable, or belongs to another model, tokenizer, data set or setting."""


def header(model: PreTrainedModel, format: Format, examples: Sequence[Example]) -> dict[str, str]:
    """All that the cached numbers depend on."""
    return {
        "format": FORMAT,
        "model": weights_hash(model),
        "tokenizer": format.hash(),
        "data": data_hash(examples),
        "precision": "bfloat16 autocast" if model.device.type == "cuda" else str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
    }


def compute_reference(path: Path, model: PreTrainedModel, format: Format, examples: Sequence[Example]) -> Scores:
    """Score the examples with the loss kernel itself and write the cache."""
    scores = score(model, examples, format.pad_token_id)

    def write() -> None:
        with renamed_when_done(path) as temporary:
            save_file(scores._asdict(), temporary, metadata=header(model, format, examples))

    on_main(write)
    return scores


def load_reference(path: Path, model: PreTrainedModel, format: Format, examples: Sequence[Example]) -> Scores:
    """The cached scores, or StaleReferenceError with the reason why they are not those of this model and data."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            scores = Scores(file.get_tensor("logps"), file.get_tensor("num_tokens"))
    except FileNotFoundError as error:
        raise StaleReferenceError(f"there is no reference cache {path.name}; compute it first") from error
    except SafetensorError as error:
        raise StaleReferenceError(
            f"{path.name} is not a readable safetensors file ({error}); compute it again"
        ) from error
    for name, expected in header(model, format, examples).items():
        if found.get(name) != expected:
            raise StaleReferenceError(
                f"{path.name} was computed with another {name}: found {str(found.get(name))[:16]}, expected "
                f"{expected[:16]}; compute it again with the present model before any unlearning step"
            )
    if scores.logps.shape != (len(examples),) or not torch.isfinite(scores.logps).all():
        raise StaleReferenceError(
            f"{path.name} holds {tuple(scores.logps.shape)} log-probabilities or some that are not finite"
        )
    return scores
