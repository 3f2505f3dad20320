"""Fluency of generations, judged by a text classifier from a local folder."""

from collections.abc import Sequence
from pathlib import Path

import torch

from training.loading import load_classifier, load_tokenizer

BATCH, LONGEST = 32, 512  # texts, tokens


class FluencyClassifier:
    """Probability of a classifier's first class, in [0, 1], of each text; 0 of a text without tokens.

    OpenUnlearning uses a gibberish detector whose first class is "clean". The folder is one of transformers, with
    its tokenizer.
    """

    def __init__(self, folder: Path, device: torch.device):
        if not (folder / "config.json").is_file():
            raise ValueError(f"--fluency_classifier: expected the folder of a text classifier, got {folder}")
        self.tokenizer = load_tokenizer(folder)
        self.model = load_classifier(folder).eval()
        self.model.to(device)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id  # decoders look there for the end of a text

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        found = [0.0] * len(texts)
        members = [i for i, text in enumerate(texts) if self.tokenizer(text)["input_ids"]]
        for start in range(0, len(members), BATCH):
            part = members[start : start + BATCH]
            batch = self.tokenizer(
                [texts[i] for i in part], return_tensors="pt", padding=True, truncation=True, max_length=LONGEST
            )
            logits = self.model(**batch.to(self.model.device)).logits
            for i, probability in zip(part, logits.float().softmax(-1)[:, 0].tolist(), strict=True):
                found[i] = probability
        return found
