"""`exp_logits_persistent_kernel` compiled: tiles through descriptors, in every way through them that the GPU has."""

import pytest
import torch

from bench.tune import LOOPS
from csrc_triton.tiles import ANY_HIDDEN, PERSISTENT_CANDIDATES
from npo_kernels import fused_npo_loss, sequence_logprobs
from npo_kernels.core.lm_head import Head
from tests import matrix, support
from tests.gpu.test_correctness import SHAPE
from tests.support import make_batch, persistent_grids, relative_error

CASES = [case for case in matrix.cases() if case[1] != torch.float32]


@pytest.fixture(params=["serial", "flat", "specialized"])
def launched(request, monkeypatch):
    """Forces a persistent tile on 16-bit operands; the grids of its launches."""
    from npo_kernels.backends.triton import launch

    architecture = launch.architecture(torch.device("cuda"))
    if request.param not in LOOPS.get(architecture, ()):
        pytest.skip(f"{architecture} has no {request.param!r} loop over tiles")
    tile = PERSISTENT_CANDIDATES[architecture, 16, ANY_HIDDEN]._replace(loop=request.param)
    tile_for = launch.tile_for
    monkeypatch.setattr(launch, "tile_for", lambda x: tile if x.itemsize == 2 else tile_for(x))
    return persistent_grids(monkeypatch)


@pytest.mark.parametrize("case", CASES[::4], ids=matrix.case_id)
def test_every_mode_is_no_worse_than_plain_pytorch(case, plans, launched):
    matrix.check("triton", case, plans, **SHAPE)
    assert launched


@pytest.mark.parametrize("H", [4096, 4104, 576])
def test_many_tiles_a_program_against_the_other_kernel(H, launched, monkeypatch):
    """Every program owns several splits; rows, columns and depth do not fit the tiles; some rows are repaired."""
    from npo_kernels.backends import triton as backend
    from npo_kernels.backends.triton import launch

    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4001, H, device="cuda", generator=g).bfloat16()
    head = Head((torch.randn(20_011, H, device="cuda", generator=g) / H**0.5).bfloat16())
    target = torch.randint(20_011, (4001,), device="cuda", generator=g)
    anchor = backend.target_logits(x, head, target)
    anchor[130:140] -= 100

    def project():
        return backend.exp_logits(x, head, target, anchor, (0, 20_011))

    found, again = project(), project()
    assert max(launched) == launch.processors(x.device)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    tile = launch.tile_for(x)._replace(loop="")
    monkeypatch.setattr(launch, "tile_for", lambda _: tile)
    slab, parts, raised = project()
    assert torch.equal(found[2] != anchor, raised != anchor)
    assert relative_error(found[0], slab.double()) < 2**-8 and relative_error(found[1], parts.double()) < 1e-5


def test_logps_have_the_same_bits_alone_and_in_a_batch_and_in_any_workspace(launched):
    batch = make_batch(torch.bfloat16, **SHAPE)
    logps = batch(sequence_logprobs, impl="triton")[0]
    for s in range(len(batch.lengths)):
        assert torch.equal(batch.sequences([s])(sequence_logprobs, impl="triton")[0], logps[s : s + 1])
    for workspace_mb in (None, 8, support.TINY):
        options = {"ref_logps": batch.ref_logps, "impl": "triton", "workspace_mb": workspace_mb, "return_stats": True}
        assert torch.equal(batch.leaves(("hidden", "weight"))(fused_npo_loss, **options)[1].logps, logps)


def test_descriptors_are_captured_in_a_cuda_graph(launched):
    """They are made on the host and hold addresses, which a graph keeps."""
    hidden = torch.randn(2, 300, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(9001, 512, device="cuda", dtype=torch.bfloat16) / 16
    labels = torch.randint(9001, (2, 300), device="cuda")

    def step():
        return sequence_logprobs(hidden, weight, labels, num_rows=labels.numel(), impl="triton")[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = step()
    hidden.normal_()
    graph.replay()
    assert torch.equal(captured, step())
