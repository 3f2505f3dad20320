"""Every kernel and mode against float64, and properties only a GPU can show, in under a minute with compiled kernels.

The checks are the tests of tests/gpu; here each is a unit, so that an illegal memory access in one does not affect the
others. In addition there are the errors at production shapes, whose oracle needs the memory of a GPU.
"""

from functools import partial

import torch

from bench.cases import HEADS, Case, Head
from bench.certify.stages.compile import CHECKED_HEADS
from bench.certify.tests import run_tests
from bench.certify.unit import Context, Unit
from bench.suites.accuracy import errors
from bench.targets import OURS, SMALL

PLAIN = "plain/eager"
LOGPS = 1e-5  # the largest relative error of a sequence's log-probability
# Few rows, ragged; more than fit 256 MiB as a slab, so that the small workspace forms its exponentials again. Short
# sequences, whose sums float32 knows well: an error of the sum is one of the weight, and so of every gradient.
ROWS = (*((3, 16),) * 43, (0, 1), (5, 9))
PRODUCTION = {"V=128256": HEADS["llama-3-8b"], "V=262144": Head(2304, 262_144, softcap=30.0)}

EVERY_MODE = "test_correctness.py::test_every_mode_is_no_worse_than_plain_pytorch"
CLAIMS = {  # name in the report -> (a test of tests/gpu, seconds)
    "r = 0 to the bit at the reference": (
        "test_correctness.py::test_at_the_reference_the_loss_is_exactly_two_over_beta_ln_two", 1),
    "a row at p = e^-200": ("test_correctness.py::test_a_row_at_p_of_e_to_the_minus_200_is_repaired", 1),
    "the same bits in any batch": (
        "test_correctness.py::test_logps_have_the_same_bits_alone_in_a_batch_packed_and_in_any_workspace", 2),
    "the same bits again": ("test_correctness.py::test_repeated_runs_give_the_same_bits", 2),
    "guards around every output": ("test_operators.py::test_nothing_is_written_outside", 4),
    "KL": ("test_operators.py::test_kl_is_no_worse_than_plain_pytorch", 4),
    "products of cuBLAS in float32": ("test_products.py::test_products_with_exponentials", 2),
    "no host sync": ("test_memory_and_sync.py::test_with_known_rows_nothing_waits_for_the_device", 2),
    "CUDA graph": ("test_memory_and_sync.py::test_forward_and_backward_replay_as_a_cuda_graph", 2),
    "opcheck": ("test_operators.py::test_fakes_have_the_shapes_strides_and_dtypes_of_the_outputs", 5),
    "N V beyond 2^31": ("test_correctness.py::test_offsets_beyond_two_to_the_31", 4),
    "V H beyond 2^31": ("test_operators.py::test_a_head_of_more_than_two_to_the_31_entries", 4),
    "labels out of range": (
        "test_correctness.py::test_labels_out_of_range_give_nan_without_a_sync_and_raise_in_debug", 1),
    "workspaces are kept": ("test_memory_and_sync.py::test_the_workspace_is_kept", 3),
    "autocast": ("test_correctness.py::test_autocast_is_the_casts_done_by_hand", 1),
    "the persistent kernel against the simple one": (
        "test_persistent.py::test_many_tiles_a_program_against_the_other_kernel", 10),
    "torch.compile": ("test_correctness.py::test_compiled_with_inductor_equals_eager", 12),
}  # fmt: skip


def units(context: Context) -> list[Unit]:
    if context.toy:
        rehearsed = ["tests/kernels/test_execute.py", "-k", "slab and bfloat16 and plain and not chunks"]
        head = {"toy": HEADS["toy-softcap"]}
        return [Unit("slab", partial(run_tests, arguments=rehearsed), 2), *_production(head, ((1, 9), (0, 1), (0, 14)))]
    modes = [Unit(f"mode: {mode}", partial(run_tests, arguments=tests), 1.5) for mode, tests in by_mode().items()]
    claims = [Unit(n, partial(run_tests, arguments=[f"tests/gpu/{t}"]), s) for n, (t, s) in CLAIMS.items()]
    first, *others = _production(PRODUCTION, ROWS)
    return [first, *modes, *claims, *others]


def by_mode() -> dict[str, list[str]]:
    """mode -> its tests with every option of a head off, and with every option on, in all dtypes."""
    from tests import matrix

    found: dict[str, list[str]] = {}
    for case in matrix.cases():
        if case[2] in CHECKED_HEADS:
            found.setdefault(case[0], []).append(f"tests/gpu/{EVERY_MODE}[{matrix.case_id(case)}-triton]")
    return found


def _production(heads: dict[str, Head], rows: tuple[tuple[int, int], ...]) -> list[Unit]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [
        Unit(f"{name}, {str(dtype).removeprefix('torch.')}", partial(production, Case(name, head, rows), dtype), 9)
        for dtype in dtypes
        for name, head in heads.items()
    ]


def production(case: Case, dtype: torch.dtype, context: Context) -> str:
    """Log-probabilities and gradients in two workspaces, all as close to float64 as those of plain PyTorch."""
    dtype_name = str(dtype).removeprefix("torch.")
    options = context.options("accuracy", dtype=dtype_name, providers=(OURS, SMALL, PLAIN))
    found = context.emit(errors(options, case, case.batch(dtype, context.device)))
    wrong = [f"{r['provider']}: {r['error']}" for r in found if r["status"] != "ok"]
    value = {(r["provider"], r["tensor"]): r["value"] for r in found if r["status"] == "ok"}
    for (provider, tensor), error in value.items():
        # in float32 every order of summation has an error of its own, some rounding units large
        allowed = value[PLAIN, tensor] + (1.5e-6 if dtype == torch.float32 else 0)
        if provider != PLAIN and not error <= (min(allowed, LOGPS) if tensor == "logps" else allowed):
            wrong.append(f"{provider}: {tensor} is off by {error:.2g}, plain PyTorch by {value[PLAIN, tensor]:.2g}")
    if wrong:
        raise AssertionError("; ".join(wrong))
    tensors = ("logps", "hidden", "weight")
    return ", ".join(f"{t} {value[OURS, t]:.1e} (plain {value[PLAIN, t]:.1e})" for t in tensors)
