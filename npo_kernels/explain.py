"""`explain`: the plan of a call, without running it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

from npo_kernels.call.arguments import Arguments, CallOptions
from npo_kernels.call.prepare import prepare
from npo_kernels.call.rules import short
from npo_kernels.core.plan import Plan
from npo_kernels.logprobs import sequence_logprobs, token_logprobs
from npo_kernels.losses import fused_npo_loss, fused_simnpo_loss
from npo_kernels.ops.task import task_of
from npo_kernels.ops.token_statistics import plan_of
from npo_kernels.statistics import token_statistics
from npo_kernels.user_losses import fused_logprob_loss, fused_token_loss

USER_LOSSES = (fused_logprob_loss, fused_token_loss)
EXPLAINED = (fused_npo_loss, fused_simnpo_loss, *USER_LOSSES, sequence_logprobs, token_logprobs, token_statistics)


def explain(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Plan:
    """The plan of a call: its mode, how the work is cut, and how much workspace it needs. Nothing is run.

    On a GPU the plan also names the kernel and the tile, and whether the tile was chosen by measurement on that device.
    Counting the scored rows needs a host sync, unless `num_rows` is given.

    Args:
        function: a loss or log-probability function of this package other than `fused_linear_kl`, or a
            functools.partial of one.
        *args: the positional arguments of the call.
        **kwargs: its keyword arguments. They are checked as in the call. Those that do not affect the plan
            (`ref_logps`, `loss_fn`) may be left out.

    Returns:
        A `Plan`, with `mode` ("no_grad", "frozen", "slab" or "recompute"), `chunks` (ranges of sequences in the slab
            mode), `slices` (ranges of the vocabulary in the other modes), `workspace_bytes`, `why` (the reason for the
            mode) and `blocks` (the kernel and tile). Its `str` is one line of text.

    Raises:
        ValueError: another function, impl="reference", which has no plan, or a `workspace_mb` that is too small.
        TypeError: an argument of the wrong type or dtype, or `hidden`, `lm_head_weight` or `labels` is missing.

    Examples:
        >>> import torch
        >>> from npo_kernels import explain, fused_npo_loss
        >>> hidden, lm_head_weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
        >>> labels = torch.randint(32, (2, 6))
        >>> print(explain(fused_npo_loss, hidden, lm_head_weight, labels, impl="torch"))
        slab: 1 chunk(s), 0 MiB of workspace; all rows fit at once; ...
    """
    while isinstance(function, functools.partial):
        partial: functools.partial[Any] = function
        function, args, kwargs = partial.func, (*partial.args, *args), {**partial.keywords, **kwargs}
    if not any(function is one for one in EXPLAINED):
        names = ", ".join(f.__name__ for f in EXPLAINED)
        raise ValueError(f"function: expected one of {names}, got {getattr(function, '__name__', short(function))}")
    signature = inspect.signature(function)
    Arguments.of(function.__name__, signature).check(args, kwargs)
    bound = signature.bind_partial(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given["impl"] == "reference":
        raise ValueError("impl='reference' has no plan: it materialises the logits; ask about 'torch' or 'triton'")
    for name in ("hidden", "lm_head_weight", "labels"):
        if name not in given:
            raise TypeError(f"explain() needs the argument '{name}' of {function.__name__}")
    options = cast(CallOptions, {name: given[name] for name in CallOptions.__annotations__})
    call = prepare(given["hidden"], given["lm_head_weight"], given["labels"], options)
    fused = function in (fused_npo_loss, fused_simnpo_loss) and given["reduction"] != "none"
    if function is token_statistics:
        return plan_of(task_of(call), call.execution.workspace_bytes)
    return task_of(call).plan(
        call.execution.workspace_bytes,
        gradient_in_forward=fused or function in USER_LOSSES,
        separable=function not in USER_LOSSES,
    )
