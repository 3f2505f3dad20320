"""Every kernel compiled ahead of time for every target, without a GPU: registers, spills, shared memory, tensor cores
and asynchronous copies.

    make aot                           # the variants that need most of each tile: a quarter of an hour on two cores
    make aot ARGS=--brief              # what the test compiles: bfloat16 on sm_90, a few kernels elsewhere
    make aot ARGS=--all                # every variant
    make aot ARGS=--update             # write what is compiled down in golden.json, after any change of a kernel
    make aot ARGS="--target sm_90"     # one target; can be combined with the others
"""

import argparse
import ast
import hashlib
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from csrc_triton import tiles
from tests.aot.cases import PRODUCTS, TARGETS, Case, brief, cases
from tests.aot.measure import measure

GOLDEN = Path(__file__).with_name("golden.json")


def needs_tensor_cores(case: Case) -> bool:
    """Products of 16-bit operands always; those of float32 where tf32 is allowed, on NVIDIA."""
    if case.kernel not in PRODUCTS:
        return False
    return case.dtype in ("bf16", "fp16") or (case.dtype == "tf32" and TARGETS[case.target].backend == "cuda")


# Of 16-bit operands: what the instruction is called where a generation has its own, wgmma and tcgen05
WARP_GROUP_PRODUCTS = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}


def complaints(case: Case, found: dict, golden: dict | None) -> list[str]:
    """What is wrong with a compiled kernel. `golden` is None where it is of another Triton version."""
    wrong = []
    if found["spills"]:
        wrong.append(f"{found['spills']} spilled")
    if found["shared"] > TARGETS[case.target].program_shared:
        wrong.append(f"{found['shared']} bytes of shared memory, there are {TARGETS[case.target].program_shared}")
    if needs_tensor_cores(case) and not found["tensor_cores"]:
        wrong.append("no tensor-core instruction")
    if needs_tensor_cores(case) and case.bits == 16:
        wanted = WARP_GROUP_PRODUCTS.get(case.target, "")
        if wanted not in found["tensor_cores"]:
            wrong.append(f"{found['tensor_cores']}, not {wanted}")
    if "persistent" in case.kernel and found["copies"] != "UTMALDG":
        wrong.append(f"{found['copies'] or 'no asynchronous copy'}, not UTMALDG alone: bulk copies of tensors")
    for what in ("registers", "spills", "shared") if golden is not None else ():
        if found[what] > golden[what]:
            wrong.append(f"{found[what]} {what}, recorded were {golden[what]}")
    return [f"{case.name}: {w}" for w in wrong]


def sources() -> dict[str, str]:
    """{module of kernels: a hash of its code, docstrings and comments aside}."""
    found = {}
    for path in sorted(Path(tiles.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        found[path.stem] = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    return found


def read_golden() -> dict:
    """{"triton": version, "sources": `sources` of what was compiled, "cases": {name: what `measure` found}}."""
    return json.loads(GOLDEN.read_text())


def write_golden(version: str, compiled: dict[str, str], found: dict[str, dict]) -> None:
    """One case a line, so that a change can be read as a difference."""

    def lines(values: dict) -> str:
        return ",\n".join(f"    {json.dumps(name)}: {json.dumps(values[name])}" for name in sorted(values))

    parts = (
        f'"triton": {json.dumps(version)}',
        f'"sources": {{\n{lines(compiled)}\n  }}',
        f'"cases": {{\n{lines(found)}\n  }}',
    )
    GOLDEN.write_text("{\n  " + ",\n  ".join(parts) + "\n}\n")


COLUMNS = ("warps", "stages", "registers", "spills", "shared", "programs", "tensor_cores")


def row(name: str, found: dict) -> str:
    target, kernel, variant, dtype = name.split(" ")
    values = " ".join(f"{found[c]:>9}" for c in COLUMNS[:-1])
    return f"{target:7} {kernel:28} {variant:36} {dtype:5} {values}  {found['tensor_cores']} {found['copies']}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot.compile_all", description=__doc__.split("\n")[0])
    parser.add_argument("--brief", action="store_true", help="what the test compiles")
    parser.add_argument("--all", action="store_true", help="every variant, not the representative ones")
    parser.add_argument("--update", action="store_true", help="record the results in golden.json")
    parser.add_argument("--target", action="append", choices=TARGETS, help="this target only; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args(arguments)
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    chosen = [c for t in options.target or TARGETS for c in cases(t, options.all) if brief(c) or not options.brief]
    golden = read_golden() if GOLDEN.exists() else {"triton": None, "sources": {}, "cases": {}}
    comparable = golden["triton"] == triton.__version__ and not options.update
    print(f"triton {triton.__version__}, golden.json has {golden['triton']}; {len(chosen)} kernels")
    print(f"{'target':7} {'kernel':28} {'variant':36} {'dtype':5} {' '.join(f'{c:>9}' for c in COLUMNS[:-1])}")
    found, wrong = {}, []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # before the workers start: nothing compiled earlier, nothing left
        with ProcessPoolExecutor(options.jobs) as workers:
            for case, result in zip(chosen, workers.map(measure, chosen), strict=True):
                found[case.name] = result
                wrong += complaints(case, result, golden["cases"].get(case.name) if comparable else None)
                print(row(case.name, result), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "cases": found}))
    if options.update:
        known = {case.name for t in TARGETS for case in cases(t, True)}
        kept = {
            name: g for name, g in golden["cases"].items() if name in known and golden["triton"] == triton.__version__
        }
        # of these sources only if nothing was left out
        compiled = golden["sources"] if options.target or options.brief else sources()
        write_golden(triton.__version__, compiled, {**kept, **found})
    print("\n".join(wrong) if wrong else "no spills, no missing tensor cores, nothing grown")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
