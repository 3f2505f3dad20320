"""The allowed imports: training -> npo_kernels -> csrc_triton -> triton. `import npo_kernels` loads nothing else."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOUSE = {"csrc_triton", "npo_kernels", "training", "bench", "examples", "tests", "tools"}


def imports(package: str) -> list[tuple[str, str]]:
    """(file, top-level module) of every import statement, at any depth; relative ones are the package."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), path)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [package if node.level else node.module]
            found += [(path.relative_to(ROOT).as_posix(), name.split(".")[0]) for name in names]
    return found


def run(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_csrc_triton_imports_triton_and_the_standard_library_alone():
    found = imports("csrc_triton")
    allowed = {"triton", "csrc_triton"} | sys.stdlib_module_names
    assert [entry for entry in found if entry[1] not in allowed] == []
    assert "triton" in {module for _, module in found}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("npo_kernels", {"npo_kernels", "csrc_triton"}),
        ("training", {"training", "npo_kernels"}),
        ("examples", {"examples", "npo_kernels"}),
        ("tools", {"tools"}),
        ("bench", HOUSE - {"tools"}),
    ],
)
def test_arrows_point_one_way(package, allowed):
    if not (ROOT / package).exists():
        pytest.skip(f"no {package}/ here")
    assert [entry for entry in imports(package) if entry[1] in HOUSE - allowed] == []


def test_import_needs_no_triton():
    answer = run(
        "import sys, json; sys.modules['triton'] = None\n"
        "import npo_kernels, torch\n"
        "h, w = torch.ones(1, 3, 4, requires_grad=True), torch.eye(5, 4)\n"
        "y = torch.tensor([[1, 2, 3]])\n"
        "loss = npo_kernels.fused_npo_loss(h, w, y, ref_logps=torch.zeros(1))\n"
        "loss.backward()\n"
        "print(json.dumps({'loss': loss.item(), 'grad': h.grad.abs().sum().item()}))"
    )
    assert answer["loss"] > 0 and answer["grad"] > 0


def test_triton_asked_for_by_name_and_absent_says_so():
    answer = run(
        "import sys, json; sys.modules['triton'] = None\n"
        "import npo_kernels, torch\n"
        "try: npo_kernels.fused_npo_loss(torch.ones(1, 3, 4), torch.eye(5, 4), torch.tensor([[1, 2, 3]]),\n"
        "    ref_logps=torch.zeros(1), impl='triton')\n"
        "except Exception as error: print(json.dumps({'error': str(error)}))"
    )
    assert "triton" in answer["error"].lower()


def test_an_evaluation_shows_its_help_and_its_refusals_without_loading_models():
    loaded = run("import sys, json; import training.commands.evaluate; print(json.dumps(list(sys.modules)))")
    assert "training.commands.evaluate" in loaded and "transformers.modeling_utils" not in loaded


def test_import_loads_neither_triton_nor_a_model_library():
    """torch itself may load triton: only what `import npo_kernels` adds to `import torch` counts."""
    answer = run(
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        "import npo_kernels\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    assert "npo_kernels" in answer
    assert not {"triton", "csrc_triton", "transformers", "accelerate", "peft", "datasets"} & set(answer)
