"""The kernel of `make kernel-hub` loads under another name, alone or beside the library, and computes the same bits."""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import kernel_hub

ROOT = Path(__file__).resolve().parents[2]

# One call of each implementation: loss and gradients as bytes. `load` says how the module is found.
ONE_CALL = """
import importlib.util, json, os, sys, torch
from pathlib import Path

def by_path(folder):  # as a loader does it
    identity = json.loads((Path(folder) / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(identity, Path(folder) / "__init__.py")
    module = sys.modules[identity] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def bits(library):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 6, 16, generator=generator), torch.randn(40, 16, generator=generator) / 4
    labels = torch.randint(0, 40, (2, 6), generator=generator)
    found = {}
    for impl in ["torch"] + (["triton"] if importlib.util.find_spec("triton") else []):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = library.fused_npo_loss(h, w, labels, ref_logps=torch.tensor([-15.0, -16.0]), impl=impl)
        loss.backward()
        found[impl] = [t.detach().numpy().tobytes().hex() for t in (loss, h.grad, w.grad)]
    return found
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kernel")
    kernel_hub.build(out)
    return out


def run(code: str, cache: Path) -> dict:
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ONE_CALL + code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_computes_the_bits_of_the_library_alone_and_beside_it(kernel, tmp_path):
    """Alone: where neither `npo_kernels` nor `csrc_triton` can be imported."""
    folder = str(kernel / "build" / "torch-cpu")
    beside = f"import npo_kernels\nprint(json.dumps([bits(npo_kernels), bits(by_path({folder!r})), bits(npo_kernels)]))"
    alone = "sys.modules['npo_kernels'] = sys.modules['csrc_triton'] = None\n"
    alone += f"print(json.dumps(bits(by_path({folder!r}))))"
    library, *others = run(beside, tmp_path)
    assert library["torch"] and ("triton" in library) == (importlib.util.find_spec("triton") is not None)
    assert others == [library, library]
    assert run(alone, tmp_path) == library


def test_kernels_loads_it_from_the_folder(kernel, tmp_path):
    """And beside the library, by the package `kernels`, whose own reading of build.toml and of the hashes passes."""
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("the package `kernels` is not installed: `make dist-check` runs this")
    code = (
        "from kernels import get_local_kernel\n"
        "from kernels._rust import Build, Digest, DigestAlgorithm, Metadata\n"
        "import npo_kernels\n"
        f"folder = Path({str(kernel)!r})\n"
        "backends = [str(b).lower() for b in Build.open(folder).general.backends]\n"
        "for variant in sorted((folder / 'build').iterdir()):\n"
        "    metadata = Metadata.read_from_file(variant / 'metadata.json')\n"
        "    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))\n"
        "module = get_local_kernel(folder, backend='cpu')\n"
        "print(json.dumps([backends, module.__name__, bits(module) == bits(npo_kernels)]))"
    )
    backends, name, equal = run(code, tmp_path)
    assert [b.rpartition(".")[2] for b in backends] == list(kernel_hub.BACKENDS)
    assert name.startswith("_npo_kernels_cpu_") and equal


def test_it_imports_itself_torch_triton_and_the_standard_library_alone(kernel):
    found = set()
    for file in sorted((kernel / "build").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    assert found - sys.stdlib_module_names == {"torch", "triton"}


def test_its_operators_have_a_namespace_of_the_build(kernel):
    """Of the contents: two builds of one checkout share it, and a changed file gives another."""
    identities = [json.loads(file.read_text())["id"] for file in sorted(kernel.glob("build/*/metadata.json"))]
    assert len(set(identities)) == len(kernel_hub.BACKENDS)
    for identity in identities:
        assert identity.isidentifier()
    for file in sorted((kernel / "build").rglob("*.py")):
        names = [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
        assert kernel_hub.PREFIX not in names, file
        assert not any(str(name).startswith(kernel_hub.PREFIX) and " " not in str(name) for name in names), file


def test_the_metadata_has_the_hash_of_every_file(kernel):
    for folder in sorted((kernel / "build").iterdir()):
        metadata = json.loads((folder / "metadata.json").read_text())
        assert folder.name == f"torch-{metadata['backend']['type']}"
        hashes = {
            file.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
            for file in folder.rglob("*.py")
        }
        assert metadata["digest"] == {"algorithm": "sha256", "files": hashes}


@pytest.mark.parametrize(
    ("path", "line", "expected"),
    [
        ("losses.py", "from npo_kernels.core.plan import Plan\n", "from .core.plan import Plan\n"),
        ("losses.py", "from npo_kernels import reference\n", "from . import reference\n"),
        ("call/checks.py", "def f():\n    from npo_kernels.core import x\n", "def f():\n    from ..core import x\n"),
        ("backends/triton/rows.py", "from csrc_triton.tiles import T\n", "from ...csrc_triton.tiles import T\n"),
        (
            "csrc_triton/rows.py",
            "from csrc_triton.common import (\n  f)\n",
            "from ..csrc_triton.common import (\n  f)\n",
        ),
        ("core/x.py", "from torch import Tensor\n", "from torch import Tensor\n"),
        (
            "ops/x.py",
            'import torch\nx = torch.library.custom_op(f"npo_kernels::{name}")\n',
            "import torch\nfrom .._ops import add_op_namespace_prefix\n"
            'x = torch.library.custom_op(add_op_namespace_prefix(f"{name}"))\n',
        ),
    ],
)
def test_a_module_is_made_portable(path, line, expected):
    assert kernel_hub.portable(path, line) == expected


def test_an_import_that_cannot_be_relative_is_refused():
    with pytest.raises(ValueError, match=r"core/x.py:1: expected `from npo_kernels.core import"):
        kernel_hub.portable("core/x.py", "import npo_kernels.core\n")


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ValueError, match="empty folder or an earlier build"):
        kernel_hub.build(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
