"""The small Llama of the demo, and where it runs. Its forward takes `fused_unlearning`, and then forms no logits."""

import contextlib
import hashlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from npo_kernels.hf import add_fused_unlearning_head

HEAD_DIM = 64
MAX_POSITIONS = 1024

transformers_logging.disable_progress_bar()  # loading these weights takes milliseconds


def build_model(
    vocab_size: int, hidden_size: int, num_layers: int, special_ids: dict[str, int], seed: int
) -> LlamaForCausalLM:
    """A Llama with random weights of standard deviation 1/sqrt(width).

    Embeddings are tied, as an untied head would be half of a model of this size. With them, the usual deviation of
    0.02 gives logits near 0 at first, and learning by heart takes twice the epochs.
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
    return add_fused_unlearning_head(LlamaForCausalLM(config))


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return add_fused_unlearning_head(model).to(device)


def pick_device(name: str = "auto") -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 on a CUDA GPU, with float32 weights; float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def weights_hash(model: PreTrainedModel) -> str:
    """sha256 of names, shapes, dtypes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
