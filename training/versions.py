"""What a result was computed with."""

import platform

import safetensors
import tokenizers
import torch
import transformers

import npo_kernels


def versions() -> dict[str, str]:
    modules = (npo_kernels, torch, transformers, tokenizers, safetensors)
    return {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}}
