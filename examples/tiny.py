"""A random model and random rows, small enough for a CPU, for the examples."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCAB_SIZE = 200
PAD = 0


def tiny_model(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def random_rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """{"prompt_ids", "completion_ids"} of ragged lengths."""
    g = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    return [{"prompt_ids": [1, *tokens(2, 6)], "completion_ids": [*tokens(2, 9), 2]} for _ in range(count)]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels (B, S), padded on the right; only the completion is scored."""
    longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for s, row in enumerate(rows):
        start, end = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row["completion_ids"])
        ids[s, :end] = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        mask[s, :end] = 1
        labels[s, start:end] = ids[s, start:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
