"""A head spread over the ranks of a process group gives what the whole head gives, on every rank."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from npo_kernels import fused_logprob_loss, fused_npo_loss, sequence_logprobs, token_logprobs, token_statistics
from tests import support
from tests.support import Batch, make_batch, relative_error

V = 390  # more than three splits of the interpreter's tiles
SIZES = {"even": {2: (195, 195), 4: (98, 98, 98, 96)}, "uneven": {2: (128, 262), 4: (1, 128, 250, 11)}}


def a_batch(head="all", layout="padded", dtype=torch.float32) -> Batch:
    """With a row whose label is far below a competitor in the last shard: its rank alone raises the anchor."""
    batch = make_batch(dtype, head, layout, V=V)
    if head == "plain":
        row = batch.hidden.reshape(-1, batch.hidden.shape[-1])[4]
        row[0] = 8.0
        batch.weight[V - 1, 0], batch.weight[: V - 1, 0] = 12.0, -1.0
    return batch


def outside(batch: Batch, **options) -> torch.Tensor:
    """Both log-probability functions, their gradients formed in the backward."""
    tokens = batch(token_logprobs, **options)
    logps, _ = batch(sequence_logprobs, **options)
    return (tokens * support.upstream(tokens.shape).to(tokens.dtype)).sum() + logps.square().sum() * 1e-3


WAYS = {
    "slab": (support.npo, ("hidden", "weight", "bias"), None),
    "chunks": (support.npo, ("hidden", "weight", "bias"), 0.09),
    "slices": (support.npo, ("hidden", "weight", "bias"), support.TINY),
    "frozen": (support.npo, ("hidden",), None),
    "frozen, sliced": (support.npo, ("hidden",), support.TINY),
    "any loss": (support.user_loss, ("hidden", "weight", "bias"), None),
    "outside": (outside, ("hidden", "weight", "bias"), None),
    "statistics": (support.statistics, ("hidden", "weight", "bias"), None),
    "simnpo": (support.simnpo, ("hidden", "weight", "bias"), None),
}


def check(way: str, impl: str, batch: Batch, sizes, rank: int, as_dtensor: bool = False) -> None:
    """Loss and gradients on this rank against the whole head, where both are exact to rounding."""
    objective, needs, workspace_mb = WAYS[way]
    needs = [name for name in needs if name in batch.tensors]
    begin, end = sum(sizes[:rank]), sum(sizes[: rank + 1])
    options = {"impl": impl, "workspace_mb": workspace_mb}
    expected = support.evaluate(objective, batch, needs, dtype=torch.float64, impl="reference")
    mine = batch.leaves(needs)
    mesh = dist.init_device_mesh("cpu", (len(sizes),)) if as_dtensor else None
    for name in ("weight", "bias"):
        if name in mine.tensors:
            part = mine.tensors[name].detach()[begin:end].clone()
            if as_dtensor:
                part = distribute_tensor(mine.tensors[name].detach(), mesh, [Shard(0)])
            object.__setattr__(mine, name, part.requires_grad_(name in needs))
    group = mesh.get_group() if as_dtensor else dist.group.WORLD
    loss = objective(mine, process_group=group, **options)
    grads = dict(zip(needs, torch.autograd.grad(loss, [mine.tensors[name] for name in needs]), strict=True))
    assert relative_error(loss.detach(), expected["loss"]) < 2e-6, (way, "loss")
    if way == "statistics":  # on every rank the column of the whole head
        likeliest = mine(token_statistics, ["argmax"], process_group=group, **options)["argmax"]
        assert torch.equal(likeliest, batch(token_statistics, ["argmax"], impl="reference")["argmax"])
    for name, grad in grads.items():
        if as_dtensor and name != "hidden":
            assert grad.placements == (Shard(0),)
            grad = grad.to_local()
        truth = expected[name] if name == "hidden" else expected[name][begin:end]
        assert relative_error(grad, truth) < 3e-6, (way, name)


def run_all(rank: int, world: int) -> None:
    for layout, head in (("padded", "all"), ("packed", "plain")):
        batch = a_batch(head, layout)
        for way in WAYS:
            check(way, "torch", batch, SIZES["uneven" if way != "frozen" else "even"][world], rank)
            if world == 2 and head == "plain":
                check(way, "triton", batch, SIZES["uneven"][world], rank)
        check("slab", "torch", batch, SIZES["even"][world], rank, as_dtensor=True)
    # shards that begin at splits: the bits of the whole head
    if world == 2:
        batch = a_batch("bias")
        begin, end = ((0, 256), (256, V))[rank]
        whole, _ = batch(sequence_logprobs, impl="triton")
        logps, _ = sequence_logprobs(
            batch.hidden, batch.weight[begin:end], batch.labels, bias=batch.bias[begin:end], impl="triton",
            process_group=dist.group.WORLD,
        )  # fmt: skip
        assert torch.equal(logps, whole)
    refusals(rank, world)


def refusals(rank: int, world: int) -> None:
    batch = a_batch("plain")
    group = dist.group.WORLD
    mesh = dist.init_device_mesh("cpu", (world,))
    replicated = DTensor.from_local(batch.weight, mesh, [Replicate()], run_check=False)
    calls = {
        "lm_head_weight is a DTensor .* split along the vocabulary": {"weight": replicated, "process_group": group},
        "lm_head_weight is a DTensor: .* process_group=lm_head_weight.device_mesh": {"weight": replicated},
        "impl='reference' takes the whole head": {
            "weight": batch.weight, "process_group": group, "impl": "reference"
        },
    }  # fmt: skip
    for message, options in calls.items():
        weight = options.pop("weight")
        with pytest.raises((ValueError, TypeError), match=message):
            sequence_logprobs(batch.hidden, weight, batch.labels, **options)
    bad = batch.labels.clone()
    bad[0, 4] = V * world
    for function, options in ((fused_npo_loss, {"ref_logps": batch.ref_logps}), (sequence_logprobs, {})):
        with pytest.raises(ValueError, match=f"outside \\[0, {V * world}\\)"):
            function(batch.hidden, batch.weight, bad, process_group=group, **options)
    with pytest.raises(ValueError, match="loss_fn: expected"):
        fused_logprob_loss(
            batch.hidden.requires_grad_(), batch.weight, batch.labels, lambda logps, counts: logps, process_group=group
        )


def worker(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        run_all(rank, world)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_shared_head_gives_what_the_whole_head_gives(world, tmp_path):
    mp.spawn(worker, (world, (tmp_path / "store").as_uri()), nprocs=world)
