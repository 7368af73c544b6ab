"""Every `sllm …` and `data-prep …` command that README.md and docs/ show is one that the programs accept."""

from __future__ import annotations

import re
import shlex

import pytest
from cyclopts import App
from helpers.paths import REPOSITORY

from data_prep.cli.commands import app as data_prep_app
from data_prep.common.command_line import parse
from data_prep.common.errors import UserError
from pipeline.cli.main import app as sllm_app

APPS = {"sllm": sllm_app, "data-prep": data_prep_app}
# Result pages and the lab book name the commands of their day.
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES += [
    page for name in ("tutorials", "how-to") for page in sorted((REPOSITORY / "docs" / name).glob("*.md"))
]
BLOCK = re.compile(r"^```\w*\n(.*?)^```|^((?: {4}\S.*\n(?: {4}.*\n)*))", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COMMAND = re.compile(r"(?:^|\s|/bin/)((?:sllm|data-prep) +[a-z].*)")
# Prose may leave out what a command needs, but names no unknown command, option or value.
INCOMPLETE = re.compile(r"requires an argument|no command|Invalid values for group|unable to convert")


def commands(text: str) -> list[str]:
    """The command of each line that holds one, without its comment."""
    lines = [re.split(r"(?:^|\s)#", line)[0] for line in text.replace("\\\n", " ").splitlines()]
    return [match.group(1) for line in lines if (match := COMMAND.search(line))]


def words_of(command: str) -> list[str]:
    """Words of a command; of a synopsis, the first of each choice, with everything that is optional."""
    command = re.sub(r"\(([^()|]*)\|[^()]*\)", r"\1", command)
    command = re.sub(r"\b(\w+)(\|\w+)+", r"\1", re.sub(r"\[\.gz\]|…", "", command))
    command = command.replace("[", " ").replace("]", " ")
    words = shlex.split(re.split(r" [>|;&]|[;)] ", command)[0])
    return ["1" if word in ("N", "W") else word for word in words]


def documented() -> list[tuple[str, str, bool]]:
    """(page, command, whether it must be complete)"""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            lines = commands(block.group(1) or block.group(2))
            found += [(page.name, command, "…" not in command) for command in lines]
        for span in INLINE.findall(BLOCK.sub("\n", text)):
            found += [(page.name, command, False) for command in commands(span.replace("\n", " "))]
    return found


def test_commands_are_found() -> None:
    found = documented()
    assert len([command for _, command, complete in found if complete]) > 25 and len(found) > 90
    assert {page for page, *_ in found} >= {"README.md", "generation.md", "evaluation.md", "clusters.md"}


@pytest.mark.parametrize(("page", "command", "complete"), documented())
def test_a_documented_command_is_accepted(page: str, command: str, complete: bool) -> None:
    program, *words = words_of(command)
    try:
        parse(APPS[program], words)
    except UserError as error:
        assert not complete and INCOMPLETE.search(str(error)), error


def leaves(app: App, *words: str) -> list[tuple[str, ...]]:
    """Every command of a program, in words."""
    names = [name for name in app if not name.startswith("-")]
    return [leaf for name in names for leaf in leaves(app[name], *words, name)] or [words]


LEAVES = [(program, *words) for program, app in APPS.items() for words in leaves(app)]
# Lines for machines already; conversations; files.
WITHOUT_JSON = ("segment", "stage", "serve", "chat", "train", "lm-eval")


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_the_help_of_every_command_has_its_example(
    words: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    parse(APPS[words[0]], [*words[1:], "--help"])()
    said = " ".join(capsys.readouterr().out.split())
    assert f"{' '.join(words)} " in said.partition("example: ")[2]
    assert ("--json" in said) == (words[1] not in WITHOUT_JSON)
