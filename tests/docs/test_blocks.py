"""Every ```python block of the documents runs, on a CPU and without a network."""

import textwrap

import pytest
import torch

from tests.docs import blocks


@pytest.mark.parametrize("page", blocks.pages(), ids=lambda page: str(page.relative_to(blocks.ROOT)))
def test_the_code_blocks_of_a_page_run(page, tmp_path, monkeypatch, tried):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    result = blocks.run(page)
    for skipped in result.skipped:
        print(f"{page.name}, {skipped}")
        assert not skipped.endswith(": no reason"), f"{page.name}, {skipped} for the skip"
        tried(f"code blocks skipped ({page.name}, {skipped})")
    assert result.ran + len(result.skipped) == blocks.count(page), "some blocks were not found by the parser"
    tried("code blocks of documents run", result.ran)


def test_blocks_with_a_title_are_on_the_page_whose_own_test_runs_them():
    """tests/docs/test_extending.py follows the recipes; on another page nothing would run such a block."""
    for page in blocks.pages():
        if page != blocks.ROOT / "docs" / "extending.md":
            assert "```python title=" not in page.read_text(encoding="utf-8"), page


def write(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(textwrap.dedent(text))
    return page


def test_a_block_that_raises_fails(tmp_path):
    page = write(tmp_path, "```python\nassert 1 + 1 == 3\n```\n")
    with pytest.raises(AssertionError):
        blocks.run(page)


def test_blocks_share_a_namespace_with_invisible_ones(tmp_path):
    page = write(tmp_path, "<!-- invisible-code-block: python\na = 1\n-->\n\n```python\nassert a == 1\n```\n")
    assert blocks.run(page) == blocks.Run(2, []) and blocks.count(page) == 2


def test_a_skip_keeps_its_reason(tmp_path):
    page = write(tmp_path, '<!-- skip: next "needs a GPU" -->\n\n```python\n1 / 0\n```\n')
    assert blocks.run(page).skipped == ["line 3: needs a GPU"]


def test_blocks_that_the_parser_misses_are_counted(tmp_path):
    page = write(tmp_path, '```python hl_lines="1"\n1 / 0\n```\n\n```py\n1 / 0\n```\n')
    assert blocks.run(page).ran < blocks.count(page) == 2


def test_a_step_of_a_recipe_does_not_run_here(tmp_path):
    page = write(tmp_path, '```python title="a.py"\n1 / 0\n```\n\n```python\nassert True\n```\n')
    assert blocks.run(page).ran == blocks.count(page) == 1
