"""Kernels are launched on the device of the tensors, whichever is current."""

import pytest
import torch

from npo_kernels import fused_linear_kl
from tests import support
from tests.support import make_batch

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")


def kl(reduction):
    def objective(batch, **options):
        reference = batch.hidden.detach().flip(0), batch.weight.detach()
        return fused_linear_kl(batch.hidden, batch.weight, *reference, reduction=reduction, **options).sum()

    return objective


OBJECTIVES = {
    "npo": support.npo,
    "user loss": support.user_loss,
    "outside": support.sequences,
    "KL": kl("mean"),
    "KL, none": kl("none"),
}


@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")], ids=support.name_of)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_launch_is_on_the_device_of_the_tensors(monkeypatch, name, needs):
    current, launches = [], []

    class DeviceOf:
        def __init__(self, tensor):
            self.device = tensor.device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    launch = interpreter.GridExecutor.__call__

    def spy(self, *args, **kwargs):
        devices = {t.device for t in args if isinstance(t, torch.Tensor)}
        launches.append(devices == set(current[-1:]))
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", spy)
    support.evaluate(OBJECTIVES[name], make_batch(), needs, impl="triton")
    assert launches and all(launches) and not current
