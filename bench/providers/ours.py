"""npo_kernels: each implementation, also with a workspace of 256 MiB, and each projection kernel."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from bench.cases import Batch
from bench.objectives import BETA
from bench.providers.base import Provider
from bench.providers.kernels import KERNELS
from npo_kernels import explain, fused_logprob_loss, fused_npo_loss, sequence_logprobs
from npo_kernels.call.arguments import CallOptions, Impl
from npo_kernels.core.plan import Plan

SMALL_WORKSPACE_MB = 256


def provider(
    impl: Impl,
    workspace_mb: float | None = None,
    kernel: str = "",
    setting: Callable[[], AbstractContextManager] = nullcontext,
) -> Provider:
    def options(batch: Batch) -> CallOptions:
        return {"shift": False, "impl": impl, "workspace_mb": workspace_mb, "softcap": batch.softcap}

    def loss(batch: Batch) -> Tensor:
        tensors = batch.hidden, batch.weight, batch.labels
        if batch.num_forget == batch.labels.shape[0]:
            return fused_npo_loss(*tensors, ref_logps=batch.ref_logps, beta=BETA, **options(batch))

        def npo_and_retain(logps: Tensor, num_tokens: Tensor) -> Tensor:
            return batch.objective("npo", logps)

        return fused_logprob_loss(*tensors, npo_and_retain, **options(batch))

    def logprobs(batch: Batch) -> Tensor:
        return sequence_logprobs(batch.hidden, batch.weight, batch.labels, **options(batch))[0]

    name = "/".join(filter(None, ("npo_kernels", impl, kernel, f"{workspace_mb}MiB" if workspace_mb else "")))
    return Provider(name, "npo-kernels", "npo", True, loss, logprobs, setting)


def plan_of(name: str, batch: Batch) -> Plan | None:
    """The plan of one of our providers; None for all others."""
    package, _, rest = name.partition("/")
    if package != "npo_kernels":
        return None
    impl, *options = rest.split("/")
    function: Callable[..., object]
    if batch.mode == "logprobs":
        function = sequence_logprobs
    else:
        function = fused_npo_loss if batch.num_forget == batch.labels.shape[0] else fused_logprob_loss
    workspace_mb = SMALL_WORKSPACE_MB if f"{SMALL_WORKSPACE_MB}MiB" in options else None
    return explain(
        function, batch.hidden, batch.weight, batch.labels, shift=False, impl=impl, workspace_mb=workspace_mb
    )


PROVIDERS = [
    *(provider(impl, mb) for impl in ("triton", "torch") for mb in (None, SMALL_WORKSPACE_MB)),
    *(provider("triton", kernel=name, setting=setting) for name, setting in KERNELS.items()),
]
