"""Shared factories: batches, one evaluation for every implementation, and the rule for how wrong a result may be.

Every comparison has three parties on the same rounded inputs: ours, plain PyTorch in the dtype under test (its logits
rounded to it, float32 log-softmax, autograd), and the oracle, which is the same plain code in float64.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from unittest import mock

import torch
from torch import Tensor

from npo_kernels import (
    explain,
    fused_logprob_loss,
    fused_npo_loss,
    fused_simnpo_loss,
    sequence_logprobs,
    token_logprobs,
    token_statistics,
)
from npo_kernels.call.call import Call, Execution, KLCall
from npo_kernels.core import plan, task
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import MIB, make_plan
from npo_kernels.core.row_moments import NAMES
from npo_kernels.core.task import Needs
from npo_kernels.ops.schema import Operator

ON_GPU = os.environ.get("NPO_GPU_TESTS") == "1" and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("torch", "triton")
LAYOUTS = ("padded", "packed")
TINY = 1e-6  # workspace_mb of a byte, by which the tests ask for the smallest slices


def check_bound(smallest: int, limit: int) -> None:
    """The rule, but for TINY: small batches fit a slab in whatever is enough, and slices would not be seen."""
    if limit > 1:
        ENFORCED(smallest, limit)


ENFORCED, plan.check_bound = plan.check_bound, check_bound

# name -> (has a bias, logit_scale, softcap)
HEADS = {
    "plain": (False, 1.0, None),
    "bias": (True, 1.0, None),
    "scale": (False, 0.6, None),
    "softcap": (False, 1.0, 4.0),
    "all": (True, -1.7, 5.0),
}


def name_of(value) -> str | None:
    """Short parameter ids for pytest."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "+".join(value) or "nothing" if isinstance(value, tuple) else None


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Batch:
    """The tensors and options of a call; `lengths` says which positions of a padded batch are real."""

    hidden: Tensor  # (B, S, H) or (T, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (B, S) or (T,)
    lengths: tuple[int, ...]
    ref_logps: Tensor | None = None  # (B,)
    cu_seqlens: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    shift: bool = True
    ignore_index: int = -100

    def __call__(self, function: Callable, *args, **options):
        """A public function on this batch."""
        keywords = {
            "bias": self.bias,
            "cu_seqlens": self.cu_seqlens,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "shift": self.shift,
            "ignore_index": self.ignore_index,
        }
        return function(self.hidden, self.weight, self.labels, *args, **{**keywords, **options})

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: t for name, t in named.items() if t is not None}

    def leaves(self, needs: Sequence[str] = (), dtype: torch.dtype | None = None) -> "Batch":
        """Fresh copies, those in `needs` requiring grad."""
        fresh = {name: t.detach().to(dtype or t.dtype, copy=True) for name, t in self.tensors.items()}
        for name in needs:
            fresh[name].requires_grad_()
        return replace(self, **fresh)

    def packed(self) -> "Batch":
        """The same sequences without padding. Each keeps its first label: the shift must not score it."""
        lengths = torch.tensor(self.lengths, device=self.labels.device)
        real = torch.arange(self.labels.shape[1], device=lengths.device) < lengths[:, None]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return replace(self, hidden=self.hidden[real], labels=self.labels[real], cu_seqlens=cu_seqlens)

    def unpacked(self, values: Tensor) -> Tensor:
        """Per-position values of a packed batch at their place in the padded one, zero elsewhere."""
        length = max(self.lengths, default=0)
        parts = values.split(list(self.lengths))
        return torch.stack([torch.cat((p, p.new_zeros(length - len(p), *p.shape[1:]))) for p in parts])

    def sequences(self, order: Sequence[int]) -> "Batch":
        """A padded batch of some of the sequences, in this order."""
        order = list(order)
        return replace(
            self,
            hidden=self.hidden[order],
            labels=self.labels[order],
            lengths=tuple(self.lengths[s] for s in order),
            ref_logps=self.ref_logps[order],
        )

    @property
    def num_scored(self) -> int:
        return int(self(sequence_logprobs, impl="reference")[1].sum())


def make_batch(
    dtype: torch.dtype = torch.float32,
    head: str = "plain",
    layout: str = "padded",
    *,
    lengths: Sequence[int] = (9, 1, 0, 14, 6),
    prompts: Sequence[int] = (2, 0, 0, 0, 3),
    H: int = 40,
    V: int = 200,
    spread: float = 2.0,
    seed: int = 0,
    ignore_index: int = -100,
) -> Batch:
    """Sequences of ragged lengths with ignored prompts, a hole, repeated labels, the first label and the last.

    Logits have standard deviation `spread`; padding holds hidden states of its own. Values are drawn in float64 and
    rounded to `dtype`, so that every party sees the same numbers.
    """
    has_bias, logit_scale, softcap = HEADS[head]
    generator = torch.Generator().manual_seed(seed)
    B, S = len(lengths), max(lengths, default=0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def round_(values):
        return values.to(dtype).to(DEVICE)

    labels = torch.randint(0, V, (B, S), generator=generator)
    repeated = torch.rand(B, S, generator=generator) < 0.3
    labels = torch.where(repeated, labels % 3 * (V - 1) // 2, labels)  # 0, the middle one, V - 1
    for s, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        labels[s, length:] = ignore_index
        labels[s, :prompt] = ignore_index
        if length > 8:
            labels[s, length // 2] = ignore_index
    batch = Batch(
        hidden=round_(draw(B, S, H)),
        weight=round_(draw(V, H) * spread / H**0.5),
        bias=round_(draw(V)) if has_bias else None,
        labels=labels.to(DEVICE),
        lengths=tuple(lengths),
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
    )
    # a reference that some sequences are above and others below
    logps = batch.leaves(dtype=torch.float64)(sequence_logprobs, impl="reference")[0]
    batch = replace(batch, ref_logps=(logps.cpu() + 8 * draw(B)).float().to(DEVICE))
    return batch.packed() if layout == "packed" else batch


def call_of(batch: Batch, impl: str, needs: Sequence[str] | None = None, num_rows: int | None = None) -> Call:
    """The call that a public function makes of a packed batch; `needs` without tensors that require grad, if given."""
    wanted = needs or [name for name, t in batch.tensors.items() if t.requires_grad]
    execution = Execution(impl, 2**22, None, (), Needs(*(name in wanted for name in ("hidden", "weight", "bias"))))
    head = Head(batch.weight, batch.bias, 0.5, 20.0)
    layout = batch.labels, batch.cu_seqlens, False, batch.ignore_index
    return Call(batch.hidden, head, *layout, num_rows, execution)


def kl_call_of(batch: Batch, impl: str, needs: Sequence[str] | None = None, reverse: bool = False) -> KLCall:
    """The same of `fused_linear_kl`: the model against one of reversed hidden states; `reverse` has a target shift."""
    call = call_of(batch, impl, needs)
    reference = batch.hidden.detach().flip(0), Head(batch.weight.detach(), None, 0.5, 20.0)
    counted = call.labels != batch.ignore_index
    labels, target_shift = (None, 0.0) if not reverse else (call.labels, 3.0)
    return KLCall(call.hidden, call.head, *reference, counted, labels, target_shift, reverse, call.execution)


def opcheck(operator: Operator, arguments) -> None:
    """torch's own checks of an operator: its schema, its fake, its autograd."""
    torch.library.opcheck(operator.op, tuple(operator.arguments.flatten(arguments)))


def workspace_for(batch: Batch, impl: str, chunks: bool, needs: Sequence[str] | None = None) -> float:
    """workspace_mb in which all rows fit a slab at once, or, with `chunks`, the longest sequence only."""
    with mock.patch.object(task, "make_plan", wraps=make_plan) as spy:
        batch.leaves(needs or tuple(batch.tensors))(partial(explain, fused_npo_loss), impl=impl)
    sizes = spy.call_args.kwargs
    enough = make_plan(**{**sizes, "limit": 2**60}).workspace_bytes
    if not chunks:
        return enough / MIB
    least = bisect_left(range(enough), True, key=lambda limit: make_plan(**{**sizes, "limit": limit}).mode == "slab")
    return least / MIB


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: batch -> scalar, the same for every implementation
# ---------------------------------------------------------------------------------------------------------------------


def persistent_grids(monkeypatch) -> list[int]:
    """The number of programs of every launch of `exp_logits_persistent_kernel`, in order, from now on."""
    launches = import_module("npo_kernels.backends.triton.exp_logits")  # the package has a function of this name
    grids, kernel = [], launches.exp_logits_persistent_kernel

    class Spy:
        def __getitem__(self, grid):
            grids.append(*grid)
            return kernel[grid]

    monkeypatch.setattr(launches, "exp_logits_persistent_kernel", Spy())
    return grids


def upstream(shape: Sequence[int], seed: int = 7) -> Tensor:
    """A gradient that is nowhere one, of both signs, and whose products do not cancel in their sum."""
    drawn = 0.25 + torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn.view(-1)[::4] *= -0.3
    return drawn.to(DEVICE)


def npo(batch: Batch, **options) -> Tensor:
    return batch(fused_npo_loss, ref_logps=batch.ref_logps, **options)


def simnpo(batch: Batch, **options) -> Tensor:
    return batch(fused_simnpo_loss, **{"beta": 0.7, "gamma": 6.0, "reduction": "sum", **options})


def mixed_loss(logps: Tensor, num_tokens: Tensor) -> Tensor:
    """A preference between even and odd sequences and the likelihood of odd ones: every gradient depends on all."""
    even = torch.arange(logps.shape[0], device=logps.device) % 2 == 0
    preference = torch.nn.functional.softplus(0.1 * (logps[even].sum() - logps[~even].sum()))
    return preference - 0.3 * (logps / num_tokens.clamp(min=1))[~even].sum()


def user_loss(batch: Batch, **options) -> Tensor:
    return batch(fused_logprob_loss, mixed_loss, **options)


def tokens(batch: Batch, **options) -> Tensor:
    logps = batch(token_logprobs, **options)
    return (logps * upstream(logps.shape).to(logps.dtype)).sum()


def sequences(batch: Batch, **options) -> Tensor:
    logps, _ = batch(sequence_logprobs, **options)
    return (logps * upstream(logps.shape).to(logps.dtype)).sum()


def statistics(batch: Batch, **options) -> Tensor:
    """All of `token_statistics`, each with weights of its own."""
    values = torch.stack([*batch(token_statistics, NAMES, **options).values()])
    return (values * upstream(values.shape).to(values.dtype)).sum()


def evaluate(
    objective: Callable, batch: Batch, needs: Sequence[str] = (), *, impl: str, dtype=None, **options
) -> dict[str, Tensor]:
    """The loss and the gradients named in `needs`."""
    batch = batch.leaves(needs, dtype)
    loss = objective(batch, impl=impl, **options)
    assert loss.requires_grad == bool(needs)
    grads = torch.autograd.grad(loss, [batch.tensors[name] for name in needs]) if needs else ()
    return {"loss": loss.detach(), **dict(zip(needs, grads, strict=True))}


def evaluate_plain_and_oracle(objective: Callable, batch: Batch, needs: Sequence[str] = ()) -> tuple[dict, dict]:
    plain = evaluate(objective, batch, needs, impl="reference")
    return plain, evaluate(objective, batch, needs, impl="reference", dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """||value - oracle|| / ||oracle||, of the whole tensor; NaN counts as infinitely wrong."""
    assert value.shape == oracle.shape, (value.shape, oracle.shape)
    norm = torch.linalg.vector_norm(oracle.double())
    error = torch.linalg.vector_norm(value.double() - oracle.double())
    ratio = (error / norm if norm > 0 else error).item()
    return ratio if ratio == ratio else torch.inf


# In float32 every order of summation has an error of its own, some rounding units large: an error that small is no
# fault of anybody. In 16 bits ours has to win without any allowance.
FLOOR = {torch.float64: 1e-12, torch.float32: 6e-7, torch.bfloat16: 0.0, torch.float16: 0.0}
# Whatever plain PyTorch loses: two roundings to the dtype (the exponentials, the result) are all that ours may cost.
CEILING = {torch.float64: 1e-12, torch.float32: 1.5e-6, torch.bfloat16: 2**-8.5, torch.float16: 2**-11.5}


def assert_no_worse_than_plain(ours: dict, plain: dict, oracle: dict, slack: float = 1.0, ceiling: bool = True) -> None:
    """||ours - oracle|| <= slack ||plain - oracle||, and never more than rounding the inputs of the products costs.

    Without a ceiling where a few large entries make up a result: its rounding error is then theirs, not an average.
    """
    for name, truth in oracle.items():
        got, theirs = ours[name], plain[name]
        assert got.dtype == theirs.dtype, f"{name}: {got.dtype} instead of {theirs.dtype}"
        error = relative_error(got, truth)
        allowed = slack * relative_error(theirs, truth) + FLOOR[got.dtype]
        allowed = min(allowed, CEILING[got.dtype]) if ceiling else allowed
        assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"
