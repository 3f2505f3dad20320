"""Calls made from the signatures: every argument of every public function, with every kind of value it cannot have.

Each is refused with an error of ours that names the argument and is short, never by something deep inside.
"""

import inspect
import math
import re

import pytest
import torch

from npo_kernels import (
    explain,
    fused_linear_kl,
    fused_logprob_loss,
    fused_npo_loss,
    fused_simnpo_loss,
    fused_token_loss,
    sequence_logprobs,
    token_logprobs,
)
from npo_kernels.call import arguments

B, S, H, V = 2, 5, 8, 20
GOOD = {
    "hidden": torch.zeros(B, S, H),
    "lm_head_weight": torch.zeros(V, H),
    "labels": torch.ones(B, S, dtype=torch.int64),
    "ref_logps": torch.zeros(B),
    "loss_fn": lambda logps, *counts: logps.sum(),
    "ref_hidden": torch.zeros(B, S, H),
    "ref_lm_head_weight": torch.zeros(V, H),
}
PUBLIC = (
    fused_npo_loss, fused_simnpo_loss, fused_logprob_loss, fused_token_loss, sequence_logprobs, token_logprobs,
    fused_linear_kl,
)  # fmt: skip

TENSOR, META = torch.zeros(3, 3), torch.zeros(3, 3, device="meta")
WRONG_FOR_TENSORS = [
    "text", 1.5, True, [[0.0] * 100] * 100, {"a": 1}, lambda: 0, META, TENSOR.to_sparse(), TENSOR.to_sparse_csr(),
    torch.quantize_per_tensor(TENSOR, 0.1, 0, torch.qint8), TENSOR.to(torch.complex64),
    torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
]  # fmt: skip
WRONG_FOR_NUMBERS = ["0.1", True, [1], TENSOR, torch.tensor(1.0), math.nan, math.inf, 10**400, 1j, lambda: 0]
WRONG = {
    "shift": ["no", 2, 0, TENSOR, torch.tensor(True), [True], None],
    "return_stats": ["yes", 1, TENSOR, None],
    "ignore_index": ["-100", -100.0, True, 2**70, -(2**63) - 1, TENSOR, None],
    "num_rows": ["8", 8.0, True, -1, 2**70, TENSOR, [8]],
    "reduction": ["average", 1, TENSOR, ["mean"], None],
    "impl": ["cuda", 1, TENSOR, ["auto"], None],
    "process_group": ["tp", 0, TENSOR, object()],
    "loss_fn": ["npo", None, 1, TENSOR, lambda: 0, lambda a: a, lambda a, b, c, d: a],
    "beta": [*WRONG_FOR_NUMBERS, 0, -1.0, None],
    "gamma": [*WRONG_FOR_NUMBERS, None],
    "target_shift": [*WRONG_FOR_NUMBERS, 1e39, None],
    "direction": ["backward", 1, TENSOR, ["forward"], None],
    "logit_scale": [*WRONG_FOR_NUMBERS, 0, None],
    "softcap": [*WRONG_FOR_NUMBERS, 0, -30],
    "workspace_mb": [*WRONG_FOR_NUMBERS, 0, -1],
    "normalizer": ["3", True, [1], TENSOR, math.nan, math.inf, 1j, 0, -1, torch.tensor(-2.0), torch.tensor(math.nan),
                   torch.tensor(True), torch.tensor(1j), torch.ones((), device="meta")],
    "weights": [*WRONG_FOR_TENSORS, *(torch.tensor([1.0] * (B - 1) + [x]) for x in (-1.0, math.nan, math.inf))],
}  # fmt: skip


def arguments_of(function) -> dict:
    return {name: GOOD[name] for name in inspect.signature(function).parameters if name in GOOD}


def wrong_values(function, name: str) -> list:
    if name in WRONG:
        return WRONG[name]
    optional = inspect.signature(function).parameters[name].default is None
    return WRONG_FOR_TENSORS if optional else [*WRONG_FOR_TENSORS, None]


CASES = [(function, name) for function in PUBLIC for name in inspect.signature(function).parameters]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("function", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_no_wrong_value_passes_and_each_is_named(function, name, impl):
    for value in wrong_values(function, name):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**{**arguments_of(function), "impl": impl, name: value})
        message = str(caught.value)
        assert re.search(rf"\b{name}\b", message), message
        assert len(message) < 420, message
        where = caught.traceback[-1].path
        assert where.name in ("arguments.py", "checks.py", "value_checks.py"), (message, where)


def test_a_function_with_an_argument_that_has_no_rule_is_not_made():
    def fused_new_loss(hidden, temperature):
        return hidden

    with pytest.raises(NotImplementedError, match=r"fused_new_loss: no rule .* for \['temperature'\]"):
        arguments.checked(fused_new_loss)


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_the_signature_is_that_of_the_function(function):
    assert "hidden" in inspect.signature(function).parameters
    function(**arguments_of(function))
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'betta'"):
        function(**arguments_of(function), betta=0.1)


def test_explain_takes_the_arguments_of_its_function_and_nothing_else():
    given = {name: GOOD[name] for name in ("hidden", "lm_head_weight", "labels")}
    assert explain(fused_npo_loss, **given).mode == "no_grad"
    assert explain(fused_npo_loss, *given.values(), ref_logps=GOOD["ref_logps"], beta=0.2).mode == "no_grad"
    assert explain(fused_logprob_loss, *given.values(), GOOD["loss_fn"]).mode == "no_grad"
    with pytest.raises(ValueError, match=r"function: expected one of fused_npo_loss, .*, got print"):
        explain(print, **given)
    with pytest.raises(ValueError, match=r"function: expected one of .*, got str 'fused_npo_loss'"):
        explain("fused_npo_loss", **given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        explain(fused_npo_loss, **given, gamma=0.1)
    with pytest.raises(ValueError, match="workspace_mb: expected a positive number"):
        explain(fused_npo_loss, **given, workspace_mb=-1)
    with pytest.raises(TypeError, match="needs the argument 'labels' of sequence_logprobs"):
        explain(sequence_logprobs, GOOD["hidden"], GOOD["lm_head_weight"])
