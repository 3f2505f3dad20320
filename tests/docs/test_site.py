"""The configuration of the site: warnings stop the build, and links that leave docs/ lead into the repository."""

import re
import subprocess
import sys

import pytest
import yaml
from mkdocs.config import load_config
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs import hooks
from tests.docs.blocks import ROOT


def config(**changes):
    return load_config(str(ROOT / "mkdocs.yml"), **changes)


@pytest.fixture
def rewritten():
    """The Markdown of a page after the hook, and the files of the site."""

    def rewrite(text, source="guides/a.md", **changes):
        settings = config(**changes)
        settings.plugins._current_plugin = "hooks"  # MkDocs sets it while it runs a hook
        files = Files([File(source, settings.docs_dir, settings.site_dir, settings.use_directory_urls)])
        page = Page(None, next(iter(files)), settings)
        return hooks.on_page_markdown(text, page=page, config=settings, files=files), files

    return rewrite


def test_a_link_that_leaves_the_pages_leads_into_the_repository(rewritten):
    text = "See [results](../../bench/RESULTS.md#targets) and [the tests](../../tests)."
    url = "https://example.org/project/"
    assert rewritten(text, repo_url=url)[0] == (
        "See [results](https://example.org/project/blob/main/bench/RESULTS.md#targets) and "
        "[the tests](https://example.org/project/tree/main/tests)."
    )
    assert rewritten(text, repo_url="")[0] == (
        'See <span title="bench/RESULTS.md in the repository">results</span> and '
        '<span title="tests in the repository">the tests</span>.'
    )


@pytest.mark.parametrize(
    "text",
    [
        "[a](../concepts/loss.md)",
        "[a](../../missing.md)",
        "[a](https://a.org)",
        "[a](#b)",
        "```\n[a](../../README.md)\n```",
    ],
)
def test_other_links_and_code_stay_as_they_are(rewritten, text):
    assert rewritten(text, repo_url="https://example.org")[0] == text


def test_an_image_of_the_repository_is_copied_into_the_site(rewritten):
    (image,) = (ROOT / "bench" / "results").glob("cpu_*.png")
    text, files = rewritten(f"![times](../../bench/results/{image.name})")
    assert text == f"![times](../repository/bench/results/{image.name})"
    assert files.get_file_from_path(f"repository/bench/results/{image.name}").abs_src_path == str(image)


B = {"b.md": "# B\n"}
SITES = {  # pages, and those of the navigation
    "nothing wrong": ({"index.md": "[a](b.md#b)\n", **B}, ["index.md", "b.md"]),
    "a missing page": ({"index.md": "[a](missing.md)\n"}, ["index.md"]),
    "a missing heading": ({"index.md": "[a](b.md#missing)\n", **B}, ["index.md", "b.md"]),
    "a page outside the navigation": ({"index.md": "# A\n", **B}, ["index.md"]),
    "a missing page of the navigation": ({"index.md": "# A\n"}, ["index.md", "b.md"]),
}


@pytest.mark.parametrize("name", SITES)
def test_a_warning_stops_the_build(name, tmp_path):
    """With the settings of mkdocs.yml and the options of `make docs`, on small pages."""
    pages, nav = SITES[name]
    validation = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)["validation"]
    settings = {"site_name": "a", "nav": nav, "plugins": [], "validation": validation}
    (tmp_path / "docs").mkdir()
    for page, text in pages.items():
        (tmp_path / "docs" / page).write_text(text)
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    (options,) = re.findall(r"-m mkdocs build(.*)", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", "mkdocs", "build", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == ("strict mode" in output) == (name != "nothing wrong"), output
