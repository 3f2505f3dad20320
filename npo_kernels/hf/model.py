"""Log-probabilities and losses inside the forward of a Hugging Face model, without logits.

    from npo_kernels.hf import add_fused_unlearning_head

    model = add_fused_unlearning_head(AutoModelForCausalLM.from_pretrained(...))  # before any wrapper
    out = model(input_ids, attention_mask=mask, labels=labels, fused_unlearning=True)
    out.logps, out.num_tokens  # (B,), (B,)

    npo = partial(fused_npo_loss, ref_logps=ref_logps, beta=0.1)  # computes the gradients in the forward
    model(input_ids, attention_mask=mask, labels=labels, fused_unlearning=npo).loss.backward()

The loss is computed inside the forward so that wrappers work: DDP prepares its reducer there, and FSDP2 and ZeRO-3
gather the head's weight in hooks of the forward. Without `fused_unlearning`, `model(...)`, `generate`, `state_dict` and
`save_pretrained` behave as before.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from npo_kernels.call.rules import short
from npo_kernels.hf.batch import take_batch
from npo_kernels.hf.head import CausalLM, head_computes, head_of, locked, plain_linears, probed
from npo_kernels.logprobs import sequence_logprobs, token_logprobs
from npo_kernels.losses import LossStats
from npo_kernels.statistics import token_statistics
from npo_kernels.user_losses import LogprobStats

Model = TypeVar("Model", bound=nn.Module)
# Results of token_logprobs or a loss; of sequence_logprobs or a loss with return_stats; of token_statistics.
Result = Tensor | tuple[Tensor, Tensor | LossStats | LogprobStats] | dict[str, Tensor]
Function = Callable[..., Result]  # called like sequence_logprobs
# Arguments of the function that come from the model and its forward, so that a partial must not fix them.
FROM_MODEL = {
    "hidden", "lm_head_weight", "labels", "bias", "logit_scale", "softcap", "shift", "cu_seqlens", "ignore_index",
}  # fmt: skip


@dataclass
class FusedUnlearningOutput(ModelOutput):
    """The output of `model(..., fused_unlearning=...)`. Accessing `logits` raises AttributeError: none were formed.

    Attributes:
        loss: the scalar of a loss function, plus the router's auxiliary loss if the model adds it.
        logps: (B,) float32, summed log-probabilities in nats, for fused_unlearning=True.
        num_tokens: (B,) int64, the number of scored tokens, for fused_unlearning=True.
        token_logps: (B, S) or (T,) float32, for fused_unlearning=token_logprobs.
        statistics: (B, S) or (T,) for each name, for a partial of `token_statistics`.
        stats: `LossStats`, `LogprobStats` or `TokenStats`, for a loss with return_stats=True.
        aux_loss: the router's auxiliary loss, if `output_router_logits` is on.
        hidden_states: as returned by the model, if requested.
        attentions: as returned by the model, if requested.
    """

    loss: Tensor | None = None
    logps: Tensor | None = None
    num_tokens: Tensor | None = None
    token_logps: Tensor | None = None
    statistics: dict[str, Tensor] | None = None
    stats: LossStats | LogprobStats | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def logits(self) -> NoReturn:
        raise AttributeError("no logits were formed: call the model without fused_unlearning where they are needed")


def add_fused_unlearning_head(model: Model) -> Model:
    """Let `model(..., labels=labels, fused_unlearning=...)` return log-probabilities or a loss, without logits.

    Replaces:

    ```python
    logits = model(input_ids, attention_mask=attention_mask).logits.float()                     # (B, S, V)
    scored = labels[:, 1:] != -100
    index = torch.where(scored, labels[:, 1:], 0)[..., None]
    token_logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, index).squeeze(-1)
    logps, num_tokens = (token_logps * scored).sum(-1), scored.sum(-1)
    ```

    The forward takes these arguments in addition to its own:

    - `fused_unlearning`: what to compute. True: sequence log-probabilities (`logps` and `num_tokens` of the output).
      `token_logprobs`: token log-probabilities (`token_logps`). A `functools.partial` of `token_statistics`: statistics
      (`statistics`). A loss (`loss`, `stats`): a function with the signature of `sequence_logprobs`, usually a
      `functools.partial` of `fused_npo_loss`, `fused_simnpo_loss`, `fused_logprob_loss` or `fused_token_loss`. A loss
      computes its gradients in the forward, where they cost least, and is not affected by wrappers that round outputs.
      Pass tensors such as `ref_logps` inside the partial, where no wrapper casts them.
    - `labels`, or `shift_labels`: (B, S) int64, aligned with the inputs, or already shifted.
    - `cu_seqlens`: (B+1,) int32, for a packed batch (1, T). `cu_seq_lens_q`, or `position_ids` that restart at each
      sequence, work as well. Missing `position_ids` are created.
    - `ignore_index`: -100 by default.

    The bias, scale and tanh softcap of the logits are taken from the model's own forward. If the model adds its
    router's auxiliary loss to its loss, it is added here too, and also returned as `aux_loss`.

    Threads may share a model: fused calls run one at a time, other calls run concurrently. Do not save or move the
    model during a fused call.

    Args:
        model: a causal language model of transformers, or a PEFT model around one. It is changed in place. Add the head
            before DDP, FSDP, DeepSpeed or accelerate wrap the model.

    Returns:
        `model` itself. With `fused_unlearning`, its forward returns a `FusedUnlearningOutput`.

    Raises:
        TypeError: not a causal language model of transformers.
        ValueError: a head that is not a plain linear layer, such as one with a LoRA adapter or quantised weights. Calls
            raise it too, and NotImplementedError if the model changes its logits in a way that has no fused form.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from npo_kernels import fused_npo_loss
        >>> from npo_kernels.hf import add_fused_unlearning_head
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2,
        ... )
        >>> model = add_fused_unlearning_head(LlamaForCausalLM(config))
        >>> input_ids = torch.randint(64, (2, 8))
        >>> with torch.no_grad():
        ...     ref_logps = model(input_ids, labels=input_ids, fused_unlearning=True).logps
        >>> npo = partial(fused_npo_loss, ref_logps=ref_logps, beta=0.1)
        >>> loss = model(input_ids, labels=input_ids, fused_unlearning=npo).loss
        >>> loss.backward()
        >>> round(loss.item(), 2)  # (2 / 0.1) ln 2
        13.86
    """
    base = getattr(model, "get_base_model", None) if isinstance(model, nn.Module) else None  # of PEFT
    inner: Any = model if base is None else base()
    causal = isinstance(inner, nn.Module) and hasattr(inner, "get_output_embeddings") and hasattr(inner, "config")
    if not causal:
        hint = "; add the head before wrapping, to the model inside" if hasattr(model, "module") else ""
        raise TypeError(f"model: expected a causal language model of transformers, got {short(model)}{hint}")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise TypeError(f"model: {type(inner).__name__} is an encoder-decoder: expected a decoder-only language model")
    plain_linears(head_of(cast(CausalLM, inner)))
    if not hasattr(inner, "_unfused_class"):
        cls: type = type(inner)
        inner.__class__ = _fused_class(cls)
    return model


@functools.cache
def _fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `cls` whose forward takes `fused_unlearning`.

    It replaces the class and not `forward` of the instance, so that a deep copy or a replica uses its own weights. It
    keeps the name, which `save_pretrained` writes, and the signature, which `generate` and the Trainer inspect.
    """

    @functools.wraps(cls.forward)
    def forward(self: CausalLM, *args: Any, fused_unlearning: bool | Function | None = False, **kwargs: Any) -> Any:
        if fused_unlearning is False or fused_unlearning is None:
            return cls.forward(self, *args, **kwargs)
        function = sequence_logprobs if fused_unlearning is True else fused_unlearning
        kwargs.update(zip(list(inspect.signature(cls.forward).parameters)[1:], args, strict=False))
        return _fused_forward(self, functools.partial(cls.forward, self), function, kwargs)

    def reduce(self: object, protocol: SupportsIndex) -> tuple[object, ...]:
        return _new, (cls,), self.__getstate__()  # pickle the class that can be imported

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    names |= {"forward": forward, "__reduce_ex__": reduce, "_unfused_class": cls}
    return type(cls.__name__, (cls,), names)


def _new(cls: type) -> nn.Module:
    fused = _fused_class(cls)
    return fused.__new__(fused)


def _fused_forward(
    model: CausalLM, forward: Callable[..., Any], function: Function, kwargs: dict[str, Any]
) -> FusedUnlearningOutput:
    """Run the model's forward up to the input of the head, then `function` inside the head."""
    if not callable(function):
        raise TypeError(f"fused_unlearning: expected True or a function such as fused_npo_loss, got {short(function)}")
    _check_function(function)
    _check_arguments(kwargs)
    batch = take_batch(kwargs)
    head = head_of(model)
    plain_linears(head)  # raises if it is not a plain linear layer
    with locked(head):
        with probed(model, head) as probe:
            outputs = forward(**{**kwargs, "use_cache": False, "return_dict": True})
        scale, softcap = probe.logit_function(outputs.logits)

        def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Result:
            return function(
                batch.rows(hidden), weight, batch.labels, bias=bias, logit_scale=scale, softcap=softcap, **batch.options
            )

        with head_computes(head, fused):
            result: Result = head(probe.hidden)
    found = _named(function, result)
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is not None and "loss" in found:
        found["loss"] = found["loss"] + model.config.get_text_config().router_aux_loss_coef * aux_loss
    if "loss" not in found:
        _check_not_rounded(model, result.values() if isinstance(result, dict) else found.values())
    # in one call: wrappers see only the fields that were passed to the constructor
    return FusedUnlearningOutput(
        **found,
        aux_loss=aux_loss,
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )


def _named(function: Function, result: Result) -> dict[str, Any]:
    """The result of a function as fields of the output."""
    kind = function.func if isinstance(function, functools.partial) else function
    if kind is sequence_logprobs:
        return dict(zip(("logps", "num_tokens"), result, strict=True))
    if kind is token_logprobs:
        return {"token_logps": result}
    if kind is token_statistics:
        return {"statistics": result}
    return dict(zip(("loss", "stats"), result, strict=True)) if isinstance(result, tuple) else {"loss": result}


def _check_function(function: Function) -> None:
    """Refuse a partial that fixes an argument in FROM_MODEL: the model passes it, which would silently override it."""
    while isinstance(function, functools.partial):
        fixed = sorted(FROM_MODEL & function.keywords.keys())
        if fixed:
            raise ValueError(
                f"fused_unlearning: {fixed[0]} is the model's own or an argument of its forward, got a partial with "
                f"{fixed[0]}={short(function.keywords[fixed[0]])}: leave it out of the partial"
            )
        function = function.func


def _check_arguments(kwargs: dict[str, Any]) -> None:
    refused = {
        "past_key_values": "it scores whole sequences, without a cache (PEFT's prefix tuning is such a cache: use "
        "LoRA or prompt tuning)",
        "num_items_in_batch": "a loss over sequences is divided by their number: pass normalizer= to the loss",
        "logits_to_keep": "labels of ignore_index leave positions out, at no cost",
        "use_cache": "it scores whole sequences, without a cache",
    }
    for name, hint in refused.items():
        value = kwargs.pop(name, None)
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            raise ValueError(f"fused_unlearning does not take {name}: {hint}")


def _check_not_rounded(model: CausalLM, found: Iterable[Tensor]) -> None:
    """Refuse results that FSDP2 would round to 16 bits: a log-probability near -1000 would be off by several nats."""
    state = getattr(model, "_get_fsdp_state", None)
    policy = getattr(state(), "_mp_policy", None) if state is not None else None
    dtypes = {getattr(policy, "output_dtype", None)}
    dtypes |= {t.dtype for t in found}
    if dtypes & {torch.bfloat16, torch.float16}:
        raise ValueError(
            "log-probabilities would leave the forward rounded to 16 bits, because FSDP2's MixedPrecisionPolicy has "
            "such an output_dtype (accelerate sets one): compute the loss inside, fused_unlearning=partial("
            "fused_npo_loss, ...), or set output_dtype=torch.float32"
        )
