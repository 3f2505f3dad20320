"""The choice of the implementation, and autocast."""

import pytest
import torch

from npo_kernels import fused_logprob_loss, fused_npo_loss, sequence_logprobs, token_logprobs
from npo_kernels.backends import choose
from npo_kernels.backends.choose import resolve_impl
from tests.support import IMPLS, evaluate, make_batch, mixed_loss, npo, relative_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@pytest.mark.parametrize(
    ("installed", "device", "expected"),
    [(True, CUDA, "triton"), (True, CPU, "torch"), (False, CUDA, "torch"), (False, CPU, "torch")],
)
def test_auto_is_triton_on_a_gpu_that_has_it(monkeypatch, installed, device, expected):
    monkeypatch.setattr(choose, "HAS_TRITON", installed)
    assert resolve_impl("auto", device) == expected


def test_a_name_asked_for_never_falls_back(monkeypatch):
    for name in ("torch", "reference"):
        assert resolve_impl(name, CUDA) == name
    monkeypatch.setattr(pytest.importorskip("npo_kernels.backends.triton.launch"), "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"impl='triton' runs on a GPU, got tensors on cpu.*TRITON_INTERPRET=1"):
        resolve_impl("triton", CPU)
    monkeypatch.setattr(choose, "HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"impl='triton' but Triton is not installed.*impl='torch'"):
        resolve_impl("triton", CUDA)


def test_auto_runs_the_torch_path_here():
    batch = make_batch()
    assert torch.equal(npo(batch), npo(batch, impl="torch"))


AUTOCAST_LOSSES = {
    "fused_npo_loss": npo,
    "fused_logprob_loss": lambda batch, **options: batch(fused_logprob_loss, mixed_loss, **options),
    "sequence_logprobs": lambda batch, **options: batch(sequence_logprobs, **options)[0].square().sum(),
    "token_logprobs": lambda batch, **options: batch(token_logprobs, **options).square().sum(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", AUTOCAST_LOSSES)
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_autocast_is_a_cast_of_the_inputs_and_of_nothing_else(impl, name, dtype):
    """The gradients are those of the cast inputs, in the dtype of the parameters."""
    objective, needs = AUTOCAST_LOSSES[name], ("hidden", "weight", "bias")
    batch = make_batch(head="bias", lengths=(5, 0, 7), prompts=(1, 0, 0))
    with torch.autocast("cpu", dtype):
        automatic = evaluate(objective, batch, needs, impl=impl)
    by_hand = evaluate(objective, batch, needs, impl=impl, dtype=dtype)
    assert automatic["loss"].dtype == torch.float32
    for part in needs:
        assert automatic[part].dtype == torch.float32
        # impl="reference" runs its backward inside autocast as well, which may round once more
        assert relative_error(automatic[part], by_hand[part]) <= (0 if impl != "reference" else 2**-8), part
    assert torch.equal(automatic["loss"], by_hand["loss"])


def test_autocast_leaves_float64_to_the_reference():
    batch = make_batch().leaves(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert batch(sequence_logprobs, impl="reference")[0].dtype == torch.float64
        with pytest.raises(TypeError, match="float64 is for impl='reference'"):
            batch(sequence_logprobs, impl="torch")


def test_a_keyword_of_another_loss_is_unknown():
    with pytest.raises(TypeError, match="fused_npo_loss"):
        make_batch()(fused_npo_loss, ref_logps=torch.zeros(5), gamma=1.0)
