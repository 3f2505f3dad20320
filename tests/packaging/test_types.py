"""A user's type checker accepts all correct calls and reports each wrong one."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Every wrong line is marked with the error codes of mypy, then of pyright. mypy does not check a partial of an
# overloaded function, and reports any error in a call of such a function for the whole call.
USER = '''
"""Calls of npo_kernels as a user writes them."""

from collections.abc import Callable
from functools import partial
from typing import assert_type

import torch.nn.functional as F
from torch import Tensor

from npo_kernels import (
    LogprobStats,
    LossStats,
    TokenStats,
    explain,
    fused_linear_kl,
    fused_logprob_loss,
    fused_npo_loss,
    fused_simnpo_loss,
    fused_token_loss,
    sequence_logprobs,
    set_debug,
    token_logprobs,
    token_statistics,
)


def right(h: Tensor, w: Tensor, y: Tensor, r: Tensor, flag: bool) -> None:
    fused_npo_loss(h, w, y, ref_logps=r).backward()
    fused_npo_loss(hidden=h, lm_head_weight=w, labels=y, ref_logps=r, beta=1, impl="torch").backward()
    assert_type(fused_npo_loss(h, w, y, ref_logps=r, reduction="none"), Tensor)
    assert_type(fused_npo_loss(h, w, y, ref_logps=r, return_stats=False), Tensor)
    loss, stats = fused_npo_loss(h, w, y, ref_logps=r, return_stats=True)
    loss.backward()
    assert_type(stats, LossStats)
    assert_type(stats.weight, Tensor)
    either = fused_npo_loss(h, w, y, ref_logps=r, return_stats=flag)
    assert_type(either, Tensor | tuple[Tensor, LossStats])
    first = either if isinstance(either, Tensor) else either[0]
    first.backward()

    fused_npo_loss(h, w, y, ref_logps=r, normalizer=8, workspace_mb=256, num_rows=17).backward()
    fused_npo_loss(h, w, y, ref_logps=r, normalizer=r.sum(), workspace_mb=None, bias=None, softcap=None)
    fused_npo_loss(h, w, y, ref_logps=r, cu_seqlens=y, shift=False, ignore_index=0, logit_scale=0.5)
    fused_npo_loss(h, w, y, ref_logps=r, process_group=None)

    fused_simnpo_loss(h, w, y).backward()
    _, simnpo_stats = fused_simnpo_loss(h, w, y, beta=2.5, gamma=0.1, reduction="sum", return_stats=True)
    assert_type(simnpo_stats.num_tokens, Tensor)
    assert_type(fused_simnpo_loss(h, w, y, return_stats=flag), Tensor | tuple[Tensor, LossStats])

    logps, n = sequence_logprobs(h, w, y, impl="reference")
    assert_type(logps / n, Tensor)
    assert_type(token_logprobs(h, w, y, bias=r, softcap=30.0), Tensor)

    def npo(logps: Tensor, num_tokens: Tensor) -> Tensor:
        return -F.logsigmoid(-0.1 * (logps - r)).mean()

    fused_logprob_loss(h, w, y, npo).backward()
    fused_logprob_loss(h, w, y, lambda logps, n: -logps.sum() / n.sum(), impl="auto").backward()
    fused_logprob_loss(h, w, y, loss_fn=npo, workspace_mb=0.5).backward()
    assert_type(fused_logprob_loss(h, w, y, npo, return_stats=True)[1], LogprobStats)
    fused_npo_loss(h, w, y, ref_logps=r, weights=r).backward()

    def wga(token_logps: Tensor, sequence: Tensor, num_tokens: Tensor) -> Tensor:
        return (token_logps.detach().exp() * token_logps).mean()

    fused_token_loss(h, w, y, wga).backward()
    _, token_stats = fused_token_loss(h, w, y, wga, return_stats=True, impl="torch")
    assert_type(token_stats, TokenStats)
    assert_type(token_stats.sequence, Tensor)
    assert_type(token_statistics(h, w, y, ["entropy", "max_logit"], num_rows=3)["entropy"], Tensor)

    fused_linear_kl(h, w, h, w).backward()
    assert_type(fused_linear_kl(h, w, h, w, mask=y != -100, reduction="none", ref_bias=r), Tensor)
    assert_type(fused_linear_kl(h, w, h, w, labels=y, target_shift=10.0, direction="reverse"), Tensor)

    def train(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        loss(h, w, y).backward()

    ready = partial(fused_npo_loss, ref_logps=r, beta=0.1)
    assert_type(ready(h, w, y), Tensor)
    partial(fused_simnpo_loss, impl="torch")(h, w, y, gamma=1.0).backward()
    assert_type(partial(token_logprobs, shift=False)(h, w, y, impl="torch"), Tensor)
    train(ready)
    train(fused_simnpo_loss)
    train(lambda h, w, y: fused_logprob_loss(h, w, y, npo))
    assert_type(explain(fused_npo_loss, h, w, y, workspace_mb=256).mode, str)
    assert_type(explain(ready, h, w, y).workspace_bytes, int)
    print(explain(fused_logprob_loss, hidden=h, lm_head_weight=w, labels=y))
    set_debug(True)


def wrong(h: Tensor, w: Tensor, y: Tensor, r: Tensor, flag: bool) -> None:
    fused_npo_loss(h, w, y, ref_logps=r, betta=0.1)  # error: call-overload, reportCallIssue
    fused_npo_loss(h, w, y, ref_logps=r, impl="tritn")  # error: call-overload, reportArgumentType
    fused_npo_loss(h, w, y, ref_logps=r, reduction="avg")  # error: call-overload, reportArgumentType
    fused_npo_loss(h, w, y)  # error: call-overload, reportCallIssue
    fused_npo_loss(h, w, y, r)  # error: call-overload, reportCallIssue
    fused_npo_loss(h, w, ref_logps=r)  # error: call-overload, reportCallIssue
    fused_npo_loss(h, w, y, ref_logps=None)  # error: call-overload, reportArgumentType
    fused_npo_loss(h, w, y, ref_logps=r, beta="0.1")  # error: call-overload, reportArgumentType
    fused_npo_loss(h, w, y, ref_logps=r, workspace_mb="256")  # error: call-overload, reportArgumentType
    fused_npo_loss(h, w, y, ref_logps=r, beta=None)  # error: call-overload, reportArgumentType
    fused_npo_loss(h, w, y, ref_logps=r, bias=True)  # error: call-overload, reportArgumentType
    fused_npo_loss(h, w, y, ref_logps=r, return_stats=True).sum()  # error: attr-defined, reportAttributeAccessIssue
    fused_npo_loss(h, w, y, ref_logps=r, return_stats=flag).backward()  # error: union-attr, reportAttributeAccessIssue
    loss, stats = fused_npo_loss(h, w, y, ref_logps=r, return_stats=True)
    print(loss, stats.wieght)  # error: attr-defined, reportAttributeAccessIssue
    stats.weight = r  # error: misc, reportAttributeAccessIssue

    fused_simnpo_loss(h, w, y, ref_logps=r)  # error: call-overload, reportCallIssue
    fused_simnpo_loss(h, w, y, gamma="0")  # error: call-overload, reportArgumentType

    sequence_logprobs(h, w, y, reduction="sum")  # error: call-arg, reportCallIssue
    sequence_logprobs(h, w, y, impl="tritn")  # error: arg-type, reportArgumentType
    sequence_logprobs(h, w, y, workspace_mb="256")  # error: arg-type, reportArgumentType
    sequence_logprobs(h, w)  # error: call-arg, reportCallIssue
    sequence_logprobs(h, w, y).sum()  # error: attr-defined, reportAttributeAccessIssue
    token_logprobs(h, w, y, attention_mask=y)  # error: call-arg, reportCallIssue
    token_logprobs(h, w, y, num_rows=1.5)  # error: arg-type, reportArgumentType

    fused_logprob_loss(h, w, y, lambda logps, n: -logps.sum(), reduction="sum")  # error: call-overload, reportCallIssue
    fused_logprob_loss(h, w, y)  # error: call-overload, reportCallIssue
    fused_logprob_loss(h, w, y, lambda logps: -logps.sum())  # error: arg-type misc, reportArgumentType
    fused_logprob_loss(h, w, y, lambda logps, n: 1.0)  # error: arg-type return-value, reportArgumentType

    fused_token_loss(h, w, y, lambda tokens, sequence: tokens.sum())  # error: arg-type misc, reportCallIssue
    fused_npo_loss(h, w, y, ref_logps=r, weights=2.0)  # error: call-overload, reportArgumentType
    token_statistics(h, w, y, ["entropi"])  # error: list-item, reportArgumentType

    fused_linear_kl(h, w, h)  # error: call-arg, reportCallIssue
    fused_linear_kl(h, w, h, w, reduction="avg")  # error: arg-type, reportArgumentType
    fused_linear_kl(h, w, h, w, direction="backward")  # error: arg-type, reportArgumentType
    fused_linear_kl(h, w, h, w, y)  # error: call-arg, reportCallIssue
    fused_linear_kl(h, w, h, w, process_group=None)  # error: call-arg, reportCallIssue

    partial(fused_npo_loss, ref_logps=r)(h, w, y, betta=0.1)  # error: -, reportCallIssue
    explain("fused_npo_loss", h, w, y)  # error: arg-type, reportArgumentType
    partial(token_logprobs, betta=0.1)  # error: call-arg, reportArgumentType
    print(explain(fused_npo_loss, h, w, y).mod)  # error: attr-defined, reportAttributeAccessIssue
    set_debug("on")  # error: arg-type, reportArgumentType
'''.lstrip()


def marked(checker: int) -> dict[int, set[str]]:
    """line -> the codes it is marked with, of mypy (0) or of pyright (1)."""
    lines = {n: line.partition("  # error: ")[2] for n, line in enumerate(USER.splitlines(), start=1)}
    codes = {n: set(mark.split(", ")[checker].split()) - {"-"} for n, mark in lines.items() if mark}
    return {n: found for n, found in codes.items() if found}


def run(module: str, arguments: list[str], folder: Path) -> str:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # errors found; 2: the checker itself failed
    return done.stdout


def mypy(folder: Path, cache: Path) -> Iterator[tuple[int, str]]:
    # Under --strict every backward() is an untyped call, since torch gives it no types.
    arguments = ["--config-file=", "--strict", "--allow-untyped-calls", "--follow-imports=silent"]
    for line in run("mypy", [*arguments, f"--cache-dir={cache}", "user.py"], folder).splitlines():
        if found := re.match(r"user\.py:(\d+): error: .*\[([a-z-]+)\]$", line):
            yield int(found[1]), found[2]


def pyright(folder: Path, cache: Path) -> Iterator[tuple[int, str]]:
    settings = {"include": ["user.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}  # that of pyright
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    said = json.loads(run("basedpyright", ["--pythonpath", sys.executable, "--outputjson"], folder))
    for entry in said["generalDiagnostics"]:
        yield entry["range"]["start"]["line"] + 1, entry["rule"]


@pytest.mark.slow  # the first time; then mypy has what it knows of torch in pytest's cache
@pytest.mark.parametrize(("number", "checker"), [(0, mypy), (1, pyright)], ids=["mypy", "pyright"])
def test_right_calls_pass_and_wrong_ones_are_flagged(request, tmp_path, number, checker):
    cache = getattr(request.config, "cache", None)
    (tmp_path / "user.py").write_text(USER)
    flagged: dict[int, set[str]] = {}
    for line, code in checker(tmp_path, cache.mkdir("mypy_of_a_user") if cache else tmp_path / "cache"):
        flagged.setdefault(line, set()).add(code)
    assert flagged == marked(number)


def test_the_marks_are_found():
    assert len(marked(0)) > 30 and marked(1).keys() > marked(0).keys()
