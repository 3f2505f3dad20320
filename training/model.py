"""Models to train: a small random Llama, loaded models, LoRA adapters; devices, precision and hashes.

The forward of each accepts `fused_unlearning`, and then forms no logits.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TypedDict, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from npo_kernels.hf import add_fused_unlearning_head
from training.config import Precision
from training.loading import load_causal_lm
from training.store import fingerprint

HEAD_DIM = 64
MAX_POSITIONS = 1024
HASHED_AT_ONCE = 2**24  # weights: 64 MiB of float32 that come from a GPU
NO_SETTINGS = {  # of a model's or an adapter's configuration: where it came from, not what it computes
    *("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
}

transformers_logging.disable_progress_bar()  # loading these weights takes milliseconds


class SpecialIds(TypedDict, total=False):
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | None


def special_ids_of(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """As a model's configuration takes them."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def build_model(
    vocab_size: int, hidden_size: int, num_layers: int, special_ids: SpecialIds, seed: int
) -> LlamaForCausalLM:
    """A Llama with random weights of standard deviation 1/sqrt(width).

    Embeddings are tied, as an untied head would be half of a model of this size. With tied embeddings the usual
    deviation of 0.02 gives logits near 0 at first, and memorising takes twice the epochs.
    """
    if hidden_size % HEAD_DIM:
        raise ValueError(f"hidden_size: expected a multiple of {HEAD_DIM}, the head size, got {hidden_size}")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=hidden_size**-0.5,
        **special_ids,
    )
    model = LlamaForCausalLM(config)
    add_fused_unlearning_head(model)
    return model


def load_model(
    folder: Path | str,  # or a hub name
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    use_liger_kernel: bool = False,
    gradient_checkpointing: bool = False,
    precision: Precision = "auto",
) -> PreTrainedModel:
    """With a fused head. Weights are trained in float32: bfloat16 arithmetic is autocast's (`set_precision`)."""
    model = load_causal_lm(folder, dtype=dtype, attn_implementation=attn_implementation)
    if use_liger_kernel:
        from transformers.integrations.liger import apply_liger_kernel  # says what to install

        heads = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # there are no logits to take it of
        apply_liger_kernel(model, heads)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    add_fused_unlearning_head(model)
    model.to(device)  # type: ignore[arg-type]  # mypy loses self in transformers' wraps(Module.to)
    return set_precision(model, precision)


def add_adapters(model: PreTrainedModel, rank: int, alpha: int, dropout: float, seed: int) -> PreTrainedModel:
    """Add LoRA to all linear layers except the head. Other weights are frozen; the output is unchanged at first."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear")
    return cast(PreTrainedModel, get_peft_model(model, config))  # what it has not itself, it takes of the one inside


def merged(model: PreTrainedModel, weights: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """(model, state dict) to save. Adapters are merged into the base model, which is modified."""
    if not isinstance(model, PeftModel):
        return model, weights
    whole = model.merge_and_unload()
    return whole, whole.state_dict()


def pick_device(name: str = "auto") -> torch.device:
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError:
            raise ValueError(f"--device: expected auto, cuda, mps or cpu, got {name!r}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether forward and backward are cast. "auto": on a GPU that has bfloat16."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())


def set_precision(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """Set the precision that `autocast` uses for this model."""
    dtype = torch.bfloat16 if in_bf16(precision, model.device) else None
    model.autocast_dtype = dtype  # type: ignore[assignment]  # modules take any attribute
    return model


def autocast(model: PreTrainedModel) -> contextlib.AbstractContextManager:
    """The arithmetic that the model is trained and evaluated in (`set_precision`); weights keep their own dtype.

    bfloat16 has 8 significant bits: a weight in it loses every update below 1/512 of itself, and AdamW's are about lr.
    """
    dtype = autocast_dtype(model)
    return contextlib.nullcontext() if dtype is None else torch.autocast(model.device.type, dtype)


def autocast_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """bfloat16, or None without autocast."""
    if not hasattr(model, "autocast_dtype"):
        set_precision(model, "auto")
    return cast("torch.dtype | None", model.autocast_dtype)


def skips_other_rows(attn_implementation: str | None) -> bool:
    """Whether attention leaves out the other sequences of a packed row: flash and flex attention do; sdpa and eager
    compute them all and mask them, at a cost that grows with the square of the row."""
    return any(kind in str(attn_implementation) for kind in ("flash", "flex"))


def check_length(model: PreTrainedModel, tokens: int, what: str) -> None:
    """ValueError if a sequence has more tokens than the model has positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and tokens > positions:
        raise ValueError(
            f"{what} of {tokens} tokens: the model has {positions} positions; shorten texts (--max_tokens, "
            "--max_new_tokens and the like), or take another model"
        )


def weights_hash(model: PreTrainedModel) -> str:
    """sha256 of names, shapes, dtypes and bytes of all weights, adapters included; a piece of a tensor at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # of all processes
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for piece in tensor.detach().reshape(-1).split(HASHED_AT_ONCE):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def configuration_hash(model: PreTrainedModel) -> str:
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
