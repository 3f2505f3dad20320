"""Every tile of the table compiles for its architecture without spills, with tensor cores, and has not grown.

The variants that `cases.brief` chooses for the architectures of COMPILED, in a process of its own: kernels decorated
under the interpreter, which the other tests run in, cannot be compiled. `make aot` compiles all that golden.json has to
hold, for every target; a test compares the sources that it was made of with those that are here.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

from csrc_triton import tiles
from tests.aot.cases import TARGETS, Case, brief, cases
from tests.aot.compile_all import complaints, read_golden, sources
from tests.aot.measure import spilled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]
ROOT = Path(__file__).parents[2]
COMPILED = ("sm_90", "sm_100", "gfx942")  # one for each kind of code: wgmma with TMA, the newest of NVIDIA's, AMD's


@pytest.mark.parametrize("target", COMPILED)
def test_every_tile_compiles_without_spills_and_with_tensor_cores(target, tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.aot.compile_all", "--brief", "--target", target, "--jobs", "1"]
    command += ["--json", str(results)]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(results.read_text())["cases"]
    assert set(found) == {case.name for case in cases(target, everything=False) if brief(case)}
    products = [r for name, r in found.items() if " exp_logits" in name and name.endswith(("bf16", "fp16"))]
    assert products
    assert all(r["tensor_cores"] for r in products)


def test_only_what_is_read_back_has_spilled():
    store, load = "/*0da0*/ STL.64 [R1], RZ ;", "/*1010*/ @!P1 LDL.LU R4, [R1+0x10] ;"
    assert spilled(8, store) == 0
    assert spilled(8, f"{store}\n{load}") == 8


HOPPER = {"registers": 255, "spills": 0, "shared": 0, "tensor_cores": "HGMMA.64x256x16.F32.BF16", "copies": "UTMALDG"}


@pytest.mark.parametrize(
    ("kernel", "found", "complaint"),
    [
        ("exp_logits_persistent_kernel", {}, None),
        ("exp_logits_persistent_kernel", {"copies": "LDGSTS UTMALDG"}, "LDGSTS UTMALDG, not UTMALDG alone"),
        ("exp_logits_persistent_kernel", {"copies": ""}, "no asynchronous copy, not UTMALDG"),
        ("exp_logits_kernel", {"copies": "LDGSTS"}, None),
        ("exp_logits_kernel", {"tensor_cores": "HMMA.16816.F32.BF16"}, "HMMA.16816.F32.BF16, not HGMMA"),
        ("exp_logits_kernel", {"spills": 8}, "8 spilled"),
    ],
)
def test_a_product_on_hopper_has_its_instructions(kernel, found, complaint):
    said = complaints(Case("sm_90", "exp_logits", kernel, "slab", "bf16"), HOPPER | found, None)
    assert len(said) == (complaint is not None) and all(complaint in line for line in said)


def test_what_was_measured_on_hopper_is_on_record_with_bulk_copies_where_it_is_persistent():
    for key, tile in tiles.TILES.items():
        if key[0] != "sm_90" or key[2] == tiles.ANY_HIDDEN:
            continue
        kernels = ["exp_logits_kernel", "exp_logits_persistent_kernel"][: 2 if tile.loop else 1]
        for kernel, use in product(kernels, ("slab", "statistics", "recompute", "repair", "slab+bias+softcap")):
            found = read_golden()["cases"][f"sm_90 {kernel} {use}+h{key[2]} bf16"]
            assert found["spills"] == 0 and "HGMMA" in found["tensor_cores"]
            assert found["copies"] == ("UTMALDG" if "persistent" in kernel else "LDGSTS")


def test_every_representative_case_is_on_record_and_of_these_kernels():
    recorded = read_golden()["cases"]
    assert sources() == read_golden()["sources"], "kernels or tiles have changed: make aot ARGS=--update"
    assert {case.name for t in TARGETS for case in cases(t, everything=False)} <= set(recorded)


def test_an_entry_of_a_hidden_bucket_is_compiled_too_and_for_both_kernels_if_persistent(monkeypatch):
    def products(bucket):
        found = [case for case in cases("sm_90", everything=False) if case.has(bucket) and case.module == "exp_logits"]
        return {case.kernel: case.tile for case in found}

    assert products("h1024") == {}
    entry = tiles.TILES["sm_90", 16, tiles.ANY_HIDDEN]._replace(num_stages=3, loop="serial")
    monkeypatch.setitem(tiles.TILES, ("sm_90", 16, 1024), entry)
    assert products("h1024") == {"exp_logits_kernel": entry, "exp_logits_persistent_kernel": entry}
    monkeypatch.setitem(tiles.TILES, ("sm_90", 16, 1024), entry._replace(loop=""))
    assert set(products("h1024")) == {"exp_logits_kernel"} and products("h8192") == {}
