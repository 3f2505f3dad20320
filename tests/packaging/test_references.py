"""Docstrings and comments of npo_kernels and csrc_triton name modules, functions and files that exist.

Read from the source, nothing is imported. A reference is a dotted name or a path in backticks, or a bare path, such as
tests/aot or csrc_triton/tiles.py. A dotted name counts from a package, or from a folder or module of npo_kernels
(`core.linear_kl`, `softmax_stats.Normalizers`); `torch` and `triton` are the libraries.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("csrc_triton", "npo_kernels")
DOTTED = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)`")
LIBRARIES = ("torch", "triton")
PATHS = re.compile(r"(?<![\w./-])((?:bench|csrc_triton|docs|npo_kernels|tests|training)/[\w./-]*\w)")


def modules(root: Path) -> dict[str, ast.Module]:
    """{dotted name: parsed source} of every module of the packages."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def members(tree: ast.Module | ast.ClassDef) -> dict[str, ast.AST]:
    """What a module or class defines or imports, and the attributes that methods of a class set."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                found |= {name.id: node for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def known(name: str, house: dict[str, ast.Module]) -> bool | None:
    """Whether a dotted name exists; None if it starts with nothing of the packages (`torch.sum`, `tile.loop`)."""
    first = name.split(".")[0]
    starts = [m for m in house if m == first or (m.endswith(f".{first}") and first not in LIBRARIES)]
    results = []
    for start in starts:
        full = start + name[len(first) :]
        module = max((m for m in house if full == m or full.startswith(m + ".")), key=len)
        rest = full[len(module) :].split(".")[1:]
        at: ast.AST = house[module]
        for part in rest:
            inside = members(at) if isinstance(at, ast.Module | ast.ClassDef) else {}
            if part not in inside:
                break
            at = inside[part]
        else:
            return True
        results.append(False)
    return False if results else None


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring and comment of a file."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node)):
            yield node.body[0].lineno, doc
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def broken_references(root: Path) -> list[str]:
    house, wrong = modules(root), []
    for path in (path for package in PACKAGES for path in (root / package).rglob("*.py")):
        for line, text in prose(path):
            missing = [
                name for name in DOTTED.findall(text) if not name.endswith(".py") and known(name, house) is False
            ]
            missing += [name for name in PATHS.findall(text) if not (root / name).exists()]
            wrong += [f"{path.relative_to(root)}:{line}: {name}" for name in missing]
    return wrong


def kernel_table(root: Path) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """({file: kernels} in the table of csrc_triton, the same in the source)."""
    listed: dict[str, set[str]] = {}
    file = ""
    for row in re.findall(r"^\| *(\w*) *\|([^|]*)\|", (root / "csrc_triton/__init__.py").read_text(), re.M):
        file = row[0] or file
        listed.setdefault(file, set()).update(re.findall(r"\w+_kernel\b", row[1]))
    listed.pop("file")
    written = {}
    for path in (root / "csrc_triton").glob("[!_]*.py"):
        functions = (node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
        written[path.stem] = {name for name in functions if name.endswith("_kernel")}
    return listed, written


def test_docstrings_and_comments_name_what_exists():
    assert broken_references(ROOT) == []


def test_the_table_of_csrc_triton_lists_every_file_and_kernel():
    listed, written = kernel_table(ROOT)
    assert listed == written


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`npo_kernels.core.plan.make_plan` and `plan.Plan.mode`", []),
        ("`torch.sum` and `tile.loop`, tests/aot", []),
        ("`npo_kernels.core.plans`", ["npo_kernels.core.plans"]),
        ("`plan.make_plans`", ["plan.make_plans"]),
        ("see docs/nothing.md", ["docs/nothing.md"]),
    ],
)
def test_a_reference_to_nothing_is_found(tmp_path, text, wrong):
    (tmp_path / "csrc_triton").mkdir()
    (tmp_path / "npo_kernels/core").mkdir(parents=True)
    (tmp_path / "tests/aot").mkdir(parents=True)
    (tmp_path / "npo_kernels/__init__.py").write_text(f'"""{text}"""\n')
    (tmp_path / "npo_kernels/core/__init__.py").touch()
    (tmp_path / "npo_kernels/core/plan.py").write_text("class Plan:\n    mode: str\ndef make_plan(): ...\n")
    assert broken_references(tmp_path) == [f"npo_kernels/__init__.py:1: {name}" for name in wrong]
