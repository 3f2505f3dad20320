"""Unlearning on a data set in TRL's unpaired format, with the reference as a column.

    python -m examples.trl_dataset

TRL's KTO rows are {"prompt", "completion", "label"}; `label: False` marks an undesired completion, here a
row to forget. As TRL does with `precompute_ref_log_probs=True`, the reference's summed log-probability of each
completion becomes a float32 column `ref_logps`, before training, in eval mode, with a fingerprint of the weights.
"""

import hashlib

import torch
from transformers import PreTrainedModel

from examples.tiny import VOCAB_SIZE, tiny_model
from examples.transformers_trainer import UnlearningTrainer, collate_rows, with_reference

ROWS = [
    {"prompt": "Where was Ada Quill born?", "completion": " In Lisbon.", "label": False},
    {"prompt": "What does Ada Quill write?", "completion": " Books on tides.", "label": False},
    {"prompt": "What is the capital of France?", "completion": " Paris.", "label": True},
    {"prompt": "How many legs has a spider?", "completion": " Eight.", "label": True},
]


def encode(text: str) -> list[int]:
    """Takes the place of a tokenizer: bytes, reduced to the tiny vocabulary."""
    return [3 + byte % (VOCAB_SIZE - 3) for byte in text.encode()]


def tokenize(row: dict) -> dict:
    """Encodes prompt and completion separately, so that no token spans both and the mask cannot be off by one."""
    return {
        "prompt_ids": [1, *encode(row["prompt"])],
        "completion_ids": [*encode(row["completion"]), 2],
        "forget": not row["label"],
    }


def fingerprint(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def precompute(model: PreTrainedModel, rows: list[dict]) -> list[dict]:
    """Tokenized rows with `ref_logps` and the fingerprint of the model that computed them."""
    mark = fingerprint(model)
    return [{**row, "ref_model": mark} for row in with_reference(model, [tokenize(row) for row in rows])]


def main() -> UnlearningTrainer:
    import tempfile

    from transformers import TrainingArguments

    model = tiny_model()
    rows = precompute(model, ROWS)
    if any(row["ref_model"] != fingerprint(model) for row in rows):
        raise ValueError("ref_logps belong to another model: precompute them again before the first step")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        trainer = UnlearningTrainer(model, args, train_dataset=rows, data_collator=collate_rows)
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
