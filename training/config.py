"""How a model is trained: the options of a run, each with its help text."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

Precision = Literal["auto", "fp32", "bf16"]
Switch = Literal["auto", "on", "off"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
Rounding = Literal["off", "int8", "int4", "nf4"]


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained, for every objective. The defaults are those of the NPO paper (E.1.4)."""

    epochs: Annotated[int, "epochs over the rows to learn, or over the forget set"] = 10
    lr: Annotated[float, "peak learning rate of AdamW"] = 1e-5
    batch_size: Annotated[
        int, "rows per optimizer step, over all processes and micro-batches. In unlearning these are forget rows, and "
        "as many retain rows are added"
    ] = 32  # fmt: skip
    micro_batch_size: Annotated[
        int | None, "rows of each kind per forward in one process; gradients are accumulated. None: all of them at once"
    ] = None
    gradient_accumulation_steps: Annotated[
        int | None, "alternative to --micro_batch_size: number of micro-batches per step"
    ] = None
    lr_scheduler_type: Annotated[Scheduler, "learning rate schedule after the warm-up, as in transformers"] = "linear"
    warmup_epochs: Annotated[float, "length of the linear warm-up in epochs"] = 1.0
    warmup_steps: Annotated[float | None, "length of the warm-up in steps, or below 1 as a share of all steps"] = None
    weight_decay: Annotated[float, "of AdamW, applied to matrices only"] = 0.01
    max_grad_norm: Annotated[float, "gradients are clipped to this norm; 0: no clipping"] = 1.0
    packing: Annotated[
        Switch, "concatenate rows without padding. auto: if the attention supports it (flash and flex attention); "
        "otherwise rows of similar length share a micro-batch"
    ] = "auto"  # fmt: skip
    precision: Annotated[
        Precision, "of the arithmetic, in training and evaluation: bf16 is autocast over float32 weights. auto: bf16 "
        "on a GPU that supports it, fp32 elsewhere"
    ] = "auto"  # fmt: skip
    saf_format: Annotated[
        Rounding, "sharpness-aware forgetting: compute the loss at weights rounded to this format, so that later "
        "rounding does not bring back what was forgotten (training/durable.py)"
    ] = "off"  # fmt: skip
    saf_rho: Annotated[
        float, "radius of --saf_format: how far the weights are moved uphill before rounding; 0: not at all, which "
        "takes half the time"
    ] = 0.05  # fmt: skip
    seed: Annotated[int, "seed of the order of the rows and of all random draws"] = 0

    def __post_init__(self):
        for name in ("epochs", "lr", "batch_size", "micro_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name}: expected more than 0, got {value}")
        if not self.saf_rho >= 0:
            raise ValueError(f"--saf_rho: expected 0 or more, got {self.saf_rho}")
        kinds = {"packing": Switch, "precision": Precision, "lr_scheduler_type": Scheduler, "saf_format": Rounding}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                expected = ", ".join(get_args(kind))
                raise ValueError(f"--{name}: expected one of {expected}, got {getattr(self, name)!r}")
        if self.micro_batch_size and self.gradient_accumulation_steps:
            raise ValueError(
                "expected --micro_batch_size or --gradient_accumulation_steps, got both: they say the same thing"
            )

    def piece(self, share: int) -> int:
        """How many rows of a kind are forwarded at a time, of the `share` that a process has in a step."""
        if self.gradient_accumulation_steps:
            return -(-share // self.gradient_accumulation_steps)
        return min(self.micro_batch_size or share, share)

    def warmup(self, num_steps: int) -> int:
        """Steps of the warm-up."""
        if self.warmup_steps is None:
            return round(self.warmup_epochs * num_steps / self.epochs)
        return round(self.warmup_steps * num_steps if self.warmup_steps < 1 else self.warmup_steps)
