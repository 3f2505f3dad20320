"""Illegal calls, made from the signatures: each gives an error of ours, short, that names the argument.

None returns a number, crashes, changes an argument or reports from deep inside.
"""

import functools
import inspect
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import npo_kernels
from npo_kernels import explain, fused_linear_kl, fused_npo_loss, set_debug
from npo_kernels.call import arguments
from tests import illegal
from tests.illegal import FUNCTIONS, OPTIONAL, REQUIRED, B, H, S, V, good_arguments

PACKAGE = Path(npo_kernels.__file__).parent
# where an error may come from: the checks, and what runs in the public function before anything is computed
OF_CHECKS = (
    "call/rules.py",
    "call/arguments.py",
    "call/checks.py",
    "call/prepare.py",
    "core/value_checks.py",
    "explain.py",
)
IMPLS = ("torch", "triton", "reference")
LONGEST = 400  # characters

pytestmark = pytest.mark.filterwarnings("ignore")


def refused(function, given: dict, name: str, also: tuple[str, ...] = ()) -> str | None:
    """What is wrong with how a call is refused; None if nothing is. `also`: files that its error may come from."""
    versions = {n: value._version for n, value in given.items() if type(value) is Tensor and not value.is_inference()}
    try:
        result = function(**given)
    except (TypeError, ValueError) as error:
        message, traceback = str(error), error.__traceback__
    except BaseException as error:
        return f"{type(error).__name__} from deep inside: {str(error)[:200]}"
    else:
        return f"returned {result!r}"[:100]
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    where = traceback.tb_frame.f_code.co_filename
    if not any(where == str(PACKAGE / file) for file in (*OF_CHECKS, *also)):
        return f"from {where}: {message[:200]}"
    if not re.search(rf"\b{name}\b", message):
        return f"does not name {name}: {message[:200]}"
    if len(message) > LONGEST or "\n" in message:
        return f"{len(message)} characters: {message[:200]}"
    if any(given[n]._version != version for n, version in versions.items()):
        return "changed an argument"
    return None


def bases(function, name: str, impl: str) -> list[dict]:
    """The good calls that a wrong value is put into."""
    parameters = inspect.signature(function).parameters
    padded, packed = {"impl": impl}, {"impl": impl}
    if "cu_seqlens" not in parameters:
        return [padded | good_arguments(function) | ({"target_shift": 1.0} if name == "labels" else {})]
    padded |= good_arguments(function)
    packed |= good_arguments(function, without_padding=True)
    return [packed] if name == "cu_seqlens" else [padded]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_wrong_value_of_every_argument_is_refused(name, impl, tried):
    function, wrong, number = FUNCTIONS[name], [], 0
    for argument, parameter in inspect.signature(function).parameters.items():
        also = ("core/plan.py",) if argument == "workspace_mb" else ()
        for what, value in illegal.wrong_values(argument, parameter):
            for base in bases(function, argument, impl):
                fault = refused(function, {**base, argument: value}, argument, also)
                number += 1
                if fault is not None:
                    wrong.append(f"{argument} = {what}: {fault}")
    assert not wrong, f"{len(wrong)} of {number}:\n" + "\n".join(wrong)
    assert number > 300
    tried("illegal calls", number)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "fused_linear_kl"])
def test_explain_refuses_the_same(name, tried):
    """But for values, and for what does not bear on the plan."""
    function, wrong, number = FUNCTIONS[name], [], 0
    parameters = inspect.signature(function).parameters
    for argument, parameter in parameters.items():
        left_out = {"ref_logps", "weights", "normalizer", "loss_fn"} & {argument}
        also = ("core/plan.py",) if argument == "workspace_mb" else ()
        for what, value in illegal.wrong_values(argument, parameter):
            if (left_out and isinstance(value, Tensor)) or (argument == "loss_fn" and callable(value)):
                continue
            call = functools.partial(explain, function)
            fault = refused(call, {**bases(function, argument, "torch")[0], argument: value}, argument, also)
            number += 1
            if fault is not None:
                wrong.append(f"{argument} = {what}: {fault}")
    assert not wrong, f"{len(wrong)} of {number}:\n" + "\n".join(wrong)
    tried("illegal calls", number)


def test_a_parameter_whose_kind_is_unknown_fails():
    def fused_new_loss(hidden: Tensor, table: dict, mystery: Tensor): ...

    for name, parameter in list(inspect.signature(fused_new_loss).parameters.items())[1:]:
        with pytest.raises(NotImplementedError, match=name):
            list(illegal.wrong_values(name, parameter))
    with pytest.raises(NotImplementedError, match=r"fused_new_loss: no rule .* for \['table', 'mystery'\]"):
        arguments.checked(fused_new_loss)


# ---------------------------------------------------------------------------------------------------------------------
# What is legal: the tests above spoil these calls
# ---------------------------------------------------------------------------------------------------------------------


class Renamed(torch.Tensor):
    """A subclass that leaves the operations alone."""


class Marked(torch.nn.Parameter):
    """The same of a parameter, as quantisers mark what they keep in floats."""


def in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


SAME = {
    "itself": lambda t: t,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "buffer": torch.nn.Buffer,
    "subclass": lambda t: t.as_subclass(Renamed),
    "subclass of a parameter": lambda t: torch.Tensor._make_subclass(Marked, t, False),
    "negative bit": lambda t: torch._neg_view(-t),
    "strided": lambda t: torch.stack((t, t), -1)[..., 0],
    "made in inference mode": in_inference_mode,
}
SAME_FOR = {
    "labels": {"parameter": None, "subclass of a parameter": None},
    "cu_seqlens": {"int64": Tensor.long},
    "ref_logps": {"double": Tensor.double},
    "weights": {"double": Tensor.double, "half": Tensor.half},
    "normalizer": {"int": Tensor.int, "number": Tensor.item, "int number": lambda t: int(t)},
}
SAME_NUMBERS = {"beta": (np.float64(0.5), 0.5), "logit_scale": (2, 2.0), "softcap": (30, 30.0)}


def flat(result) -> list[Tensor]:
    if isinstance(result, dict):
        return [*result.values()]
    return list(result) if isinstance(result, tuple) else [result]


# kernels in the interpreter are slow, and one function shows that they read what they are given
PASSES = [(name, impl) for name in FUNCTIONS for impl in IMPLS if impl != "triton" or name == "fused_npo_loss"]


@pytest.mark.parametrize(("name", "impl"), PASSES)
def test_what_passes_gives_the_same_number(name, impl):
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    for argument, parameter in parameters.items():
        (base,) = bases(function, argument, impl)
        if argument in SAME_NUMBERS:
            value, same = SAME_NUMBERS[argument]
            assert all(map(torch.equal, flat(function(**base, **{argument: value})),
                           flat(function(**base, **{argument: same}))))  # fmt: skip
        if Tensor not in illegal.kinds_of(parameter):
            continue
        good = base.get(argument, OPTIONAL.get(argument))
        expected = flat(function(**{**base, argument: good}))
        assert all(part.isfinite().all() for part in expected)
        for what, make in {**SAME, **SAME_FOR.get(argument, {})}.items():
            if make is None or (what in ("negative bit", "parameter") and not good.is_floating_point()):
                continue
            got = flat(function(**{**base, argument: make(good)}))
            assert all(torch.equal(a, torch.Tensor(b) if type(b) is Renamed else b) for a, b in
                       zip(expected, got, strict=True)), (argument, what)  # fmt: skip


def test_a_call_of_fake_tensors_alone_gives_a_fake_loss():
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(REQUIRED[name]) for name in ("hidden", "lm_head_weight", "labels", "ref_logps")}
        assert type(fused_npo_loss(**fakes)).__name__ == "FakeTensor"
        assert type(fused_npo_loss(**fakes, impl="reference")).__name__ == "FakeTensor"
        fakes["hidden"].requires_grad_()
        del fakes["ref_logps"]
        loss = npo_kernels.fused_logprob_loss(**fakes, loss_fn=REQUIRED["loss_fn"], num_rows=8)
        assert type(loss).__name__ == "FakeTensor" and loss.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Arguments that contradict each other
# ---------------------------------------------------------------------------------------------------------------------

ONES = torch.ones(B, S, dtype=torch.int64)
# (which functions, of the batch "padded" or "packed", change, the argument that is named)
CONTRADICTIONS = {
    "labels of another S": ("padded", {"labels": ONES[:, 1:]}, "labels"),
    "labels of another B": ("padded", {"labels": ONES[:1]}, "labels"),
    "packed labels of a padded batch": ("padded", {"labels": ONES.flatten()}, "labels"),
    "padded labels of a packed batch": ("packed", {"labels": ONES}, "labels"),
    "cu_seqlens of a padded batch": ("padded", {"cu_seqlens": OPTIONAL["cu_seqlens"]}, "cu_seqlens"),
    "no cu_seqlens of a packed batch": ("packed", {"cu_seqlens": None}, "cu_seqlens"),
    "a batch of one, packed": (
        "packed", {"hidden": torch.zeros(1, B * S, H), "labels": ONES.view(1, -1)}, "cu_seqlens"),
    "cu_seqlens that is a mask": ("packed", {"cu_seqlens": torch.ones(B, S).int()}, "cu_seqlens"),
    "another H": ("padded", {"hidden": torch.zeros(B, S, H + 1)}, "hidden"),
    "a transposed head": ("padded", {"lm_head_weight": torch.zeros(H, V)}, "lm_head_weight"),
    "no vocabulary": ("padded", {"lm_head_weight": torch.zeros(0, H)}, "lm_head_weight"),
    "no hidden size": ("padded", {"hidden": torch.zeros(B, S, 0), "lm_head_weight": torch.zeros(V, 0)},
                       "lm_head_weight"),
    "bfloat16 hidden of a float32 head": ("padded", {"hidden": torch.zeros(B, S, H).bfloat16()}, "hidden"),
    "a float16 head": ("padded", {"lm_head_weight": torch.zeros(V, H).half()}, "lm_head_weight"),
    "a head of bytes": ("padded", {"lm_head_weight": torch.zeros(V, H, dtype=torch.uint8)}, "lm_head_weight"),
    "a bias of another dtype": ("padded", {"bias": torch.zeros(V).half()}, "bias"),
    "a bias of another size": ("padded", {"bias": torch.zeros(V - 1)}, "bias"),
    "a bias of rank 2": ("padded", {"bias": torch.zeros(1, V)}, "bias"),
    "a smaller vocabulary than the labels": (
        "padded", {"lm_head_weight": torch.zeros(2, H), "labels": 3 * ONES}, "labels"),
    "too few rows": ("padded", {"num_rows": 7, "labels": ONES}, "num_rows"),
    "too few rows of a packed batch": ("packed", {"num_rows": 2}, "num_rows"),
    "an ignored index that is no label": ("padded", {"ignore_index": -1, "labels": -100 * ONES}, "labels"),
    "a workspace of nothing": ("padded", {"workspace_mb": 2e-6}, "workspace_mb"),
    "an attention mask": ("packed", {"attention_mask": ONES}, "attention_mask"),
}  # fmt: skip
OF_LOSSES = {
    "one reference for all": ("padded", {"ref_logps": torch.zeros(1)}, "ref_logps"),
    "a reference for each token": ("padded", {"ref_logps": torch.zeros(B, S)}, "ref_logps"),
    "a reference more": ("packed", {"ref_logps": torch.zeros(B + 1)}, "ref_logps"),
    "weights of each token": ("padded", {"weights": torch.ones(B, S)}, "weights"),
    "a weight for all": ("packed", {"weights": torch.ones(1)}, "weights"),
    "a normalizer of a sum": ("padded", {"normalizer": 2.0, "reduction": "sum"}, "normalizer"),
    "a normalizer of nothing": ("padded", {"normalizer": 2.0, "reduction": "none"}, "normalizer"),
}
OF_KL = {
    "two vocabularies": ({"ref_lm_head_weight": torch.zeros(V + 1, H)}, "ref_lm_head_weight"),
    "other positions": ({"ref_hidden": torch.zeros(B, S + 1, H)}, "ref_hidden"),
    "packed positions": ({"ref_hidden": torch.zeros(B * S, H)}, "ref_hidden"),
    "another H of the reference": ({"ref_hidden": torch.zeros(B, S, H + 2)}, "ref_hidden"),
    "a mask of other positions": ({"mask": torch.ones(B, S + 1, dtype=torch.bool)}, "mask"),
    "a mask of floats": ({"mask": torch.ones(B, S)}, "mask"),
    "a mask of sequences": ({"mask": torch.ones(B, dtype=torch.bool)}, "mask"),
    "labels of other positions": ({"labels": ONES[:, 1:], "target_shift": 1.0}, "labels"),
    "a target shift without labels": ({"target_shift": 1.0}, "target_shift"),
    "an ignored label that counts": ({"labels": -100 * ONES, "target_shift": 1.0}, "labels"),
    "two dtypes": ({"ref_hidden": torch.zeros(B, S, H).half()}, "ref_hidden"),
    "a bias of the other model": ({"ref_bias": torch.zeros(V + 1)}, "ref_bias"),
    "an empty reference": ({"ref_lm_head_weight": torch.zeros(0, H)}, "ref_lm_head_weight"),
}


@pytest.mark.parametrize("impl", IMPLS)
def test_arguments_that_contradict_each_other(impl, tried):
    wrong, number = [], 0
    for name, function in FUNCTIONS.items():
        parameters = inspect.signature(function).parameters
        if name == "fused_linear_kl":
            cases = {what: ("padded", *case) for what, case in OF_KL.items()}
        else:
            cases = CONTRADICTIONS | (OF_LOSSES if "reduction" in parameters else {})
        for what, (layout, change, argument) in cases.items():
            if what.startswith("a workspace") and impl == "reference":  # which keeps all logits
                continue
            if any(key not in parameters for key in change) and argument in change and argument not in OF_ANOTHER:
                continue
            given = {**good_arguments(function, without_padding=layout == "packed"), **change, "impl": impl}
            if argument == "workspace_mb":
                given["hidden"] = given["hidden"].clone().requires_grad_()
            fault = refused(function, given, argument, ("core/plan.py",) if argument == "workspace_mb" else ())
            number += 1
            if fault is not None:
                wrong.append(f"{name}, {what}: {fault}")
    assert not wrong, f"{len(wrong)} of {number}:\n" + "\n".join(wrong)
    tried("illegal calls", number)


OF_ANOTHER = ("attention_mask",)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensors_made_in_inference_mode_pass_or_are_named(name, impl):
    """Operators keep any tensor for their backward; of the reference autograd does, which refuses some."""
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    for reduction in ("mean", "none") if "reduction" in parameters else (None,):
        for argument, parameter in parameters.items():
            if Tensor not in illegal.kinds_of(parameter) or (argument == "normalizer" and reduction == "none"):
                continue
            (given,) = bases(function, argument, impl)
            trained = "hidden" if argument != "hidden" else "lm_head_weight"
            given[trained] = given[trained].clone().requires_grad_()
            given[argument] = given.get(argument, OPTIONAL.get(argument))
            if reduction is not None:
                given["reduction"] = reduction
            sum(part.sum() for part in flat(function(**given)) if part.requires_grad).backward()
            expected, given[trained].grad = given[trained].grad, None
            given[argument] = in_inference_mode(given[argument])
            try:
                sum(part.sum() for part in flat(function(**given)) if part.requires_grad).backward()
            except ValueError as error:
                assert impl == "reference"
                assert re.match(rf"{argument}: expected a tensor that autograd can keep .*inference_mode", str(error))
            else:
                assert torch.equal(given[trained].grad, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Names and positions
# ---------------------------------------------------------------------------------------------------------------------


def message_of(call, kind=TypeError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert len(str(caught.value)) < LONGEST
    return str(caught.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unknown_missing_and_too_many_arguments(name, tried):
    function = FUNCTIONS[name]
    good = good_arguments(function)
    parameters = inspect.signature(function).parameters
    number = 0
    for argument in parameters:
        misspelt = argument[:-1] + "_" + argument[-1]
        message = message_of(lambda m=misspelt: function(**good, **{m: 1}))
        assert f"{name}() got an unexpected keyword argument '{misspelt}'" in message
        assert f"did you mean '{argument}'" in message, message
        number += 1
    for argument in good:
        rest = {key: value for key, value in good.items() if key != argument}
        assert argument in message_of(lambda rest=rest: function(**rest))
        number += 1
    assert "zzz" in message_of(lambda: function(**good, zzz=1))
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for i, parameter in enumerate(positional):
        first, again = [good[p.name] for p in positional[: i + 1]], {parameter.name: good[parameter.name]}
        message = message_of(lambda first=first, again=again: function(*first, **again))
        assert f"{name}() got '{parameter.name}' twice" in message
        number += 1
    message = message_of(lambda: function(*([REQUIRED["hidden"]] * (len(positional) + 1))))
    assert f"{name}() takes {len(positional)} positional arguments" in message and positional[0].name in message
    for elsewhere, hint in {"attention_mask": "mask", "temperature": "logit_scale", "shift_labels": "labels"}.items():
        assert hint in message_of(lambda e=elsewhere: function(**good, **{e: 1})).split(elsewhere)[1]
    tried("illegal calls", number + 5)


def test_set_debug_takes_a_bool(tried):
    cases = dict(illegal.no_flag("enabled"))
    for value in cases.values():
        assert "enabled" in message_of(lambda value=value: set_debug(value))
    assert "enabled" in message_of(lambda: set_debug())
    assert not npo_kernels.core.value_checks._debug
    tried("illegal calls", len(cases))


def test_explain_names_what_it_cannot_explain(tried):
    good = good_arguments(fused_npo_loss)
    assert explain(fused_npo_loss, **good).mode == explain(fused_npo_loss, *[*good.values()][:3]).mode == "no_grad"
    wrong = [value for _, value in illegal.no_number("function")]
    for value in (*wrong, None, print, fused_linear_kl, functools.partial(print), lambda: 0):
        assert "function: expected one of fused_npo_loss" in message_of(lambda v=value: explain(v, **good), ValueError)
    assert "function" in message_of(lambda: explain())
    assert "impl='reference' has no plan" in message_of(
        lambda: explain(fused_npo_loss, **good, impl="reference"), ValueError
    )
    for name in ("hidden", "lm_head_weight", "labels"):
        rest = {key: value for key, value in good.items() if key != name}
        assert f"needs the argument '{name}'" in message_of(lambda rest=rest: explain(fused_npo_loss, **rest))
        twice = functools.partial(fused_npo_loss, REQUIRED["hidden"], REQUIRED["lm_head_weight"], REQUIRED["labels"])
        assert name in message_of(lambda t=twice, n=name: explain(t, **{n: REQUIRED[n]}))
    assert "did you mean 'beta'" in message_of(lambda: explain(fused_npo_loss, **good, betta=0.1))
    tried("illegal calls", len(wrong) + 14)


# ---------------------------------------------------------------------------------------------------------------------
# The function of a loss, and the modes a call can be in
# ---------------------------------------------------------------------------------------------------------------------

OTHER = torch.ones((), requires_grad=True)
BAD_RESULTS = {
    "nothing": lambda x: None, "a number": lambda x: 1.0, "a pair": lambda x: (x.sum(), x), "a list": lambda x: [x],
    "a vector": lambda x: x, "one element": lambda x: x.sum()[None], "an int tensor": lambda x: x.sum().long(),
    "a bool": lambda x: x.sum() > 0, "complex": lambda x: x.sum().to(torch.complex64), "a class": lambda x: Tensor,
    "on meta": lambda x: x.sum().to("meta"), "an array": lambda x: x.detach().numpy().sum(),
}  # fmt: skip


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", ["fused_logprob_loss", "fused_token_loss"])
@pytest.mark.parametrize("trains", [False, True])
def test_what_a_loss_fn_must_not_return(name, impl, trains, tried):
    function, wrong = FUNCTIONS[name], {}
    results = BAD_RESULTS | ({"of another tensor": lambda x: x.sum() * OTHER} if trains and impl != "reference" else {})
    for what, make in results.items():
        given = good_arguments(function) | {"impl": impl, "loss_fn": lambda x, *rest, make=make: make(x)}
        given["hidden"] = given["hidden"].clone().requires_grad_(trains)
        fault = refused(function, given, "loss_fn", ("ops/token_loss.py",))
        if fault is not None:
            wrong[what] = fault
    assert not wrong, wrong
    tried("illegal calls", len(results))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inside_inference_mode_and_under_an_autocast_that_torch_disables(name):
    function = FUNCTIONS[name]
    good = good_arguments(function)
    good["hidden"] = good["hidden"].clone().requires_grad_()
    expected = flat(function(**good))
    with torch.inference_mode():
        assert all(
            torch.equal(a, b) and not b.requires_grad for a, b in zip(expected, flat(function(**good)), strict=True)
        )
    with warnings.catch_warnings(record=True), torch.autocast("cpu", dtype=torch.float64):  # with a warning of torch
        assert all(map(torch.equal, expected, flat(function(**good))))
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float64)
    torch.set_autocast_enabled("cpu", True)
    try:
        assert refused(function, good, "hidden") is None
    finally:
        torch.set_autocast_dtype("cpu", before)
        torch.set_autocast_enabled("cpu", False)


def test_a_head_of_dtensors_and_a_process_group_say_what_to_do(tried):
    """On one rank, where a head that is split over ranks is a whole one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    whole = illegal.distributed_tensor(REQUIRED["lm_head_weight"])
    mesh = init_device_mesh("cpu", (1,))
    group, also = mesh.get_group(), ("core/vocab_parallel.py",)
    split = DTensor.from_local(REQUIRED["lm_head_weight"], mesh, [Shard(0)], run_check=False)
    good = good_arguments(fused_npo_loss) | {"process_group": group}
    assert math.isclose(fused_npo_loss(**good | {"lm_head_weight": split}), fused_npo_loss(**good))
    cases = {
        "lm_head_weight": (whole, split.T.contiguous()),
        "bias": (illegal.distributed_tensor(OPTIONAL["bias"]),),
        "impl": ("reference",),
        "hidden": (illegal.distributed_tensor(REQUIRED["hidden"]),),
        "labels": (illegal.distributed_tensor(REQUIRED["labels"]),),
    }
    for name, values in cases.items():
        for value in values:
            assert refused(fused_npo_loss, {**good, name: value}, name, also) is None
    tried("illegal calls", sum(map(len, cases.values())))
