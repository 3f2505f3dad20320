"""Tiny random models of the architectures people unlearn with, and what their own logits say."""

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

V = 97
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}
GQA = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 48, "head_dim": 16}
EXPERTS = {
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",
    "output_router_logits": True,
    "router_aux_loss_coef": 0.3,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# name -> (config class, what differs from a plain Llama head, settings)
ARCHITECTURES = {
    "llama": ("LlamaConfig", GQA),
    "llama-tied": ("LlamaConfig", {**GQA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", GQA),
    "gemma2": ("Gemma2Config", {**GQA, "final_logit_softcapping": 2.0, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {**GQA, "final_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    "phi": ("PhiConfig", {**GQA, "partial_rotary_factor": 0.5}),  # a bias
    "granite": ("GraniteConfig", {**GQA, "logits_scaling": 0.4}),  # divides
    "cohere": ("CohereConfig", {**GQA, "logit_scale": 3.5, "tie_word_embeddings": True}),  # multiplies
    "minicpm3": (
        "MiniCPM3Config",  # divides the hidden states
        {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "dim_model_base": 96, "q_lora_rank": 16,
         "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16},
    ),
    "falcon-h1": (
        "FalconH1Config",  # multiplies, by an attribute of the backbone
        {**GQA, "lm_head_multiplier": 2.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
         "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1},
    ),
    "pythia": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 48}),
    "mixtral": ("MixtralConfig", {**GQA, **EXPERTS, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", {**GQA, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}),
    "olmo2": ("Olmo2Config", GQA),
    "gpt2": ("GPT2Config", {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
}  # fmt: skip


def tiny(name: str, **changed) -> transformers.PreTrainedModel:
    """The model in eval mode, with logits that are far from uniform; skips where this transformers has it not."""
    kind, settings = ARCHITECTURES[name]
    if not hasattr(transformers, kind):
        import pytest

        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**settings, **SPECIAL, "initializer_range": 0.3, **changed})
    model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model.eval()


LENGTHS = (7, 3, 9)


def padded_batch() -> dict[str, Tensor]:
    """Three sequences of ragged lengths, prompts and padding ignored."""
    g = torch.Generator().manual_seed(1)
    B, S = len(LENGTHS), max(LENGTHS)
    ids = torch.randint(3, V, (B, S), generator=g)
    mask = (torch.arange(S) < torch.tensor(LENGTHS)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :1] = -100
    labels[2, :4] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def packed_batch() -> dict[str, Tensor]:
    """The same sequences in one row, told apart by position_ids. The first label of each is not ignored."""
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    labels = batch["labels"].clone()
    labels[1, 0] = batch["input_ids"][1, 0]  # no pair may cross a boundary even where a collator left a label
    return {
        "input_ids": batch["input_ids"][real][None],
        "labels": labels[real][None],
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
    }


def own_logps(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logps, num_tokens) of a padded batch from the model's logits."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return -nll.sum(1), (targets != -100).sum(1)
