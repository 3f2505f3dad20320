"""The papers' hyper-parameters by model. A preset fills in what the command line leaves open.

llama-2-7b-chat: arXiv 2404.05868, E.1.4 (full fine-tuning, 32 rows a step, 1e-5, 5 epochs of fine-tuning, 10 of
unlearning; the last step of an epoch has fewer rows here, 20 steps on forget01 where the paper's code takes 12).
llama-3.2-1b: the same, as OpenUnlearning takes it for this model. phi-1.5: arXiv 2401.06121 (2e-5, 5
epochs each). tiny: a model from nothing (`training.tiny`) on a CPU, found by trial; training/results/ has its runs.
methods: the same on few authors, with one of every family of methods and three seeds, for `training.grid`.
"""

from typing import Any

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
        "both": {"template": "plain", "batch_size": 16},
        "finetune": {"epochs": 8, "lr": 2e-3},
        "unlearn": {"epochs": 10, "lr": 3e-4},
    },
}
TINY_GRID = {
    "methods": "ga,ga_rt,ga_kl,idk_rt,npo,npo_rt,npo_kl,simnpo_rt,dpo_rt,altpo_rt,kto_rt,wga_rt,satimp_rt,ceu,ceu_rt,"
    "tnpo_rt,catnip,catnip_rt,pdu_rt,undial,undial_rt,rmu,rmu_rt,adaptive_rmu,dipo,dipo_rt",
    "seeds": "0,1,2",
    "hidden_size": 256,
    "finetune_epochs": 12,
    "finetune_lr": 3e-3,
    "lr": 6e-4,
    "eval_steps": 0,
    "generate_authors": 20,
    "forget_percent": 10,
    "eval_rows": 60,
    "max_new_tokens": 24,
    "rounded": "int4",
}
PRESETS["methods"] = PRESETS["tiny"] | {"unlearn": PRESETS["tiny"]["unlearn"] | TINY_GRID}
# Where neither the command line nor a preset says anything, and the default of the class is another stage's.
OTHERWISE: dict[str, dict[str, Any]] = {"finetune": {"epochs": 5}}


def preset_values(kind: type, preset: str | None, model: str | None) -> dict[str, Any]:
    """What a preset gives for an options class, by the stage that it is of: {option: value}, a benchmark's included.

    A class may have a `default_preset`, for where neither a preset nor a model is given.
    """
    stage = getattr(kind, "stage", None)
    if preset is None and model is None:
        preset = getattr(kind, "default_preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    chosen = PRESETS.get(preset or "", {})
    return {"preset": preset} | OTHERWISE.get(stage or "", {}) | chosen.get("both", {}) | chosen.get(stage or "", {})
