"""Load models, tokenizers and configurations from a folder or the hub without running any of their code.

Weights are read from safetensors only: a `pytorch_model.bin` is a pickle, which can run code. Models with custom code
are refused; by default transformers would ask on the terminal whether to run it.
"""

from pathlib import Path
from typing import Any, cast

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def load_causal_lm(name: Path | str, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, with its options.

    Raises:
        ValueError: there is no such folder, the model needs custom code, or its weights are in a pickle.
        OSError: there is no such model on the hub.
    """
    return _load(AutoModelForCausalLM, name, use_safetensors=True, **options)


def load_classifier(name: Path | str) -> PreTrainedModel:
    """The same for a sequence classifier."""
    return _load(AutoModelForSequenceClassification, name, use_safetensors=True)


def load_tokenizer(name: Path | str, **options: Any) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`; errors as in `load_causal_lm`."""
    return cast(PreTrainedTokenizerBase, _load(AutoTokenizer, name, **options))


def load_config(name: Path | str) -> PretrainedConfig:
    """`AutoConfig.from_pretrained`; errors as in `load_causal_lm`."""
    return cast(PretrainedConfig, _load(AutoConfig, name))


def _load(kind: Any, name: Path | str, **options: Any) -> Any:
    if _is_path(name) and not Path(name).is_dir():  # transformers would look for it on the hub, for a minute
        raise ValueError(f"{name}: no such folder; expected one with a model and its tokenizer, or a name on the hub")
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except ValueError as reason:
        if "custom code" not in str(reason):
            raise
        raise ValueError(
            f"{name} brings code of its own (auto_map in its configuration), which is not run here: expected a model "
            "of an architecture that transformers has. Convert it to one where you trust its code"
        ) from None
    except OSError as reason:
        pickles = sorted({path.name for pattern in PICKLES for path in Path(name).glob(pattern)})
        if not (options.get("use_safetensors") and pickles):
            raise
        raise ValueError(
            f"{name}: expected weights in safetensors, got {', '.join(pickles)}, a pickle, which can run any code when "
            "it is read. Where you trust it, load it with transformers and save it anew: save_pretrained writes "
            "safetensors"
        ) from reason


def _is_path(name: Path | str) -> bool:
    """Whether this cannot be the name of a model on the hub, `model` or `owner/model`."""
    text = str(name)
    return text.count("/") > 1 or text.startswith(("/", ".", "~")) or "\\" in text
