"""Hooks of the docs site (`mkdocs.yml`): README.md is its home page, and the contributors' pages are on it.

Links to files of the repository that are not on the site become plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


# Page of the site: file of the repository.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are files beside docs/."""
    from mkdocs.structure.files import File

    names = {name: page for page, name in PAGES.items()}

    def inside(target: str) -> str:
        path, hash_, anchor = target.partition("#")
        return names.get(path, path.removeprefix("docs/")) + hash_ + anchor

    for page, name in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        content = LINK.sub(lambda found: _link(found, inside), text)
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the pages of the site; those that have none lose their address."""
    here = (ROOT / "docs" / page.file.src_uri).parent
    up = "../" * page.file.src_uri.count("/")
    outside = {ROOT / name: page for page, name in PAGES.items()}

    def kept(target: str) -> str:
        path, hash_, anchor = target.partition("#")
        if not path or "://" in target or path in PAGES:
            return target
        place = (here / path).resolve()
        if place in outside:
            return f"{up}{outside[place]}{hash_}{anchor}"
        return target if place.is_relative_to(ROOT / "docs") and place.is_file() else ""

    return LINK.sub(lambda found: _link(found, kept), markdown)


def _link(found: re.Match[str], change: Callable[[str], str]) -> str:
    bang, text, target = found.groups()
    target = change(target)
    return f"{bang}[{text}]({target})" if target else text
