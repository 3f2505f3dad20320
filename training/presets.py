"""The papers' hyper-parameters by model. A preset fills in what the command line leaves open.

llama-2-7b-chat: arXiv 2404.05868, E.1.4 (full fine-tuning, 32 rows a step, 1e-5, 5 epochs of fine-tuning, 10 of
unlearning; the last step of an epoch has fewer rows here, 20 steps on forget01 where the paper's code takes 12).
llama-3.2-1b: the same, as OpenUnlearning takes it for this model. phi-1.5: arXiv 2401.06121 (2e-5, 5
epochs each). tiny: a model from nothing (`training.tiny`) on a CPU, found by trial; training/results/ has its runs.
"""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "llama-2-7b-chat": {
        "both": {
            "model": "meta-llama/Llama-2-7b-chat-hf",
            "template": "llama-2",
            "lr": 1e-5,
            "micro_batch_size": 8,
            "gradient_checkpointing": True,
        },
        "finetune": {"epochs": 5},
        "unlearn": {"epochs": 10},
    },
    "llama-3.2-1b": {
        "both": {"model": "meta-llama/Llama-3.2-1B-Instruct", "template": "llama-3", "lr": 1e-5},
        "finetune": {"epochs": 5},
        "unlearn": {"epochs": 10},
    },
    "phi-1.5": {
        "both": {"model": "microsoft/phi-1_5", "template": "phi", "lr": 2e-5},
        "finetune": {"epochs": 5},
        "unlearn": {"epochs": 5},
    },
    "tiny": {
        "both": {"template": "plain", "batch_size": 16, "packing": False},  # without flash attention padding is cheaper
        "finetune": {"epochs": 8, "lr": 2e-3},
        "unlearn": {"epochs": 10, "lr": 3e-4},
    },
}
# Where neither the command line nor a preset says anything.
OTHERWISE: dict[str, dict[str, Any]] = {
    "both": {"template": "auto", "lr": 1e-5, "batch_size": 32, "packing": True, "gradient_checkpointing": False},
    "finetune": {"epochs": 5},
    "unlearn": {"epochs": 10},
}

Options = TypeVar("Options", bound="DataclassInstance")


def filled_in(options: Options, stage: str) -> Options:
    """`options` with what is None taken from its preset, for "finetune" or "unlearn"."""
    preset = PRESETS.get(getattr(options, "preset", None) or "", {})
    values = OTHERWISE["both"] | OTHERWISE[stage] | preset.get("both", {}) | preset.get(stage, {})
    names = {f.name for f in fields(options)}
    return replace(options, **{k: v for k, v in values.items() if k in names and getattr(options, k) is None})
