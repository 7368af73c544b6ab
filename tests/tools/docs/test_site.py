"""The docs site, its diagrams and its prose."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY

from data_prep.common.charts import figure_svg
from tools.docs import prose
from tools.docs.pictures import ASSETS, PICTURES
from tools.docs.prose import sentences


@pytest.mark.parametrize("name", PICTURES)
def test_diagrams_are_what_their_code_draws(name: str) -> None:
    draw, label = PICTURES[name]
    text = (ASSETS / f"{name}.svg").read_text(encoding="utf-8")
    assert text == figure_svg(draw().figure, label) + "\n", "run `make results`"
    assert f'aria-label="{label}"' in text and "prefers-color-scheme: dark" in text


def test_every_diagram_is_on_a_page() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert [name for name in PICTURES if f"assets/{name}.svg)" not in text] == []


def test_sentences_of_readme_and_tutorials_are_short(capsys: pytest.CaptureFixture) -> None:
    assert prose.prose() == 0, capsys.readouterr().out
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_prose_alone_is_counted() -> None:
    text = "# Head\n\nOne two. Three\nfour!\n\n- item [link](a.md) one\n- item two\n\n"
    text += "```\ncode. more.\n```\n| a | b |\n> Five. Six\n"
    assert sentences(text) == ["One two.", "Three four!", "item link one", "item two", "Five.", "Six"]


@pytest.mark.long
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) > 35
    loaded = re.compile(
        r"<(?:script|link|img|iframe|source)[^>]*?(?:src|href)=\"(?:https?:)?//", re.IGNORECASE
    )
    assert [str(path) for path, text in pages.items() if loaded.search(text)] == []
    commands = pages[site / "reference/commands.html"]
    assert all(f"sllm {name}" in commands for name in ("train", "serve", "evaluate"))
    assert "generate_many" in pages[site / "reference/python.html"]
