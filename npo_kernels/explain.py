"""What a call would do: the plan, asked for without running anything."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from npo_kernels.inputs import prepare
from npo_kernels.losses import fused_logprob_loss, fused_npo_loss, fused_simnpo_loss
from npo_kernels.plan import Plan
from npo_kernels.tasks import plan_of, task_of


def explain(
    function: Callable,
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    *,
    bias: Tensor | None = None,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
    workspace_mb: float | None = None,
    num_rows: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    **_,
) -> Plan:
    """The plan that `function`, one of the losses or log-probability functions, would follow for these arguments.

        >>> print(explain(fused_npo_loss, hidden, lm_head_weight, labels, workspace_mb=256))
        recompute: 5 vocabulary slice(s), 251 MiB of workspace; the longest sequence does not fit a slab

    Arguments that do not bear on the plan are accepted and ignored, so that a call can be pasted. impl="reference" has
    no plan and raises ValueError. Costs the row count's host sync, unless `num_rows` is given.
    """
    if impl == "reference":
        raise ValueError("impl='reference' has no plan: it materialises the logits; ask about 'torch' or 'triton'")
    call = prepare(
        "explain", hidden, lm_head_weight, labels, unknown={},
        bias=bias, shift=shift, cu_seqlens=cu_seqlens, ignore_index=ignore_index, logit_scale=1.0,
        softcap=None, impl=impl, workspace_mb=workspace_mb, num_rows=num_rows,
        process_group=process_group,
    )  # fmt: skip
    task = task_of(*call.batch_args, *call.option_args)
    fused = function in (fused_npo_loss, fused_simnpo_loss) and reduction != "none"
    return plan_of(
        task,
        call.workspace_bytes,
        gradient_in_forward=fused or function is fused_logprob_loss,
        separable=function is not fused_logprob_loss,
    )
