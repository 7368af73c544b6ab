"""The snapshot of the public Python API: it is current, and a break is noticed and must be declared."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.paths import REPOSITORY

from tools.release.api import STUB, breaks, main, stub


def test_the_snapshot_is_current() -> None:
    assert (REPOSITORY / STUB).read_text(encoding="utf-8") == stub(REPOSITORY), "run `make api`"


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("def f(a, b=...): ...", "def f(a, b=..., c=...): ...", None),
        ("def f(a): ...", "def f(a, b): ...", "f"),
        ("def f(a, b): ...", "def f(a): ...", "f"),
        ("def f(a): ...", "def g(a): ...", "f"),
        ("class A:\n    def f(self, x): ...\n", "class A:\n    def f(self, y): ...\n", "A.f"),
    ],
)
def test_breaks(before: str, after: str, found: str | None) -> None:
    assert [one.split(":")[0] for one in breaks(before, after)][:1] == ([found] if found else [])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small project with one public function and its snapshot."""
    for folder in ("docs/reference", "pipeline"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "docs/reference/python.md").write_text("# API\n\n::: pipeline.text.cut\n")
    (tmp_path / "pipeline/__init__.py").touch()
    (tmp_path / "pipeline/text.py").write_text("def cut(text: str, at: int = 1) -> str: ...\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- nothing\n\n## 0.1\n\n- `cut`\n")
    return tmp_path


def run(checkout: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["api", "--root", str(checkout), *words])
    return main()


def test_an_undeclared_break_is_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(checkout, monkeypatch) == 0 and run(checkout, monkeypatch, "--check") == 0
    kept = (checkout / STUB).read_text()
    (checkout / "pipeline/text.py").write_text("def cut(text: str) -> str: ...\n")
    for words in ((), ("--check",)):
        assert run(checkout, monkeypatch, *words) == 1
    assert "name `cut` in CHANGELOG.md" in capsys.readouterr().out
    assert (checkout / STUB).read_text() == kept
    text = (checkout / "CHANGELOG.md").read_text()
    (checkout / "CHANGELOG.md").write_text(text.replace("- nothing", "- `cut` has no place any more"))
    assert run(checkout, monkeypatch) == 0
    assert (checkout / STUB).read_text() != kept


def test_an_addition_needs_no_declaration(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(checkout, monkeypatch) == 0
    (checkout / "pipeline/text.py").write_text("def cut(text: str, at: int = 1, by: str = '') -> str: ...\n")
    assert run(checkout, monkeypatch, "--check") == 1  # the snapshot is old
    assert run(checkout, monkeypatch) == 0
    assert "by" in (checkout / STUB).read_text()


def test_the_stub_has_all_kinds_of_parameters(checkout: Path) -> None:
    (checkout / "pipeline/text.py").write_text("def cut(a, /, b, *c, d: int, e=1, **f): ...\n")
    text = stub(checkout)
    assert "def cut(a, /, b, *c, d: 'int', e = ..., **f): ..." in text
    compile(text, "api.pyi", "exec")
