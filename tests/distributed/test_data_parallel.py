"""The losses inside a DDP or FSDP2 forward: two gloo ranks have the gradients of one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from npo_kernels import fused_npo_loss

WORLD, B, S, V, H = 2, 6, 8, 130, 16


class Model(nn.Module):
    """Embedding, one layer, head; the loss belongs to the forward, where wrappers see it."""

    def __init__(self, tied: bool):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens, ref_logps, normalizer):
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        return fused_npo_loss(hidden, self.lm_head.weight, tokens, ref_logps=ref_logps, normalizer=normalizer)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (B, S), generator=generator), torch.randn(B, generator=generator) - 30


def worker(rank: int, store: str, how: str, expected: dict, failures) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        model = Model(tied="tied" in how)
        if how.startswith("ddp"):
            wrapped = DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh("cpu", (WORLD,))
            fully_shard(model.layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        tokens, ref_logps = batch()
        # ragged: rank 0 has 4 sequences, rank 1 has 2; the wrappers average over ranks, hence the factor
        mine = slice(0, 4) if rank == 0 else slice(4, B)
        wrapped(tokens[mine], ref_logps[mine], B / WORLD).backward()
        for name, parameter in model.named_parameters():
            grad = parameter.grad.full_tensor() if how.startswith("fsdp2") else parameter.grad
            if not torch.allclose(grad, expected[name], rtol=1e-5, atol=1e-7):
                failures.append(f"rank {rank} {name}: {(grad - expected[name]).abs().max().item():.2e}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "ddp-tied", "fsdp2"])
def test_two_ranks_have_the_gradients_of_one_process(how, tmp_path):
    model = Model(tied="tied" in how)
    model(*batch(), B).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    with mp.Manager() as manager:
        failures = manager.list()
        mp.spawn(worker, ((tmp_path / "store").as_uri(), how, expected, failures), nprocs=WORLD)
        assert list(failures) == []
