"""The quickstart notebook runs, and prints what its committed outputs show.

Its cells run without Jupyter, in one namespace and in their order. After a change of the notebook, write its outputs
again (needs jupyter), from the root of the repository:

    PYTHONWARNINGS=ignore PYTHONPATH=. jupyter nbconvert --to notebook --execute --inplace examples/quickstart.ipynb
"""

import contextlib
import io
import json
import linecache
import re
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def printed(cell: dict) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def run(cell: dict, name: str, namespace: dict) -> str:
    """What the cell prints."""
    source = "".join(cell["source"])
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name  # for inspect.getsource
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, name, "exec"), namespace)
    return out.getvalue()


def same_line(found: str, committed: str) -> bool:
    """Equal words; numbers may differ as those of another machine do: 30 % of a memory peak, 0.1 of a probability."""
    if NUMBER.sub("", found).split() != NUMBER.sub("", committed).split():
        return False
    pairs = zip(NUMBER.findall(found), NUMBER.findall(committed), strict=True)
    close = (abs(float(a) - float(b)) <= (0.1 if "." in b else 0.3 * float(b)) for a, b in pairs)
    return all(close)


def test_the_notebook_runs_and_its_outputs_are_not_stale(monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    plt.switch_backend("Agg")
    monkeypatch.setenv("NPO_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))  # of the process that measures memory
    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf().axes) or plt.close("all"))
    threads, namespace = torch.get_num_threads(), {"__name__": "__main__"}
    try:
        for number, cell in enumerate(CODE):
            lines = run(cell, f"<cell {number}>", namespace).splitlines()
            committed = printed(cell).splitlines()
            for line in lines:  # fewer than are committed, as NPO_QUICK skips some measurements
                assert any(same_line(line, other) for other in committed), (line, committed)
            assert bool(lines) == bool(committed)
    finally:
        torch.set_num_threads(threads)
    assert [len(axes) for axes in figures] == [1, 3]
    assert not list(tmp_path.iterdir())


def test_the_committed_notebook_was_run_in_order_without_warnings():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    assert NOTEBOOK.stat().st_size < 300_000


def test_links_of_the_notebook_lead_to_files():
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    missing = [link for link in links if not (NOTEBOOK.parent / link).exists()]
    assert not missing
