"""`python -m tools.kernel_hub [--out DIR]`: the library as a kernel that the package `kernels` loads from a folder.

    DIR/README.md, LICENSE             the card, and the licence
    DIR/build.toml, torch-ext/         what `kernel-builder` builds from
    DIR/build/torch-cpu, torch-cuda    what `kernels.get_local_kernel(DIR)` loads: the package and its metadata.json

A loader imports a kernel under a name of its own, possibly beside other versions of it. So the copy differs from the
checkout in two ways: imports of `npo_kernels` and `csrc_triton` are relative, and torch operators are registered in a
namespace that is unique to the build. `npo_kernels.hf` and `npo_kernels.env` are left out: a kernel may import only
torch, Triton and itself.

Layout and metadata: https://huggingface.co/docs/kernels/kernel-requirements (0.17).
"""

import argparse
import ast
import base64
import hashlib
import json
import shutil
from pathlib import Path

from tools.release import version

ROOT = Path(__file__).resolve().parents[1]
NAME = "npo-kernels"
MODULE = "npo_kernels"
BACKENDS = ("cpu", "cuda")  # those that the tests have run on; the contents are equal
LEFT_OUT = ("hf/", "env.py")
PREFIX = f"{MODULE}::"  # of an operator's name
OPS = '''"""The operators of this build, in a namespace of their own: several builds can be loaded in one process."""

import torch

NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an operator."""
    return f"{{NAMESPACE}}::{{name}}"
'''
BUILD_TOML = """[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[torch-noarch]
"""
CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernel
---

# npo-kernels {version}

Fused lm-head, log-softmax, sequence log-probabilities and losses for unlearning language models (NPO, SimNPO): Triton
kernels on a GPU, PyTorch in bounded memory elsewhere. The full logits are never formed.

```python
from kernels import get_local_kernel

npo = get_local_kernel(folder)  # this folder; or get_kernel("OWNER/{name}", version={major}, trust_remote_code=True)
loss = npo.fused_npo_loss(hidden, lm_head_weight, labels, ref_logps=ref_logps, beta=0.1)
```

Needs Python 3.11, torch 2.11 and `kernels` 0.17, or newer. On a GPU it also needs Triton, which torch's CUDA wheels
install. `npo_kernels.hf`, which needs Transformers, and `npo_kernels.env` are left out: for these, install `{name}`.
"""


def sources() -> dict[str, str]:
    """Path in the kernel -> text, with relative imports and operators named by `add_op_namespace_prefix`."""
    found = {}
    for package, inside in ((MODULE, ""), ("csrc_triton", "csrc_triton/")):
        for file in sorted((ROOT / package).rglob("*.py")):
            path = inside + file.relative_to(ROOT / package).as_posix()
            if not path.startswith(LEFT_OUT):
                found[path] = portable(path, file.read_text(encoding="utf-8"))
    return found


def portable(path: str, text: str) -> str:
    """The text of a module that works under any name of its package."""
    dots = "." * (path.count("/") + 1)  # the root of the kernel, seen from here
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text, path)
    uses_operators = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            own = [alias.name for alias in node.names if alias.name.split(".")[0] in (MODULE, "csrc_triton")]
            if own:
                raise ValueError(f"{path}:{node.lineno}: expected `from {own[0]} import ...`, got `import {own[0]}`")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            package, _, rest = node.module.partition(".")
            if package in (MODULE, "csrc_triton"):
                target = dots + (rest if package == MODULE else node.module)
                lines[node.lineno - 1] = replaced(
                    lines[node.lineno - 1], f"from {node.module} ", f"from {target} ", path
                )
        elif isinstance(node, ast.Call) and node.args and operator_name(node.args[0]):
            name = ast.get_source_segment(text, node.args[0])
            assert name is not None
            call = f"add_op_namespace_prefix({name.replace(PREFIX, '', 1)})"
            lines[node.args[0].lineno - 1] = replaced(lines[node.args[0].lineno - 1], name, call, path)
            uses_operators = True
    if uses_operators:
        last = max(node.end_lineno or 0 for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
        lines.insert(last, f"from {dots}_ops import add_op_namespace_prefix\n")
    return "".join(lines)


def operator_name(node: ast.expr) -> bool:
    """Whether this is "npo_kernels::name", or an f-string that begins so."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    return isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.startswith(PREFIX)


def replaced(line: str, old: str, new: str, path: str) -> str:
    if line.count(old) != 1:
        raise ValueError(f"{path}: expected {old!r} once in {line!r}, found it {line.count(old)} times")
    return line.replace(old, new)


def metadata(backend: str, identity: str, files: dict[str, str]) -> dict[str, object]:
    hashes = {path: hashlib.sha256(text.encode()).digest() for path, text in sorted(files.items())}
    return {
        "name": NAME,
        "id": identity,  # a module name and a namespace of operators
        "version": int(version().split(".")[0]),  # 0: the interface may still change
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {p: base64.b64encode(h).decode() for p, h in hashes.items()}},
    }


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def build(out: Path) -> None:
    """Write the kernel into the folder `out`, which must be new, empty, or an earlier build."""
    if out.exists() and any(out.iterdir()) and not (out / "build.toml").exists():
        raise ValueError(f"{out}: expected an empty folder or an earlier build, got another one")
    shutil.rmtree(out, ignore_errors=True)
    modules = sources()
    unique = hashlib.sha256(json.dumps(modules, sort_keys=True).encode()).hexdigest()[:8]
    major = version().split(".")[0]
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    write(out, {"README.md": CARD.format(name=NAME, version=version(), major=major)})
    write(out, {"build.toml": BUILD_TOML.format(name=NAME, version=major, backends=backends)})
    shutil.copy(ROOT / "LICENSE", out)
    write(out / "torch-ext" / MODULE, modules)  # kernel-builder adds its own `_ops`
    for backend in BACKENDS:
        identity = f"_{MODULE}_{backend}_{unique}"
        files = modules | {"_ops.py": OPS.format(namespace=identity)}
        write(out / "build" / f"torch-{backend}", files)
        text = json.dumps(metadata(backend, identity, files), indent=2) + "\n"
        write(out / "build" / f"torch-{backend}", {"metadata.json": text})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_hub", description="Build the kernel for `kernels`.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kernel-hub", help="the folder to write")
    out = parser.parse_args(arguments).out
    build(out)
    print(f"{out}: load it with kernels.get_local_kernel(Path({str(out)!r}))")


if __name__ == "__main__":
    main()
