"""Build the `Call` of a public function from its arguments: autocast, checks, layout, choice of the backend."""

import torch
from torch import Tensor

from npo_kernels.backends.choose import resolve_impl
from npo_kernels.call.arguments import CallOptions, Direction, Impl
from npo_kernels.call.call import Call, Execution, KLCall
from npo_kernels.call.checks import check_batch, check_kl
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import workspace_bytes
from npo_kernels.core.task import Needs
from npo_kernels.core.vocab_parallel import local_head

# Options that are fields of `Call` are copied unchanged.
CARRIED = tuple(name for name in Call._fields if name in CallOptions.__annotations__)


def prepare(hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, options: CallOptions) -> Call:
    """Normalise the arguments of a loss or log-probability function and check them against each other.

    `options` is complete: `npo_kernels.call.arguments.checked` has filled in the defaults.
    """
    impl = options["impl"]
    if impl == "reference" and options["process_group"] is not None:
        raise ValueError("impl='reference' takes the whole head: gather it, or use impl='torch' with process_group")
    weight, bias, shard = local_head(lm_head_weight, options["bias"], options["process_group"])
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_batch(hidden, weight, labels, bias, options["cu_seqlens"], impl)
    hidden = _rows_contiguous(hidden)
    hidden = hidden.reshape(labels.numel(), hidden.shape[-1])
    head = _head(weight, bias, options["logit_scale"], options["softcap"])
    return Call(
        hidden=hidden,
        head=head,
        labels=labels.contiguous(),
        **{name: options[name] for name in CARRIED},  # type: ignore[literal-required]
        execution=Execution(
            impl=resolve_impl(impl, hidden.device),
            workspace_bytes=workspace_bytes(options["workspace_mb"]),
            group=None if shard is None else shard.group,
            sizes=() if shard is None else shard.sizes,
            needs=_needs(hidden, head),
        ),
    )


def prepare_kl(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ref_hidden: Tensor,
    ref_lm_head_weight: Tensor,
    *,
    mask: Tensor | None,
    labels: Tensor | None,
    target_shift: float,
    direction: Direction,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    impl: Impl,
    workspace_mb: float | None,
) -> KLCall:
    """The same for `fused_linear_kl`."""
    hidden, lm_head_weight, bias = autocast_inputs(hidden, lm_head_weight, bias)
    ref_hidden, ref_lm_head_weight, ref_bias = autocast_inputs(ref_hidden, ref_lm_head_weight, ref_bias)
    check_kl(
        hidden, lm_head_weight, bias, ref_hidden, ref_lm_head_weight, ref_bias, mask, labels, target_shift, impl
    )  # fmt: skip
    x, ref_x = hidden.reshape(-1, hidden.shape[-1]), ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
    counted = torch.ones(x.shape[0], dtype=torch.bool, device=x.device) if mask is None else mask.reshape(-1)
    head = _head(lm_head_weight, bias, logit_scale, softcap)
    ref_bias = None if ref_bias is None else ref_bias.detach()
    return KLCall(
        hidden=x,
        head=head,
        ref_hidden=ref_x,
        ref_head=_head(ref_lm_head_weight.detach(), ref_bias, logit_scale, softcap),
        counted=counted,
        labels=None if labels is None or target_shift == 0 else labels.reshape(-1),
        target_shift=float(target_shift),
        reverse=direction == "reverse",
        execution=Execution(
            impl=resolve_impl(impl, x.device),
            workspace_bytes=workspace_bytes(workspace_mb),
            group=None,
            sizes=(),
            needs=_needs(x, head),
        ),
    )


def _head(weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Head:
    """The head, with a contiguous bias and rows whose elements are contiguous, as the kernels need them."""
    bias = None if bias is None else bias.contiguous()
    return Head(_rows_contiguous(weight), bias, float(logit_scale), None if softcap is None else float(softcap))


def _needs(hidden: Tensor, head: Head) -> Needs:
    grad = torch.is_grad_enabled()
    return Needs(*(grad and t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)))


def _rows_contiguous(t: Tensor) -> Tensor:
    """Copy a tensor unless the elements of each row are contiguous; the kernels take any row stride."""
    return t if t.stride(-1) == 1 else t.contiguous()


def autocast_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to the autocast dtype under torch.autocast, as torch.nn.functional.linear does."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(hidden), cast(weight), None if bias is None else cast(bias)
