"""Links of the pages to files of the repository outside docs/, for MkDocs.

With `repo_url` of mkdocs.yml such a link leads to the file there; without one its text remains, with the path as a
tooltip. Images are copied into the site.
"""

import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
BRANCH = "main"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
FENCED = re.compile(r"^[ \t]*(```+|~~~+).*?^[ \t]*\1[ \t]*$|`[^`\n]+`", re.M | re.S)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    def rewrite(match: re.Match[str]) -> str:
        return _outside(match, page, config, files) or match[0]

    parts, end = [], 0  # code is left as it is, but for code inside the text of a link
    for code in FENCED.finditer(markdown):
        if code[1]:
            parts += [LINK.sub(rewrite, markdown[end : code.start()]), code[0]]
            end = code.end()
    return "".join([*parts, LINK.sub(rewrite, markdown[end:])])


def _outside(match: re.Match[str], page: Page, config: MkDocsConfig, files: Files) -> str | None:
    """What replaces a link that leaves docs/, or None. A file that does not exist is left for MkDocs to warn of."""
    target = urlsplit(match["target"])
    if target.scheme or target.netloc or not target.path or target.path.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), target.path))
    if path.startswith(("docs/", "..")) or not (ROOT / path).exists():
        return None
    if match["image"]:
        name = f"repository/{path}"
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
        return f"![{match['text']}]({posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or '.')})"
    if config.repo_url:
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        anchor = f"#{target.fragment}" if target.fragment else ""
        return f"[{match['text']}]({config.repo_url.rstrip('/')}/{kind}/{BRANCH}/{path}{anchor})"
    return f'<span title="{path} in the repository">{match["text"]}</span>'
