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
    """The plan that `function`, one of the losses or log-probability functions, would follow for these arguments.

        >>> print(explain(fused_npo_loss, hidden, lm_head_weight, labels, workspace_mb=256))
        recompute: 126 vocabulary slice(s), 225 MiB of workspace; the longest sequence does not fit a slab; persistent
        kernel, tile 128x256x64 of row sm_90, measured

    Takes the arguments of `function`, so that a call can be pasted, and checks them; those that do not bear on the plan
    (`ref_logps`, `loss_fn`) may be left out. A functools.partial of such a function does as well. Raises ValueError for
    impl="reference", which has no plan, and for a workspace_mb that is not enough. Costs the row count's host sync,
    unless `num_rows` is given.
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
