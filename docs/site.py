"""Makes a site of pages that are read in the repository as well: README.md is its front page, and files outside docs/
that pages link to (results, configurations) become part of it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FRONT = "index.md"
_LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page, and what pages link to, and what that links to."""
    files.append(File.generated(config, FRONT, abs_src_path=str(ROOT / "README.md")))
    pages = [ROOT / "README.md", *(Path(f.abs_src_path) for f in files.documentation_pages() if f.src_uri != FRONT)]
    while pages:
        page = pages.pop()
        for link in _LINK.finditer(page.read_text()):
            target = (page.parent / link[2]).resolve()
            place = _place(target)
            if place and target.is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(target)))
                if target.suffix == ".md":
                    pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they are between the files of the site."""
    source = ROOT / "README.md" if page.file.src_uri == FRONT else Path(page.file.abs_src_path)

    def moved(link: re.Match[str]) -> str:
        place = _place((source.parent / link[2]).resolve())
        if place is None:
            return link[0]
        return link[1] + posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".") + link[3]

    return _LINK.sub(moved, markdown)


def _place(target: Path) -> str | None:
    """Where a file of the repository is in the site; None for what is no file of it."""
    if not target.exists() or not target.is_relative_to(ROOT):
        return None
    if target == ROOT / "README.md":
        return FRONT
    inside = ROOT / "docs"
    return target.relative_to(inside if target.is_relative_to(inside) else ROOT).as_posix()
