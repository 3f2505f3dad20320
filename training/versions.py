"""What a result was computed with."""

import platform
from types import ModuleType

import safetensors
import tokenizers
import torch
import transformers

import npo_kernels


def versions(*modules: ModuleType) -> dict[str, str]:
    """Of Python and these modules; by default those that the training of a language model depends on."""
    modules = modules or (npo_kernels, torch, transformers, tokenizers, safetensors)
    return {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}}
