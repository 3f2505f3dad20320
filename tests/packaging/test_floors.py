"""The layer of each module, and that imports only go to lower layers. Read from the source: nothing is imported.

    python -m tests.packaging.test_floors [CHECKOUT]     # modules, lines, imports and layers of each package

The imports that Python makes implicitly, of the `__init__` of each parent folder, are not counted.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("csrc_triton", "npo_kernels", "training", "bench")

# From the lowest layer up. A module belongs to the longest entry that names it or one of its parent folders. Only
# "npo_kernels" means a single module, its `__init__`, so a new module or folder in it has to be added here.
FLOORS = (
    {"npo_kernels.core"},
    {"npo_kernels.backends", "npo_kernels.reference"},
    {"npo_kernels.call"},
    {"npo_kernels.ops"},
    {
        "npo_kernels.losses",
        "npo_kernels.user_losses",
        "npo_kernels.statistics",
        "npo_kernels.logprobs",
        "npo_kernels.linear_kl",
    },
    {"npo_kernels", "npo_kernels.explain", "npo_kernels.env"},
    {"npo_kernels.hf"},
)
# The subpackages of training, from the lowest up; all other modules are the engine, below all of these but the methods.
WINGS = ("training.benchmarks", "training.reports", "training.papers", "training.pretrained", "training.commands")
TRITON_BACKEND = "npo_kernels.backends.triton"
KERNEL_USERS = TRITON_BACKEND, "npo_kernels.backends.tiles"


class Import(NamedTuple):
    """`target` is the imported module, `bound` the name it has from then on, if it is a module of the house."""

    line: int
    target: str
    name: str | None  # that `from target import name` takes
    bound: tuple[str, str] | None  # (name, module)


class Module(NamedTuple):
    path: str
    is_package: bool
    text: str
    tree: ast.Module


class Arrow(NamedTuple):
    importer: str
    target: str
    place: str


class House:
    """The modules of a checkout and the imports between them, those inside functions and for type checkers included."""

    def __init__(self, root: Path):
        self.modules = dict(read(root))

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        return {name: list(self._imports(name, module)) for name, module in self.modules.items()}

    @cached_property
    def arrows(self) -> list[Arrow]:
        """All imports, also of other packages, each occurrence separately."""
        return [
            Arrow(name, found.target, f"{self.modules[name].path}:{found.line}")
            for name, imports in self.imports.items()
            for found in imports
        ]

    def graph(self, *packages: str) -> dict[str, set[str]]:
        """module -> the modules that it imports, of these packages."""
        names = [name for name in self.modules if inside(name, *packages)]
        return {name: {i.target for i in self.imports[name]} & set(names) - {name} for name in names}

    def _imports(self, importer: str, module: Module) -> Iterator[Import]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound = (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
                    yield Import(node.lineno, alias.name, None, bound if bound[1] in self.modules else None)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    here = importer.split(".")
                    folder = here[: len(here) - node.level + module.is_package]
                    base = ".".join([*folder, *filter(None, [base])])
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    if full in self.modules:
                        yield Import(node.lineno, full, alias.name, (alias.asname or alias.name, full))
                    else:
                        yield Import(node.lineno, base, alias.name, None)
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = ast.unparse(node.func).split(".")[-1]
                if function in ("import_module", "__import__"):
                    yield Import(node.lineno, str(node.args[0].value), None, None)


def read(root: Path) -> Iterator[tuple[str, Module]]:
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            path = file.relative_to(root)
            is_package = file.name == "__init__.py"
            name = ".".join(path.parent.parts if is_package else path.with_suffix("").parts)
            text = file.read_text()
            yield name, Module(path.as_posix(), is_package, text, ast.parse(text, path.as_posix()))


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def floor_of(name: str) -> int | None:
    places = {entry: floor for floor, entries in enumerate(FLOORS) for entry in entries}
    if name in places:
        return places[name]
    folders = [
        name.rsplit(".", n)[0] for n in range(1, name.count("."))
    ]  # innermost first, "npo_kernels" not among them
    return next((places[folder] for folder in folders if folder in places), None)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or not; a list for each cycle."""

    def reachable(start: str) -> set[str]:
        found, pending = set(), [start]
        while pending:
            new = graph[pending.pop()] - found
            found |= new
            pending += new
        return found

    below = {name: reachable(name) for name in graph}
    knots = {frozenset({name, *(n for n in below[name] if name in below[n])}) for name in graph if name in below[name]}
    return sorted(map(sorted, knots))


def height(graph: dict[str, set[str]]) -> int:
    """The number of modules on the longest path down; a cycle counts as one."""
    knots = circles(graph)
    knot_of = {name: f"circle {i}" for i, knot in enumerate(knots) for name in knot}
    merged: dict[str, set[str]] = {}
    for name, targets in graph.items():
        merged.setdefault(knot_of.get(name, name), set()).update(knot_of.get(t, t) for t in targets)
    heights: dict[str, int] = {}

    def height_of(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max((height_of(t) for t in merged[name] - {name}), default=0)
        return heights[name]

    return max(map(height_of, merged), default=0)


# ---------------------------------------------------------------------------------------------------------------------
# Rules: a checkout -> its violations, one line each
# ---------------------------------------------------------------------------------------------------------------------


def every_module_has_a_floor(house: House) -> list[str]:
    return [
        module.path for name, module in house.modules.items() if inside(name, "npo_kernels") and floor_of(name) is None
    ]


def no_entry_of_the_table_is_empty(house: House) -> list[str]:
    return sorted(entry for entries in FLOORS for entry in entries if entry not in house.modules)


def imports_go_down(house: House) -> list[str]:
    return [
        f"{arrow.place} {arrow.target}"
        for arrow in house.arrows
        if inside(arrow.importer, "npo_kernels") and arrow.target in house.modules and goes_up(arrow)
    ]


def goes_up(arrow: Arrow) -> bool:
    above, below = floor_of(arrow.importer), floor_of(arrow.target)
    return above is not None and below is not None and above < below


def no_circles(house: House) -> list[str]:
    return [" ".join(circle) for circle in circles(house.graph("npo_kernels", "csrc_triton", "training"))]


def wing_of(module: str) -> int:
    """0: the engine and the methods."""
    return next((i for i, wing in enumerate(WINGS, 1) if inside(module, wing)), 0)


def the_engine_knows_no_wing(house: House) -> list[str]:
    """The same for the methods. A benchmark does not draw reports, and a report does not run commands."""
    return [
        f"{arrow.place} {arrow.target}"
        for arrow in house.arrows
        if inside(arrow.importer, "training") and wing_of(arrow.importer) < wing_of(arrow.target)
    ]


def commands_are_leaves(house: House) -> list[str]:
    """Nothing outside their folder imports a command; `training.NAME` is for running, not for importing."""
    names = {name.rpartition(".")[2] for name in house.modules if inside(name, "training.commands")}
    aliases = {f"training.{name}" for name in names} - house.modules.keys()
    return [
        arrow.place
        for arrow in house.arrows
        if (inside(arrow.target, "training.commands") and not inside(arrow.importer, "training.commands"))
        or arrow.target in aliases
    ]


def core_imports_no_backend(house: House) -> list[str]:
    return forbidden(house, "npo_kernels.core", "npo_kernels.backends", "csrc_triton")


def backends_import_neither_calls_nor_operators(house: House) -> list[str]:
    return forbidden(house, "npo_kernels.backends", "npo_kernels.call", "npo_kernels.ops")


def triton_is_imported_in_one_place(house: House) -> list[str]:
    """A search for it (`find_spec`) imports nothing, and is allowed."""
    return [
        arrow.place
        for arrow in house.arrows
        if inside(arrow.importer, "npo_kernels")
        and inside(arrow.target, "triton")
        and not inside(arrow.importer, TRITON_BACKEND)
    ]


def kernels_are_imported_by_the_triton_backend(house: House) -> list[str]:
    return [
        arrow.place
        for arrow in house.arrows
        if inside(arrow.importer, "npo_kernels")
        and inside(arrow.target, "csrc_triton")
        and not inside(arrow.importer, *KERNEL_USERS)
    ]


def the_triton_backend_is_imported_where_one_is_chosen(house: House) -> list[str]:
    return [
        arrow.place
        for arrow in house.arrows
        if inside(arrow.importer, "npo_kernels")
        and inside(arrow.target, TRITON_BACKEND)
        and not inside(arrow.importer, TRITON_BACKEND, "npo_kernels.backends.choose")
    ]


def private_names_stay_at_home(house: House) -> list[str]:
    """No `from module import _name`, `module._name`, `getattr(module, "_name")` or similar."""
    wrong = []
    for name, module in house.modules.items():
        found = [(i.line, i.target, i.name) for i in house.imports[name] if i.name]
        aliases = dict(i.bound for i in house.imports[name] if i.bound)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute):
                found.append((node.lineno, known_as(node.value, aliases), node.attr))
            elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                found.append((node.lineno, known_as(node.args[0], aliases), str(node.args[1].value)))
        for line, owner, attribute in found:
            private = attribute.startswith("_") and not attribute.endswith("__")
            if private and owner != name and inside(owner, *PACKAGES):
                wrong.append(f"{module.path}:{line} {attribute}")
    return sorted(wrong)


def known_as(node: ast.expr, aliases: dict[str, str]) -> str:
    """The module that an expression such as `npo_kernels.core.plan` is, or ""."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    if isinstance(node, ast.Attribute):
        owner = known_as(node.value, aliases)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def forbidden(house: House, importers: str, *targets: str) -> list[str]:
    return [a.place for a in house.arrows if inside(a.importer, importers) and inside(a.target, *targets)]


RULES: list[Callable[[House], list[str]]] = [
    every_module_has_a_floor,
    no_entry_of_the_table_is_empty,
    imports_go_down,
    no_circles,
    the_engine_knows_no_wing,
    commands_are_leaves,
    core_imports_no_backend,
    backends_import_neither_calls_nor_operators,
    triton_is_imported_in_one_place,
    kernels_are_imported_by_the_triton_backend,
    the_triton_backend_is_imported_where_one_is_chosen,
    private_names_stay_at_home,
]


def name_of(rule: Callable[[House], list[str]]) -> str:
    return rule.__name__


@pytest.fixture(scope="module")
def house() -> House:
    found = House(ROOT)
    assert len(found.graph("npo_kernels")) > 30 and len(found.graph("csrc_triton")) > 7
    assert any(targets for targets in found.graph("npo_kernels").values())
    return found


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_the_house_keeps_its_rules(house, rule):
    assert rule(house) == []


# ---------------------------------------------------------------------------------------------------------------------
# A small checkout that keeps every rule, and a change that breaks each of them
# ---------------------------------------------------------------------------------------------------------------------

SMALL = {
    "csrc_triton/__init__.py": "",
    "csrc_triton/common.py": "import triton",
    "csrc_triton/tiles.py": "from .common import anything",
    "npo_kernels/__init__.py": "from npo_kernels.explain import explain\n__version__ = '0'",
    "npo_kernels/core/__init__.py": "",
    "npo_kernels/core/plan.py": "from dataclasses import dataclass\n_mine = 1\nprint(_mine)",
    "npo_kernels/core/task.py": "from . import plan\nfrom .plan import make_plan",
    "npo_kernels/backends/__init__.py": "",
    "npo_kernels/backends/tiles.py": "from csrc_triton.tiles import TILES",
    "npo_kernels/backends/torch.py": "import torch\nfrom npo_kernels.core import plan\ntorch._C",
    "npo_kernels/backends/triton.py": "import triton\nfrom triton.tools import x\nfrom csrc_triton.common import k",
    "npo_kernels/backends/choose.py": (
        "import importlib.util\nHAS_TRITON = importlib.util.find_spec('triton')\n"
        "def choose():\n    from npo_kernels.backends import triton\n    return triton"
    ),
    "npo_kernels/reference.py": "import torch",
    "npo_kernels/call/__init__.py": "",
    "npo_kernels/ops/__init__.py": "from npo_kernels.call import x\nfrom npo_kernels.backends.choose import choose",
    "npo_kernels/losses.py": "import npo_kernels.ops",
    "npo_kernels/logprobs.py": "from npo_kernels import reference",
    "npo_kernels/linear_kl.py": "",
    "npo_kernels/user_losses.py": "",
    "npo_kernels/statistics.py": "",
    "npo_kernels/explain.py": "from npo_kernels import losses",
    "npo_kernels/env.py": "from npo_kernels import __version__",
    "npo_kernels/hf/__init__.py": "",
    "training/__init__.py": "",
    "training/steps.py": "from npo_kernels.core import plan as p\nfrom training import methods\np.make_plan()",
    "training/methods/__init__.py": "from training import store",
    "training/store.py": "",
    "training/benchmarks/__init__.py": "from training.steps import x",
    "training/reports/__init__.py": "from training.benchmarks import Benchmark",
    "training/papers/__init__.py": "from training.reports import x",
    "training/commands/__init__.py": "",
    "training/commands/unlearn.py": "from training import benchmarks, papers, reports, steps",
    "training/commands/grid.py": "from training.commands import unlearn",
    "bench/__init__.py": "",
}  # fmt: skip
CORE, PLAN, TORCH = "npo_kernels/core/new.py", "npo_kernels/core/plan.py", "npo_kernels/backends/torch.py"
STEPS, METHOD, BENCHMARK = "training/steps.py", "training/methods/new.py", "training/benchmarks/new.py"
BROKEN = [
    (every_module_has_a_floor, "npo_kernels/new.py", "", ["npo_kernels/new.py"]),
    (every_module_has_a_floor, "npo_kernels/wing/new.py", "", ["npo_kernels/wing/new.py"]),
    (no_entry_of_the_table_is_empty, "npo_kernels/call/__init__.py", None, ["npo_kernels.call"]),
    (imports_go_down, CORE, "\nimport npo_kernels.call", [f"{CORE}:2 npo_kernels.call"]),
    (imports_go_down, TORCH, "from npo_kernels import losses", [f"{TORCH}:1 npo_kernels.losses"]),
    (imports_go_down, CORE, "from ..ops import x", [f"{CORE}:1 npo_kernels.ops"]),
    (imports_go_down, CORE, "from npo_kernels import __version__", [f"{CORE}:1 npo_kernels"]),
    (imports_go_down, CORE, "def f():\n    from ..hf import x", [f"{CORE}:2 npo_kernels.hf"]),
    (no_circles, PLAN, "from npo_kernels.core import task", ["npo_kernels.core.plan npo_kernels.core.task"]),
    (no_circles, PLAN, "def f():\n    from . import task", ["npo_kernels.core.plan npo_kernels.core.task"]),
    (no_circles, "csrc_triton/common.py", "from . import tiles", ["csrc_triton.common csrc_triton.tiles"]),
    (no_circles, "training/store.py", "from training import steps", ["training.methods training.steps training.store"]),
    (the_engine_knows_no_wing, STEPS, "from training.benchmarks import base", [f"{STEPS}:1 training.benchmarks"]),
    (the_engine_knows_no_wing, METHOD, "def f():\n    import training.benchmarks", [f"{METHOD}:2 training.benchmarks"]),
    (the_engine_knows_no_wing, BENCHMARK, "from training import reports", [f"{BENCHMARK}:1 training.reports"]),
    (commands_are_leaves, "bench/new.py", "from training.commands import unlearn", ["bench/new.py:1"]),
    (commands_are_leaves, "training/commands/grid.py", "import training.unlearn", ["training/commands/grid.py:1"]),
    (core_imports_no_backend, CORE, "from npo_kernels.backends import torch", [f"{CORE}:1"]),
    (core_imports_no_backend, CORE, "from npo_kernels.backends.choose import choose", [f"{CORE}:1"]),
    (core_imports_no_backend, CORE, "def f():\n    import csrc_triton.tiles", [f"{CORE}:2"]),
    (backends_import_neither_calls_nor_operators, TORCH, "from npo_kernels import call, ops", [f"{TORCH}:1"] * 2),
    (triton_is_imported_in_one_place, TORCH, "import triton", [f"{TORCH}:1"]),
    (triton_is_imported_in_one_place, "npo_kernels/env.py", "import triton.language as tl", ["npo_kernels/env.py:1"]),
    (triton_is_imported_in_one_place, TORCH, "def f():\n    from triton import language", [f"{TORCH}:2"]),
    (triton_is_imported_in_one_place, TORCH, "importlib.import_module('triton.knobs')", [f"{TORCH}:1"]),
    (kernels_are_imported_by_the_triton_backend, TORCH, "from csrc_triton import tiles", [f"{TORCH}:1"]),
    (the_triton_backend_is_imported_where_one_is_chosen, TORCH, "from . import triton", [f"{TORCH}:1"]),
    (the_triton_backend_is_imported_where_one_is_chosen, TORCH, "from .triton import x", [f"{TORCH}:1"]),
    (private_names_stay_at_home, "bench/new.py", "from npo_kernels.core.plan import _mine", ["bench/new.py:1 _mine"]),
    (private_names_stay_at_home, "bench/new.py", "def f():\n    from training import _x", ["bench/new.py:2 _x"]),
    (private_names_stay_at_home, "bench/new.py", "import training.steps as s\ns._x.y", ["bench/new.py:2 _x"]),
    (private_names_stay_at_home, "bench/new.py", "import training.steps\ntraining.steps._x()", ["bench/new.py:2 _x"]),
    (private_names_stay_at_home, CORE, "from . import plan\nplan._mine", [f"{CORE}:2 _mine"]),
    (private_names_stay_at_home, CORE, "from . import plan as p\nsetattr(p, '_mine', 2)", [f"{CORE}:2 _mine"]),
]  # fmt: skip


def build(root: Path, files: dict[str, str]) -> House:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return House(root)


def test_a_small_house_keeps_every_rule(tmp_path):
    small = build(tmp_path, SMALL)
    assert {rule.__name__: rule(small) for rule in RULES} == {rule.__name__: [] for rule in RULES}


@pytest.mark.parametrize(("rule", "path", "text", "wrong"), BROKEN, ids=[rule.__name__ for rule, *_ in BROKEN])
def test_what_breaks_a_rule_is_found(tmp_path, rule, path, text, wrong):
    files = {**SMALL, path: text}
    assert rule(build(tmp_path, {p: t for p, t in files.items() if t is not None})) == wrong


def test_every_rule_has_something_that_breaks_it():
    assert {rule for rule, *_ in BROKEN} == set(RULES)


def test_the_figures_of_the_small_house(tmp_path):
    found = figures(build(tmp_path, SMALL), "npo_kernels")
    assert found == {"modules": 20, "lines": 26, "arrows": 10, "floors": 7, "circles": 0, "above 350 lines": []}


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def figures(house: House, package: str) -> dict[str, object]:
    graph = house.graph(package)
    lines = {name: len(house.modules[name].text.splitlines()) for name in graph}
    return {
        "modules": len(graph),
        "lines": sum(lines.values()),
        "arrows": sum(map(len, graph.values())),
        "floors": height(graph),
        "circles": len(circles(graph)),
        "above 350 lines": [f"{name} ({count})" for name, count in lines.items() if count > 350],
    }


def main(root: Path = ROOT) -> None:
    house = House(root)
    titles = list(figures(house, PACKAGES[0]))
    print(f"| package | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
    for package in PACKAGES:
        cells = [", ".join(v) if isinstance(v, list) else str(v) for v in figures(house, package).values()]
        print(f"| {package} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
