"""Reference log-probabilities of a data set, computed once: two numbers per sequence instead of a second model.

One safetensors file: `logps` (N,) float32 sums over the answers and `num_tokens` (N,) int64; where a method needs them,
also `token_logps` (T,) of the T scored tokens, or `hidden` (T, H), the last hidden states that predict them. The header
identifies everything that they depend on: hashes of weights, configuration, tokenizer, template and token ids,
precision, attention, versions, and a hash of the numbers themselves. Numbers and header are in one file, so one rename
makes them appear together. A file that does not match is refused with the reason.

A process killed at any moment leaves the old file or none, never a part of one.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels import fused_npo_loss
from training import distributed
from training.data import IGNORE_INDEX, Example, data_hash
from training.interruption import check
from training.locks import turn
from training.model import autocast, autocast_dtype, configuration_hash, weights_hash
from training.progress import OnRows, nothing
from training.scoring import PerToken, Scores, score
from training.steps import Batches
from training.store import check_writable, renamed_when_done
from training.templates import Format
from training.tokenizer import tokenizer_hash
from training.versions import versions

FORMAT = "3"
# How far the policy may be from the reference before the first step, in nats of a sequence's log-probability, by what
# the arithmetic is cast to.
STEP_ZERO_TOLERANCE = {None: 1e-3, torch.bfloat16: 0.5}
LIBRARIES = ("npo_kernels", "torch", "transformers")


class StaleReferenceError(ValueError):
    """The cache is absent, unreadable, damaged, or belongs to another model, tokenizer, data set or setting."""


class AbsentReferenceError(StaleReferenceError):
    """The cache does not exist."""


class DamagedReferenceError(StaleReferenceError):
    """The file is truncated or changed."""


def header(
    model: PreTrainedModel, format: Format, examples: Sequence[Example], *, packing: bool = False
) -> dict[str, str]:
    """Everything that the cached numbers depend on."""
    used, cast = versions(), autocast_dtype(model)
    return {
        "format": FORMAT,
        "model": weights_hash(model),  # of base and adapters
        "configuration": configuration_hash(model),
        "tokenizer": tokenizer_hash(format.tokenizer),
        "template": f"{format.template} {format.hash()}",
        "data": data_hash(examples),
        "precision": str(model.dtype if cast is None else f"{cast} autocast").removeprefix("torch."),
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
    on_rows: OnRows = nothing,
    per_token: PerToken | None = None,
) -> Scores:
    """Score the examples with the loss kernel and write the cache. With several processes, one of them writes."""
    scores = score(model, examples, format.pad_token_id, batch_size, packing, on_rows, per_token)

    def write() -> None:
        metadata = header(model, format, examples, packing=packing) | {"scores": _scores_hash(scores)}
        tensors = {name: tensor for name, tensor in scores._asdict().items() if tensor is not None}
        with renamed_when_done(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    distributed.on_main(write)
    return scores


def load_reference(
    path: Path,
    model: PreTrainedModel,
    format: Format,
    examples: Sequence[Example],
    *,
    packing: bool = False,
    per_token: PerToken | None = None,
) -> Scores:
    """The cached scores. StaleReferenceError, with the reason, if they are of another model or other data."""
    wanted = ["logps", "num_tokens"] + ([] if per_token is None else [per_token])
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            scores = Scores(**{name: file.get_tensor(name) for name in wanted})
    except FileNotFoundError as error:
        raise AbsentReferenceError(f"there is no reference cache {path.name}; compute it first") from error
    except (SafetensorError, UnicodeDecodeError, RuntimeError) as error:
        raise DamagedReferenceError(
            f"{path.name} is not a readable safetensors file with {' and '.join(wanted)} ({error}); compute it again"
        ) from error
    for name, expected in header(model, format, examples, packing=packing).items():
        if found.get(name) != expected:
            raise StaleReferenceError(
                f"{path.name} was computed with another {name}: found {_shown(found.get(name))}, expected "
                f"{_shown(expected)}; compute it again with the present model before any unlearning step"
            )
    damage = _damage(scores, examples, found.get("scores"))
    if damage:
        raise DamagedReferenceError(f"{path.name} {damage}; compute it again")
    return scores


def found_or_computed(
    path: Path,
    model: PreTrainedModel,
    format: Format,
    examples: Sequence[Example],
    *,
    shared: bool,
    counted: Callable[[str, int], OnRows],
    say: Callable[[str], object],
    packing: bool = False,
    per_token: PerToken | None = None,
) -> Scores:
    """The cached scores, computed now if necessary. If several runs need them, one computes and the others wait.

    A damaged file is replaced. So is one of another model or other rows, unless the folder is `shared`, where it may
    belong to another run.

    Args:
        counted: (name, number of rows) -> a progress callback.
        say: prints a message.

    Raises:
        StaleReferenceError: the folder is shared, and the file is of another model or other rows.
        StorageError: the folder is not writable; raised before anything is computed.
    """
    option = "--reference_cache" if shared else "--out"

    def found(say: Callable[[str], object]) -> Scores | None:
        scores = None
        try:
            scores = load_reference(path, model, format, examples, packing=packing, per_token=per_token)
        except AbsentReferenceError:
            pass
        except StaleReferenceError as reason:
            if shared and not isinstance(reason, DamagedReferenceError):
                raise StaleReferenceError(f"{option} {path.parent}: {reason}; or choose another folder") from None
            say(f"computing the reference log-probabilities again: {reason}")
        return None if distributed.any_of(scores is None) else scores  # all processes compute, or none

    scores = found(say)
    if scores is None:
        check_writable(path.parent, option)
        with turn(path, say):
            scores = found(lambda text: None)  # by the run that had its turn before
            if scores is None:
                on_rows = counted(f"Reference, {path.stem}", len(examples))
                scores = compute_reference(
                    path, model, format, examples, packing=packing, on_rows=on_rows, per_token=per_token
                )
    return scores


@torch.no_grad()
def check_step_zero(
    model: PreTrainedModel,
    forget: Sequence[Example],
    ref_logps: Tensor,
    batches: Batches,
    batch_size: int,
    beta: float,
    on_rows: OnRows = nothing,
) -> dict[str, float]:
    """With the policy equal to the reference every log-ratio is 0 and the NPO loss is (2/beta) ln 2: assert it.

    Batches are shuffled, unlike those of the cache, so rows that lost their reference would show.
    """
    device, expected = batches.device, 2 / beta * math.log(2)
    tolerance = STEP_ZERO_TOLERANCE[autocast_dtype(model)]
    order = torch.randperm(len(forget), generator=torch.Generator().manual_seed(0)).tolist()
    was_training, largest, summed = model.training, 0.0, 0.0
    model.eval()
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        refs = ref_logps[members].to(device)
        npo = partial(fused_npo_loss, ref_logps=refs, beta=beta, reduction="sum", return_stats=True)
        with autocast(model):
            out = model(**batches([forget[i] for i in members]), fused_unlearning=npo)
        largest = max(largest, out.stats.log_ratio.abs().max().item())
        summed += out.loss.item()
        on_rows(len(members), sum(len(forget[i].input_ids) for i in members))
        check()
    model.train(was_training)
    loss = summed / len(forget)
    if not (largest < tolerance and abs(loss - expected) < tolerance):
        raise ValueError(
            f"before the first step the NPO loss is {loss:.6f} and the largest log-ratio {largest:.2e}; expected "
            f"(2/beta) ln 2 = {expected:.6f} and 0 within {tolerance:g}: the model does not give what the reference "
            "cache says; the reference log-probabilities belong to other rows, or to other arithmetic"
        )
    return {"loss": loss, "expected_loss": expected, "max_abs_log_ratio": largest}


def _damage(scores: Scores, examples: Sequence[Example], expected_hash: str | None) -> str | None:
    """What is wrong with the numbers although the header matches; None if nothing is."""
    if _scores_hash(scores) != expected_hash:
        return "holds other numbers than were written"
    counts = [sum(label != IGNORE_INDEX for label in e.labels[1:]) for e in examples]  # the first one has no prediction
    if scores.num_tokens.tolist() != counts:
        return f"holds {len(scores.num_tokens)} token counts that are not those of the {len(examples)} sequences"
    if scores.logps.shape != (len(examples),) or scores.logps.dtype != torch.float32:
        return (
            f"holds log-probabilities {tuple(scores.logps.shape)} in {scores.logps.dtype}, not one float32 a sequence"
        )
    for name in ("token_logps", "hidden"):
        tokens = getattr(scores, name)
        if tokens is not None and len(tokens) != sum(counts):
            return f"holds {name} of {len(tokens)} tokens, not of {sum(counts)}"
    if not all(torch.isfinite(t).all() for t in scores if t is not None):
        return "holds numbers that are not finite: the reference model may have diverged"
    return None


def _scores_hash(scores: Scores) -> str:
    digest = hashlib.sha256()
    for name, tensor in scores._asdict().items():
        if tensor is not None:
            digest.update(
                f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            )  # the bytes alone may be read otherwise
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shown(value: str | None) -> str:
    return " ".join(word[:16] for word in str(value).split())
