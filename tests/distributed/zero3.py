"""One rank of the DeepSpeed ZeRO-3 test: gradients, log-probabilities and a step, against one process.

    python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.zero3

Every parameter is partitioned (no persistence threshold), so the head's weight exists only while the head is called,
forward and backward. Prints "rank r: ok" or raises.
"""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from tests.distributed.wrapped import LOSSES, RANKS, WORLD, B, build, part

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def gradients_agree(architecture: str, loss: str) -> None:
    expected = build(architecture)
    LOSSES[loss](expected, slice(0, B), 1.0).backward()

    model = build(architecture)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    head = model.get_output_embeddings()
    assert head.weight.numel() == 0, "the head is not partitioned"
    with torch.no_grad():  # evaluation has its own path
        batch, _ = part(RANKS[dist.get_rank()])
        torch.testing.assert_close(
            engine(**batch, fused_unlearning=True).logps, build(architecture)(**batch, fused_unlearning=True).logps
        )
    engine.backward(LOSSES[loss](engine, RANKS[dist.get_rank()], 1 / WORLD))
    assert head.weight.numel() == 0, "the head stayed gathered"
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        grad = safe_get_full_grad(p)
        torch.testing.assert_close(grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    engine.step()


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for case in (("llama", "npo"), ("llama", "npo-outside"), ("phi", "retain"), ("llama-tied", "npo")):
        gradients_agree(*case)
    print(f"rank {dist.get_rank()}: ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
