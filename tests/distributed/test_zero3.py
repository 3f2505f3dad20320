"""The head under DeepSpeed ZeRO-3: the real thing on two ranks where it is installed, and a stand-in everywhere."""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")

from npo_kernels import fused_npo_loss
from npo_kernels.hf import add_fused_unlearning_head
from tests.hf.models import padded_batch, tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed; tests/hf/parity_versions.sh runs it"
)
def test_two_ranks_have_the_gradients_of_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.distributed.zero3"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0: ok" in done.stdout and "rank 1: ok" in done.stdout


class Partitioned:
    """ZeRO-3's way with one module: its weight is empty but between its own forward hooks, and in its backward."""

    def __init__(self, module: torch.nn.Module):
        self.parameters = list(module.parameters())
        self.full = [p.data for p in self.parameters]
        self.gathered = 0
        self.release()
        module.register_forward_pre_hook(lambda *_: self.gather())
        module.register_forward_hook(self.after_forward)

    def gather(self) -> None:
        self.gathered += 1
        for p, full in zip(self.parameters, self.full, strict=True):
            p.data = full

    def release(self) -> None:
        for p in self.parameters:
            p.data = p.data.new_empty(0)

    def after_forward(self, module, args, output):
        self.release()
        outputs = output if isinstance(output, tuple) else (output,)
        for t in outputs:
            if torch.is_tensor(t) and t.requires_grad:
                t.register_hook(lambda grad: self.gather())


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_a_head_that_exists_only_while_it_is_called(name, where):
    batch, ref_logps = padded_batch(), torch.tensor([-20.0, -30.0, -5.0])

    def loss_of(model):
        if where == "inside":
            npo = partial(fused_npo_loss, ref_logps=ref_logps, beta=0.3)
            return model(**batch, fused_unlearning=npo).loss
        logps = model(**batch, fused_unlearning=True).logps
        return (-(2 / 0.3) * torch.nn.functional.logsigmoid(-0.3 * (logps - ref_logps))).mean()

    expected, model = (add_fused_unlearning_head(tiny(name)) for _ in range(2))
    loss_of(expected).backward()
    partition = Partitioned(model.lm_head)
    with torch.no_grad():
        model(**batch, fused_unlearning=True)
    assert partition.gathered == 1
    loss = loss_of(model)
    assert model.lm_head.weight.numel() == 0
    loss.backward()
    assert partition.gathered == 3
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
