"""Versions that a result was computed with."""

import platform
import subprocess
from pathlib import Path
from types import ModuleType

import safetensors
import tokenizers
import torch
import transformers

import npo_kernels


def versions(*modules: ModuleType) -> dict[str, str]:
    """Versions of Python and these modules; by default those that training depends on."""
    modules = modules or (npo_kernels, torch, transformers, tokenizers, safetensors)
    return {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}}


def commit() -> str | None:
    """The short hash of the checkout's commit; None where there is no history, or no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
