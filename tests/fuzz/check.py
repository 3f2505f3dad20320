"""One call, checked: values, gradients, statistics, and that nothing else has changed.

What may be lost is measured with the oracle's own code, for each entry of a value and each row of a gradient: what
plain PyTorch with float32 logits loses, and what inputs and gradients of logits a rounding unit away would change. On
top come a few rounding units of the result.
"""

import re
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

import npo_kernels as library
from npo_kernels.core.plan import MIB
from tests.fuzz import oracle
from tests.fuzz.calls import Call
from tests.fuzz.tensors import make
from tests.support import CEILING, FLOOR, TINY

FUNCTIONS = {
    "npo": library.fused_npo_loss,
    "simnpo": library.fused_simnpo_loss,
    "logprob": partial(library.fused_logprob_loss, loss_fn=oracle.of_sequences),
    "token": partial(library.fused_token_loss, loss_fn=oracle.of_tokens),
    "sequences": library.sequence_logprobs,
    "tokens": library.token_logprobs,
    "statistics": library.token_statistics,
    "kl": library.fused_linear_kl,
}
REFUSED = re.compile(r"workspace_mb: .* the smallest that works is ([\d.]+)\. ")


def check(call: Call, impl: str) -> None:
    """Raises AssertionError, or whatever the package raises."""
    made = make(call)
    storages = {name: _bytes(t) for name, t in made.items()}
    before, versions = _process_state(), {name: t._version for name, t in made.items()}
    options = _options(call, made, impl)
    ours = _evaluate(call, made, lambda t: _ours(call, t, impl, options))
    again = ours
    if impl != "triton" or call.seed % 4 == 0:  # the interpreter is slow
        again = _evaluate(call, made, lambda t: _ours(call, t, impl, options))
    assert before == _process_state(), "the state of the process has changed"
    for name, t in made.items():
        assert torch.equal(storages[name], _bytes(t)) and versions[name] == t._version, f"{name}: changed in place"
    for name, value in ours.items():
        same = (value == again[name]) | (value.isnan() & again[name].isnan())
        assert same.all(), f"{name}: the same call gave other bits"
    _compare(call, made, ours, impl)


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------


def _options(call: Call, made: dict[str, Tensor], impl: str) -> dict:
    """The keywords that are not tensors."""
    options = {"impl": impl, "logit_scale": call.logit_scale, "softcap": call.softcap}
    if call.function == "kl":
        options |= {"direction": "reverse" if call.reverse else "forward", "target_shift": call.target_shift}
        options["reduction"] = call.reduction
    else:
        options |= {"shift": call.shift, "ignore_index": call.ignore_index}
        if call.num_rows is not None:
            options["num_rows"] = made["counted"].numel() + 3 * (call.num_rows == "bound")
    if call.function in ("npo", "simnpo"):
        options |= {"beta": call.beta, "reduction": call.reduction}
        options["normalizer"] = made.get("normalizer", call.normalizer)
    if call.function in ("npo", "simnpo", "logprob", "token"):
        options["return_stats"] = True
    if call.function == "simnpo":
        options["gamma"] = call.gamma
    if call.function == "statistics":
        options["which"] = list(call.which)
    if call.workspace is not None and impl != "reference":
        options["workspace_mb"] = _workspace(call, made, options)
    if call.function != "kl" and impl != "reference":
        leaves = {
            name: t.detach().requires_grad_(name in call.wanted) for name, t in made.items() if t.is_floating_point()
        }
        plan = _with_tensors(partial(library.explain, FUNCTIONS[call.function]), call, {**made, **leaves}, options)
        assert (plan.mode == "no_grad") == (not call.wanted), plan
        bound = options.get("workspace_mb")
        assert bound is None or bound == TINY or plan.workspace_bytes <= bound * MIB, plan
    return options


def _workspace(call: Call, made: dict[str, Tensor], options: dict) -> float:
    """In MiB. A bound that is not enough is refused, and the refusal says what is."""
    if call.workspace == "tiny":
        return TINY
    asked = 2e-6 if call.workspace == "least" else call.workspace
    try:
        _evaluate(call, made, lambda t: _ours(call, t, options["impl"], {**options, "workspace_mb": asked}))
    except ValueError as error:
        found = REFUSED.match(str(error))
        if found is None:
            raise
        return float(found[1])
    return asked


def _with_tensors(function, call: Call, t: dict[str, Tensor], options: dict):
    """The function called with the tensors where they belong, under the autocast of the call."""
    keywords = {
        name: t[name] for name in ("bias", "cu_seqlens", "ref_logps", "weights", "mask", "ref_bias") if name in t
    }
    scope = torch.autocast("cpu", getattr(torch, call.autocast)) if call.autocast else nullcontext()
    with scope:
        if call.function == "kl":
            if not call.masked:
                del keywords["mask"]
            if call.target_shift:
                keywords["labels"] = t["labels"]
            return function(t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"], **keywords, **options)
        return function(t["hidden"], t["weight"], t["labels"], **keywords, **options)


def _ours(call: Call, t: dict[str, Tensor], impl: str, options: dict) -> oracle.Outputs:
    """The outputs of the package under the names that the oracle gives them."""
    result = _with_tensors(FUNCTIONS[call.function], call, t, options)
    if call.function in ("npo", "simnpo", "logprob", "token"):
        value, stats = result
        assert not any(stat.requires_grad for stat in vars(stats).values())
        return {"value": value, **vars(stats)}
    if call.function == "sequences":
        return {"value": result[0], "num_tokens": result[1]}
    if call.function == "statistics":
        assert list(result) == list(call.which)
        values = [result[name] for name in call.which if name != "argmax"]
        dtype = torch.float64 if call.dtype == "float64" else torch.float32
        empty = torch.zeros(0, *call.shape, dtype=dtype)
        outputs = {"value": torch.stack(values) if values else empty}
        return outputs | ({"argmax": result["argmax"]} if "argmax" in result else {})
    return {"value": result}


def _evaluate(call: Call, tensors: dict[str, Tensor], run) -> oracle.Outputs:
    """The result of `run` for these tensors, and the requested gradients."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in call.wanted}
    outputs = run({**tensors, **leaves})
    value = outputs["value"]
    differentiable = call.function != "statistics" or set(call.which) - {"argmax"}
    assert value.requires_grad == bool(leaves and differentiable)
    found = {name: output.detach() for name, output in outputs.items()}
    if not value.requires_grad:
        return found
    grads = torch.autograd.grad(value, list(leaves.values()), _upstream(call, value))
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.shape == leaf.shape
        found[f"d{name}"] = grad
    return found


def _upstream(call: Call, value: Tensor) -> Tensor:
    """Of both signs and nowhere alike; for a scalar the factor alone."""
    if value.dim() == 0:
        return torch.full_like(value, call.upstream)
    g = torch.Generator().manual_seed(call.seed)
    weights = 0.3 + torch.rand(value.shape, generator=g, dtype=torch.float64)
    weights.view(-1)[::4] *= -0.3
    return (weights * call.upstream).to(value.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------


def _compare(call: Call, made: dict[str, Tensor], ours: oracle.Outputs, impl: str) -> None:
    wide = torch.float64 if call.dtype == "float64" else torch.float32
    single = torch.finfo(wide).eps / 2
    exact = {name: _as_used(call, t, torch.float64, name) for name, t in made.items()}
    truth = _evaluate(call, exact, lambda t: oracle.expected(call, t))
    near = [_nearby(call, exact, single, draw) for draw in range(3)]
    plain = {name: _as_used(call, t, wide, name) for name, t in made.items()}
    near.append(_evaluate(call, plain, lambda t: oracle.expected(call, t, _digits(call.working_dtype))))
    for name, value in ours.items():
        right = truth[name]
        assert value.shape == right.shape, f"{name}: {tuple(value.shape)} instead of {tuple(right.shape)}"
        if name == "argmax":
            _compare_columns(call, made, value, truth)
        elif not right.is_floating_point():
            assert value.dtype == right.dtype and torch.equal(value, right), f"{name}: {value}, expected {right}"
        else:
            expected_dtype = wide if not name.startswith("d") else getattr(torch, call.dtype)
            assert value.dtype == expected_dtype, f"{name}: {value.dtype} instead of {expected_dtype}"
            if "usual" in truth and name in ("log_ratio", "weight"):
                value = torch.where(truth["usual"], value, 0.0)
            rounding = call.working_dtype if name.startswith("d") else wide
            floor = 300 * single**2 if call.function in ("statistics", "kl") else 0  # of differences
            if name.startswith("d"):  # exponentials of up to 2^58 are stored, so their factors end at 2^-149
                floor += 2**-85 * float(exact["hidden"].nan_to_num().norm() + exact["weight"].norm())
            if impl == "reference":  # a plain log-softmax, whose probabilities are off by a unit of 1
                floor += 100 * single * (1 + float(right.nan_to_num().norm() + exact["weight"].norm()))
                floor += 100 * single * float(exact["hidden"].nan_to_num().norm())
            _assert_near(name, value, right, [other[name] for other in near], rounding, floor)


def _as_used(call: Call, t: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """As the products see it, in another dtype."""
    if not t.is_floating_point():
        return t
    if call.autocast and name.removeprefix("ref_") in ("hidden", "weight", "bias"):
        t = t.to(call.working_dtype)
    return t.to(dtype)


def _nearby(call: Call, exact: dict[str, Tensor], unit: float, draw: int) -> oracle.Outputs:
    """The truth of inputs a rounding unit away, the gradient of the logits rounded at random."""
    rounding = _noise(call.working_dtype, draw)
    return _evaluate(call, _moved(exact, unit, draw), lambda t: oracle.expected(call, t, rounding))


def _moved(tensors: dict[str, Tensor], unit: float, draw: int) -> dict[str, Tensor]:
    """Each number one rounding unit away, up or down."""
    g = torch.Generator().manual_seed(draw)

    def move(t: Tensor) -> Tensor:
        return t * (1 + unit * (2 * torch.randint(0, 2, t.shape, generator=g, dtype=t.dtype) - 1))

    return {name: move(t) if t.is_floating_point() and name != "weights" else t for name, t in tensors.items()}


def _digits(dtype: torch.dtype) -> oracle.Rounding:
    """Rounded to the precision of a dtype, without its limits of range."""

    def rounded(t: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(t)
        return torch.ldexp(mantissa.to(dtype).to(t.dtype), exponent)

    return rounded


def _noise(dtype: torch.dtype, draw: int) -> oracle.Rounding:
    """Each number up to half a unit of its last digit away."""
    g = torch.Generator().manual_seed(draw)
    return lambda t: t * (1 + torch.finfo(dtype).eps * (torch.rand(t.shape, generator=g, dtype=t.dtype) - 0.5))


def _assert_near(name: str, value: Tensor, truth: Tensor, near: list[Tensor], dtype: torch.dtype, floor: float) -> None:
    def size(t: Tensor) -> Tensor:
        t = t.double()
        return t.norm(dim=-1) if name.startswith("d") and t.dim() > 1 else t.abs()

    error = size(value.double() - truth)
    lost = torch.stack([size(other.double() - truth) for other in near]).amax(0)
    unit = 4 * max(FLOOR[torch.float32 if dtype != torch.float64 else dtype], CEILING[dtype])
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps * truth.shape[-1] ** 0.5 if truth.dim() else 0.0  # of each entry
    allowed = 4 * lost + unit * size(truth) + smallest + floor
    fits = size(truth) < info.max / 4  # what overflows is anybody's guess
    wrong = fits & ~(error <= allowed)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)}: error {float(error[at]):.3g}, allowed {float(allowed[at]):.3g} ({int(wrong.sum())} of "
            f"{wrong.numel()}); {value[at]} instead of {truth[at]}"
        )


def _compare_columns(call: Call, made: dict[str, Tensor], value: Tensor, truth: oracle.Outputs) -> None:
    """The first of the largest logits; any of them where they are a rounding error apart."""
    found = value.reshape(-1)[made["counted"]]
    z = truth["logits"]
    if z.shape[0]:
        largest = z.max(1).values
        assert ((found >= 0) & (found < call.V)).all(), f"argmax: {found}"
        gap = largest - z.gather(1, found[:, None])[:, 0]
        assert (gap <= 1e-5 * (1 + z.abs().amax(1))).all(), f"argmax: {found}, {gap} below the largest"
    rest = value.reshape(-1).index_fill(0, made["counted"], call.ignore_index)
    assert (rest == call.ignore_index).all(), f"argmax: {rest} where nothing is scored"


# ---------------------------------------------------------------------------------------------------------------------
# What a call has to leave alone
# ---------------------------------------------------------------------------------------------------------------------


def _bytes(t: Tensor) -> Tensor:
    """A copy of the whole storage: what lies beside a view counts as well."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


def _process_state() -> tuple:
    return (
        torch.get_rng_state().sum().item(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )
