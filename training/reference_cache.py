"""The reference log-probabilities of a data set, computed once: two numbers a sequence instead of a second model.

One safetensors file: `logps` (N,) float32 sums over the answers and `num_tokens` (N,) int64, and in its header all that
they depend on: hashes of weights, configuration, tokenizer, template and token ids, precision, attention, versions, and
a hash of the numbers themselves. Nothing of it is beside the file: one rename makes numbers and header appear together.
A file that does not match is refused with the reason.

A process that is killed at any moment leaves the old file or none, never a part: the next run computes anew.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from training import processes
from training.data import IGNORE_INDEX, Example, data_hash, tokenizer_hash
from training.model import weights_hash
from training.scoring import Scores, score
from training.stages import fingerprint, renamed_when_done
from training.templates import Format
from training.versions import versions

FORMAT = "2"
LIBRARIES = ("npo_kernels", "torch", "transformers")
NO_SETTINGS = {  # of a model's or an adapter's configuration: where it came from, not what it computes
    *("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
}


class StaleReferenceError(ValueError):
    """The cache is absent, unreadable, damaged, or belongs to another model, tokenizer, data set or setting."""


def header(
    model: PreTrainedModel, format: Format, examples: Sequence[Example], *, packing: bool = False
) -> dict[str, str]:
    """All that the cached numbers depend on."""
    used = versions()
    return {
        "format": FORMAT,
        "model": weights_hash(model),  # of base and adapters
        "configuration": _configuration_hash(model),
        "tokenizer": tokenizer_hash(format.tokenizer),
        "template": f"{format.template} {format.hash()}",
        "data": data_hash(examples),
        "precision": "bfloat16 autocast" if model.device.type == "cuda" else str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        "batches": "packed" if packing else "padded",
        "versions": ", ".join(f"{name} {used[name]}" for name in LIBRARIES),
    }


def compute_reference(
    path: Path,
    model: PreTrainedModel,
    format: Format,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    packing: bool = False,
) -> Scores:
    """Score the examples with the loss kernel itself and write the cache; of several processes one writes."""
    scores = score(model, examples, format.pad_token_id, batch_size, packing)

    def write() -> None:
        metadata = header(model, format, examples, packing=packing) | {"scores": _scores_hash(scores)}
        with renamed_when_done(path) as temporary:
            save_file(scores._asdict(), temporary, metadata=metadata)

    processes.on_main(write)
    return scores


def load_reference(
    path: Path, model: PreTrainedModel, format: Format, examples: Sequence[Example], *, packing: bool = False
) -> Scores:
    """The cached scores, or StaleReferenceError with the reason why they are not those of this model and data."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            scores = Scores(**{name: file.get_tensor(name) for name in Scores._fields})
    except FileNotFoundError as error:
        raise StaleReferenceError(f"there is no reference cache {path.name}; compute it first") from error
    except SafetensorError as error:
        raise StaleReferenceError(
            f"{path.name} is not a readable safetensors file with {' and '.join(Scores._fields)} ({error}); "
            "compute it again"
        ) from error
    for name, expected in header(model, format, examples, packing=packing).items():
        if found.get(name) != expected:
            raise StaleReferenceError(
                f"{path.name} was computed with another {name}: found {_shown(found.get(name))}, expected "
                f"{_shown(expected)}; compute it again with the present model before any unlearning step"
            )
    damage = _damage(scores, examples, found.get("scores"))
    if damage:
        raise StaleReferenceError(f"{path.name} {damage}; compute it again")
    return scores


def _damage(scores: Scores, examples: Sequence[Example], expected_hash: str | None) -> str | None:
    """What is wrong with numbers whose header is right; None if nothing is."""
    if _scores_hash(scores) != expected_hash:
        return "holds other numbers than were written"
    counts = [sum(label != IGNORE_INDEX for label in e.labels[1:]) for e in examples]  # the first one has no prediction
    if scores.num_tokens.tolist() != counts:
        return f"holds {len(scores.num_tokens)} token counts that are not those of the {len(examples)} sequences"
    if scores.logps.shape != (len(examples),) or scores.logps.dtype != torch.float32:
        return (
            f"holds log-probabilities {tuple(scores.logps.shape)} in {scores.logps.dtype}, not one float32 a sequence"
        )
    if not torch.isfinite(scores.logps).all():
        return "holds log-probabilities that are not finite: the reference model may have diverged"
    return None


def _configuration_hash(model: PreTrainedModel) -> str:
    """What changes the numbers and is in no weight: rotary settings, caps, the scale of adapters, which are in use."""
    configs = {"model": model.config, **getattr(model, "peft_config", {})}
    settings = {
        name: {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k not in NO_SETTINGS}
        for name, config in configs.items()
    }
    layers = [m for m in model.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
    in_use = sorted({f"{layer.active_adapters} disabled: {layer.disable_adapters}" for layer in layers})
    return fingerprint(json.loads(json.dumps([settings, in_use], default=_plain)))


def _plain(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _scores_hash(scores: Scores) -> str:
    digest = hashlib.sha256()
    for tensor in scores:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _shown(value: str | None) -> str:
    return " ".join(word[:16] for word in str(value).split())
