"""docs/methods.md and docs/benchmarks.md are what `python -m docs.generate` writes."""

import json
import shutil

import pytest

from bench.records import RESULTS
from docs import generate, measurements
from training.methods import METHODS


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_is_up_to_date(name):
    written = (generate.FOLDER / name).read_text(encoding="utf-8")
    assert written == generate.PAGES[name](), f"docs/{name} is out of date: run `make docs-generate` and commit it"


def test_the_page_of_methods_has_all_of_them():
    page = generate.methods_page()
    for method in METHODS.values():
        assert f"| `{method.name}` |" in page and f"    {method.formula}\n" in page


def test_the_page_of_benchmarks_follows_the_records(tmp_path):
    """Without a run its GPU is gone, and with another measurement the cell has another value."""
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    before = measurements.page(tmp_path)
    assert before == measurements.page()
    path = tmp_path / "cpu.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["provider"] == "npo_kernels/torch" and record["metric"] == "ms":
            record["value"] = 123456.0
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for folder in tmp_path.glob("h200_*"):
        shutil.rmtree(folder)
    after = measurements.page(tmp_path)
    assert "H200" in before and "H200" not in after
    assert "123456" in after and "123456" not in before
