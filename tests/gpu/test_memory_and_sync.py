"""Peak memory, host syncs and CUDA graphs."""

import pytest
import torch

from npo_kernels import explain, fused_npo_loss, sequence_logprobs
from npo_kernels.core.plan import MIB

# allocator rounding, partial sums and vectors of N rows: what a plan does not itemise
SLACK_MB = 48


def make(B=8, S=1025, H=1024, V=128_256, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(B, S, H, device="cuda", dtype=dtype, generator=g).requires_grad_()
    weight = (torch.randn(V, H, device="cuda", dtype=dtype, generator=g) / H**0.5).requires_grad_()
    labels = torch.randint(V, (B, S), device="cuda", generator=g)
    return hidden, weight, labels, torch.full((B,), -12.0 * S, device="cuda")


def peak_beyond_inputs_and_gradients(call, leaves) -> float:
    """MiB at the worst moment of forward and backward."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(call(), leaves)
    peak = torch.cuda.max_memory_allocated() - before
    return (peak - sum(g.numel() * g.itemsize for g in grads)) / MIB


@pytest.mark.parametrize("workspace_mb", [256, 512, 1024, 4096])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_workspace_is_kept(workspace_mb, frozen):
    hidden, weight, labels, ref_logps = make()
    weight.requires_grad_(not frozen)
    leaves = [hidden] if frozen else [hidden, weight]

    def call():
        return fused_npo_loss(hidden, weight, labels, ref_logps=ref_logps, workspace_mb=workspace_mb, impl="triton")

    call()
    plan = explain(fused_npo_loss, hidden, weight, labels, workspace_mb=workspace_mb, impl="triton")
    peak = peak_beyond_inputs_and_gradients(call, leaves)
    assert plan.workspace_bytes <= workspace_mb * MIB
    assert peak <= plan.workspace_bytes / MIB + SLACK_MB, str(plan)


def test_log_probabilities_need_next_to_nothing():
    hidden, weight, labels, _ = make()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        sequence_logprobs(hidden, weight, labels, impl="triton")
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    assert peak <= hidden.numel() * hidden.itemsize / MIB + SLACK_MB  # the scored rows, gathered


def test_with_known_rows_nothing_waits_for_the_device(no_host_sync):
    hidden, weight, labels, ref_logps = make(B=4, S=129, V=32_000)
    rows = labels.shape[0] * (labels.shape[1] - 1)

    def loss():
        return fused_npo_loss(hidden, weight, labels, ref_logps=ref_logps, num_rows=rows, impl="triton", normalizer=4)

    def outside():
        logps, _ = sequence_logprobs(hidden, weight, labels, num_rows=rows, impl="triton")
        return logps.square().mean()

    for call in (loss, outside):
        grads = no_host_sync(lambda call=call: torch.autograd.grad(call(), (hidden, weight)))
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("function", [fused_npo_loss, sequence_logprobs])
def test_forward_and_backward_replay_as_a_cuda_graph(function, layout):
    """tests/test_launches.py finds operations that a graph cannot capture without a GPU."""
    hidden, weight, labels, ref_logps = make(B=4, S=129, V=32_000)
    options = {"num_rows": labels.numel(), "impl": "triton"}
    if layout == "packed":
        options["cu_seqlens"] = torch.arange(5, device="cuda", dtype=torch.int32) * labels.shape[1]

    def step():
        batch = hidden, weight, labels
        if layout == "packed":  # here: autograd runs a backward on the stream of its forward, which is to be captured
            batch = hidden.flatten(0, 1), weight, labels.flatten()
        if function is fused_npo_loss:
            loss = fused_npo_loss(*batch, ref_logps=ref_logps, **options)
        else:
            loss = sequence_logprobs(*batch, **options)[0].square().mean()
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    with torch.no_grad():  # other data, other lengths, the same graph
        hidden.normal_()
        labels.random_(32_000)
        labels[1, 50:] = -100
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)
