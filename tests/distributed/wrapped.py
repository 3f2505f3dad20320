"""The ranks of `test_wrapped_models`: a Hugging Face model in every wrapper, against gradients of one process.

Six sequences; rank 0 has four of them and rank 1 two. Wrappers average gradients over ranks, so a mean over all
sequences is a sum divided by (number of all sequences) / (number of ranks), which is what `normalizer` is for.
"""

import copy
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from npo_kernels import fused_logprob_loss, fused_npo_loss, sequence_logprobs
from npo_kernels.hf import add_fused_unlearning_head
from tests.hf.models import V, tiny

WORLD, B, S = 2, 6, 10
RANKS = (slice(0, 4), slice(4, 6))  # sequences of each rank
MICRO = ((slice(0, 1), slice(1, 4)), (slice(4, 5), slice(5, 6)))  # the same in two micro-batches
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
ACCELERATE = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.bfloat16)  # it rounds outputs


def make_batch() -> tuple[dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, V, (B, S), generator=g)
    mask = (torch.arange(S) < torch.tensor([10, 4, 7, 2, 9, 5])[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return batch, -4.0 * mask.sum(1) - torch.rand(B, generator=g)


def part(rows: slice) -> tuple[dict[str, Tensor], Tensor]:
    batch, ref_logps = make_batch()
    return {name: value[rows] for name, value in batch.items()}, ref_logps[rows]


# ---------------------------------------------------------------------------------------------------------------------
# Losses of some rows of the batch, which add up to the loss of all of them with share=1
# ---------------------------------------------------------------------------------------------------------------------


def npo(model, rows: slice, share: float) -> Tensor:
    """The mean over all sequences, its gradients formed in the forward."""
    batch, ref_logps = part(rows)
    return model(**batch, fused_unlearning=partial(fused_npo_loss, ref_logps=ref_logps, normalizer=B * share)).loss


def npo_outside(model, rows: slice, share: float) -> Tensor:
    """The same of log-probabilities that left the forward: the head's weight is used again in the backward."""
    batch, ref_logps = part(rows)
    logps = model(**batch, fused_unlearning=True).logps
    return (-20 * torch.nn.functional.logsigmoid(-0.1 * (logps - ref_logps))).sum() / (B * share)


def retain(model, rows: slice, share: float) -> Tensor:
    """The mean over all tokens, of which ranks have different numbers, too."""
    batch, _ = part(rows)
    total = int((make_batch()[0]["labels"][:, 1:] != -100).sum())

    def loss_fn(logps, num_tokens):
        return -logps.sum() / (total * share)

    return model(**batch, fused_unlearning=partial(fused_logprob_loss, loss_fn=loss_fn)).loss


LOSSES = {"npo": npo, "npo-outside": npo_outside, "retain": retain}


# ---------------------------------------------------------------------------------------------------------------------
# Wrappers
# ---------------------------------------------------------------------------------------------------------------------


def ddp(model, **_):
    return DistributedDataParallel(model)


def ddp_looking(model, **_):
    """What the Trainer does: DDP goes through the outputs, and rebuilds them."""
    return DistributedDataParallel(model, find_unused_parameters=True)


def root_sharded(model, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def tail_group(model, **options):
    """The last norm and the head in a group that stays gathered after the forward: what accelerate does."""
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **options)
    return root_sharded(model, **options)


def own_unit(model, **options):
    """The head gathered and freed by itself, in forward and backward."""
    fully_shard(model.lm_head, reshard_after_forward=True, **options)
    return root_sharded(model, **options)


WRAPPERS = {
    "ddp": ddp,
    "ddp-looking": ddp_looking,
    "fsdp2-root": root_sharded,
    "fsdp2-tail": tail_group,
    "fsdp2-own": own_unit,
}

# name -> (wrapper, architecture, loss, policy, how)
CASES = {
    f"{wrapper}, {loss}": (wrapper, "llama", loss, None, "")
    for wrapper in WRAPPERS
    for loss in (LOSSES if wrapper in ("ddp", "fsdp2-tail", "fsdp2-own") else ["npo"])
}
CASES |= {
    "ddp, tied": ("ddp", "llama-tied", "npo", None, ""),
    "fsdp2-root, tied": ("fsdp2-root", "llama-tied", "npo-outside", None, ""),
    "fsdp2-own, bias": ("fsdp2-own", "phi", "npo", None, ""),
    "ddp, accumulated": ("ddp", "llama", "npo", None, "accumulate"),
    "fsdp2-own, accumulated": ("fsdp2-own", "llama", "npo-outside", None, "accumulate"),
    "fsdp2-own, checkpointed": ("fsdp2-own", "llama", "npo", None, "checkpoint"),
    "fsdp2-root, bfloat16": ("fsdp2-root", "llama", "npo", BFLOAT16, ""),
    "fsdp2-tail, bfloat16": ("fsdp2-tail", "llama", "npo", ACCELERATE, ""),
    "fsdp2-own, bfloat16": ("fsdp2-own", "llama", "npo-outside", BFLOAT16, ""),
}


def build(architecture: str):
    return add_fused_unlearning_head(tiny(architecture))


def expected_gradients(case: str) -> dict[str, Tensor]:
    """One process, all sequences; with a policy, 16-bit weights and the ranks' gradients added in float32."""
    _, architecture, loss, policy, _ = CASES[case]
    model = build(architecture)
    if policy is None:
        LOSSES[loss](model, slice(0, B), 1.0).backward()
        return {name: p.grad for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for rows in RANKS:
        low = copy.deepcopy(model)
        for p in low.parameters():  # and not the buffers
            p.data = p.data.bfloat16()
        LOSSES[loss](low, rows, 1.0).backward()
        for name, p in low.named_parameters():
            total[name] += p.grad.float()
    return total


def run_case(case: str, rank: int, expected: dict[str, Tensor]) -> list[str]:
    """What differs from `expected`."""
    wrapper, architecture, loss, policy, how = CASES[case]
    model = build(architecture)
    if how == "checkpoint":
        model.train()
        model.gradient_checkpointing_enable()
    wrapped = WRAPPERS[wrapper](model, **({} if policy is None else {"mp_policy": policy}))
    parts = MICRO[rank] if how == "accumulate" else [RANKS[rank]]
    for i, rows in enumerate(parts):
        last = i == len(parts) - 1
        if wrapper.startswith("ddp"):
            sync = nullcontext() if last else wrapped.no_sync()
        else:
            wrapped.set_requires_gradient_sync(last)
            sync = nullcontext()
        with sync:
            LOSSES[loss](wrapped, rows, 1 / WORLD).backward()
    failures = []
    tolerance = 1e-5 if policy is None else 2e-3  # 16-bit sums in another order
    for name, p in model.named_parameters():
        grad = p.grad if wrapper.startswith("ddp") else p.grad.full_tensor()
        error = (grad - expected[name]).norm() / expected[name].norm()
        if not error <= tolerance:
            failures.append(f"{name}: relative error {error:.2e}")
    return failures


def other_promises(rank: int) -> list[str]:
    """Evaluation under every wrapper, and sums that the wrapper would round in its output."""
    failures = []
    batch, _ = part(RANKS[rank])
    expected = build("llama")(**batch, fused_unlearning=True).logps.detach()
    for name, wrap in WRAPPERS.items():
        with torch.no_grad():
            logps = wrap(build("llama"))(**batch, fused_unlearning=True).logps
        if not torch.allclose(logps, expected):
            failures.append(f"{name}: evaluation differs")
    for function in (True, partial(sequence_logprobs, impl="torch")):
        try:
            tail_group(build("llama"), mp_policy=ACCELERATE)(**batch, fused_unlearning=function)
            failures.append("16-bit outputs were not refused")
        except ValueError as error:
            if "output_dtype" not in str(error):
                failures.append(str(error))
    return failures


def rank_main(rank: int, store: str, expected: dict[str, dict], failures) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    try:
        for case, gradients in expected.items():
            failures += [f"{case}, rank {rank}: {failure}" for failure in run_case(case, rank, gradients)]
        failures += [f"promises, rank {rank}: {failure}" for failure in other_promises(rank)]
    finally:
        dist.destroy_process_group()
