"""The papers' hyper-parameters by model. A preset fills in what the command line leaves open.

llama-2-7b-chat: arXiv 2404.05868, E.1.4 (full fine-tuning, 32 rows a step, 1e-5, 5 epochs of fine-tuning, 10 of
unlearning; the last step of an epoch has fewer rows here, 20 steps on forget01 where the paper's code takes 12).
llama-3.2-1b: the same, as OpenUnlearning takes it for this model. phi-1.5: arXiv 2401.06121 (2e-5, 5
epochs each). tiny: a model from nothing (`training.tiny`) on a CPU, found by trial; training/results/ has its runs.
methods: the same on few authors, with one of every family of methods and three seeds, for `training.grid`.

wmdp-rmu, wmdp-npo, wmdp-simnpo: WMDP by zephyr-7b-beta, without fine-tuning before it. The published runs are so many
steps, which one epoch over the first documents of the corpora gives here, with wikitext to keep.
wmdp-rmu: the command of arXiv 2403.03218 (150 steps of 4, lr 5e-5 constant, steering 6.5, alpha 1200, layer 7, three
matrices trained). There steps are of bio and of cyber in turn, each with a direction of its own, and documents of cyber
have 768 tokens; here a step has documents of both, with one direction, of 512. Alpha is the retain weight: both take
means over tokens and dimensions. OpenUnlearning's run on cyber is --topics cyber --forget_documents 0 --joined
--retain_corpus own --batch_size 16 --steering 2 --retain_weight 1, of which it takes 80 steps.
wmdp-npo, wmdp-simnpo: SimNPO's code (arXiv 2410.07163; bio, 500 steps of 4, warm-up 10 %, no weight decay). Its NPO has
beta 0.0225 on the mean log-ratio of a token. Here a log-ratio is the sum over a document: beta and the weight of the
term are divided by 512, the length of a document that is cut, for which this is the same number. A shorter one weighs
less here, where its padding is scored there.

muse-news, muse-books: arXiv 2407.06460 and its code (1e-5 constant, 32 pieces of 2048 tokens a step, 10 epochs of
unlearning; OpenUnlearning has the same), fine-tuning as OpenUnlearning's. They choose --benchmark muse. The published
models are muse-bench/MUSE-news_target and MUSE-books_target, for --model, with Llama-2's tokenizer; News starts from
Llama-2-7b, Books from ICLM-7b, which has no name on the hub: give its folder. SimNPO of arXiv 2410.07163 takes
--beta 0.7 on News and 0.75 on Books, in its code with --retain_weight 0.1. Published numbers of NPO and SimNPO on MUSE
are of code that takes logits for log-probabilities, so they are no measure of these methods.
"""

from typing import Any

# Of a tokenizer of bytes, and of news of 80 tokens that a model of one layer knows by their beginning alone.
MUSE_TINY = {"units": "documents", "trailing_space": False, "verbmem_tokens": 40, "knowmem_tokens": 16}
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
        "both": {"template": "plain", "batch_size": 16} | MUSE_TINY,
        "finetune": {"epochs": 8, "lr": 2e-3},
        "unlearn": {"epochs": 10, "lr": 3e-4},
    },
}
ZEPHYR = {"benchmark": "wmdp", "model": "HuggingFaceH4/zephyr-7b-beta", "template": "plain"}
WMDP_TOKENS = 512  # of a document
WMDP_NPO = {
    "method": "npo_rt",
    "topics": "bio",
    "retain_corpus": "wikitext",
    "forget_documents": 2000,
    "max_tokens": WMDP_TOKENS,
    "epochs": 1,
    "eval_steps": 0,
    "batch_size": 4,
    "micro_batch_size": 1,
    "lr": 5e-6,
    "warmup_steps": 0.1,
    "weight_decay": 0.0,
    "beta": 0.0225 / WMDP_TOKENS,
    "forget_weight": 1 / WMDP_TOKENS,
    "retain_weight": 1.0,
    "gradient_checkpointing": True,
}
WMDP_RMU = {
    "method": "rmu",
    "topics": "bio,cyber",
    "retain_corpus": "wikitext",
    "forget_documents": 300,
    "max_tokens": WMDP_TOKENS,
    "epochs": 1,
    "eval_steps": 0,
    "batch_size": 4,
    "lr": 5e-5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0.0,
    "max_grad_norm": 0.0,
    "layer": 7,
    "steering": 6.5,
    "retain_weight": 1200.0,
    "kl_positions": "all",
    "train_only": r".*layers\.[567]\.mlp\.down_proj\.weight",
}
PRESETS |= {
    "wmdp-rmu": {"both": ZEPHYR, "unlearn": WMDP_RMU},
    "wmdp-npo": {"both": ZEPHYR, "unlearn": WMDP_NPO},
    "wmdp-simnpo": {
        "both": ZEPHYR,
        "unlearn": WMDP_NPO | {"method": "simnpo_rt", "lr": 9.5e-6, "beta": 0.1, "gamma": 0.0, "forget_weight": 1.0},
    },
}
MUSE_7B: dict[str, Any] = {
    "benchmark": "muse",
    "template": "plain",
    "lr": 1e-5,
    "micro_batch_size": 4,
    "gradient_checkpointing": True,
    "max_tokens": 2048,
}
MUSE_STAGES: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 10},
    "unlearn": {"epochs": 10, "lr_scheduler_type": "constant", "warmup_epochs": 0.0, "weight_decay": 0.0},
}
NEWS = {"model": "meta-llama/Llama-2-7b-hf", "data_dir": "muse-bench/MUSE-News"}
PRESETS["muse-news"] = {"both": MUSE_7B | NEWS} | MUSE_STAGES
PRESETS["muse-books"] = {"both": MUSE_7B | {"data_dir": "muse-bench/MUSE-Books"}} | MUSE_STAGES
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
