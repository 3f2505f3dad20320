"""Imported by the server that forks: all that a run imports, and what is slow the first time, done once.

It leaves no thread behind, which a fork would lose: one thread of torch, none of the tokenizers.
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

import torch

torch.set_num_threads(1)

from training.commands import evaluate, grid, tiny, unlearn  # noqa: E402, F401
from training.commands.options import build  # noqa: E402

with (
    tempfile.TemporaryDirectory() as folder,
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(io.StringIO()),
):
    home = Path(folder)
    authors = {"benchmark": "authors", "authors": 4, "forget_percent": 25, "retain_eval_authors": 1}
    tiny.main(*build(tiny.TinyOptions, **authors, out=home / "base", vocab_size=300, hidden_size=64))
    given = {"model": str(home / "base"), "out": home / "out", "device": "cpu", "epochs": 1, "batch_size": 20}
    unlearn.main(*build(unlearn.UnlearnOptions, preset="tiny", method="dpo_rt", **authors, **given))
