"""The constants of all methods. Each method reads the ones that it needs."""

from dataclasses import dataclass
from typing import Literal, get_args

Compat = Literal["paper", "npo-repo", "open-unlearning"]
Positions = Literal["answer", "all"]
Teacher = Literal["cache", "model"]
DualUpdate = Literal["step", "micro_batch"]


@dataclass(frozen=True)
class Settings:
    """The constants of a run. The two weights multiply the terms of the loss."""

    beta: float = 0.1
    gamma: float = 0.0
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    kl_positions: Positions = "answer"  # all: every one that is not padding; of KL terms and of activations
    compat: Compat = "paper"
    beta2: float = 1.0  # SatImp: exponent of 1 - p
    skip_tokens: int = 1  # CE-U: number of first tokens of an answer that are left out
    epsilon: float = 0.0  # PDU: upper bound on the retain term
    dual_lr: float = 1.0  # PDU: step size of the retain weight; 0: constant
    dual_warmup_epochs: float = 0.0  # PDU: epochs before the first step of the retain weight
    dual_update: DualUpdate = "step"
    teacher: Teacher = "cache"  # UNDIAL: last hidden states, or the frozen model in every step
    published_rows: bool = False  # the positions of OpenUnlearning's code (`Method.published_rows`)
    layer: int | None = None  # RMU: decoder layer whose output is steered, from 0. None: 7, or the last one if fewer
    steering: float = 2.0  # RMU: length of the target; adaptive: in lengths of the frozen model's activations
    top_k: int = 10  # DiPO: logits that are raised and lowered
    shift: float = 1.0  # DiPO: by how much
    seed: int = 0  # of what a method draws

    def __post_init__(self):
        choices = {"compat": Compat, "kl_positions": Positions, "teacher": Teacher, "dual_update": DualUpdate}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {get_args(kind)}, got {getattr(self, name)!r}")
        for name in ("beta", "top_k", "shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.shift > 50:
            raise ValueError(f"shift: expected at most 50, as exp(shift) has to be a float32, got {self.shift}")
        for name in ("beta2", "skip_tokens", "epsilon", "dual_lr", "dual_warmup_epochs", "layer"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
