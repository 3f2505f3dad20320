"""The options of MUSE."""

from dataclasses import dataclass
from typing import Annotated, Literal

from training.benchmarks.base import EvaluationOptions
from training.benchmarks.muse.data import DEMO, FORGET_SETS, HUB

Rouge = Literal["muse", "open-unlearning"]
Units = Literal["chunks", "documents"]


@dataclass(frozen=True)
class MuseOptions(EvaluationOptions):
    """MUSE: its source, the forget set, and the evaluation."""

    data_dir: Annotated[
        str, f"folder in MUSE's layout, a data set of the hub ({HUB}, or muse-bench/MUSE-Books), or {DEMO}: generated"
    ] = HUB
    forget_set: Annotated[str, f"forget set: {', '.join(FORGET_SETS)}"] = "forget"
    max_tokens: Annotated[
        int, "length of the examples that texts are cut into, for training and membership attacks"
    ] = 2048
    units: Annotated[
        Units, "what is an example: chunks of all documents one after another (OpenUnlearning; MUSE's code, of .txt), "
        "or documents, each by itself and cut (MUSE's code, of .json)"
    ] = "chunks"  # fmt: skip
    eval_rows: Annotated[int, "evaluate the first rows of every set; 0: all"] = 0
    verbmem_tokens: Annotated[int, "VerbMem: length of the continuation and of the true text"] = 128
    knowmem_tokens: Annotated[int, "KnowMem: maximum length of an answer"] = 32
    trailing_space: Annotated[
        bool, "KnowMem's prompts end in 'Answer: ', as published. Tokenizers of bytes, whose words begin with their "
        "space, answer better without it, in this project's tiny models too"
    ] = True  # fmt: skip
    rouge: Annotated[
        Rouge, "muse: ROUGE-L F1 without stemming, VerbMem against as many tokens as are generated. open-unlearning: "
        "with stemming, against the whole text"
    ] = "muse"  # fmt: skip
    data_seed: Annotated[int, f"--data_dir {DEMO}: seed of the generated news"] = 0
    demo_items: Annotated[int, f"--data_dir {DEMO}: items of each forget set; the corpus has nine times as many"] = 12

    def __post_init__(self):
        super().__post_init__()
        if self.forget_set not in FORGET_SETS:
            raise ValueError(f"--forget_set: expected one of {', '.join(FORGET_SETS)}, got {self.forget_set!r}")
        for name, least in (("max_tokens", 2), ("verbmem_tokens", 1), ("knowmem_tokens", 1), ("eval_rows", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: expected {least} or more, got {getattr(self, name)}")
