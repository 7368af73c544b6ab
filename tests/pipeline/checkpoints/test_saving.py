"""What a kill between two steps of a save leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.checkpoints import saving, store


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("at", ["rmtree", "rename", "flush", "latest", None])
def test_latest_never_names_a_checkpoint_that_is_not_there(
    at: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment `latest` names the checkpoint before or the new one, and that one is in place."""
    old, new = store.step_name(10), store.step_name(20)
    (tmp_path / old).mkdir()
    (tmp_path / "latest").write_text(f"{old}\n")
    aside = tmp_path / f"{store.TMP}{new}"
    aside.mkdir()
    (aside / "meta.json").write_text("{}")

    def killed_before(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == at:
                raise Killed
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(saving.shutil, "rmtree", killed_before("rmtree", saving.shutil.rmtree))
    monkeypatch.setattr(saving.os, "rename", killed_before("rename", saving.os.rename))
    monkeypatch.setattr(saving, "flush_to_disk", killed_before("flush", saving.flush_to_disk))
    monkeypatch.setattr(saving, "write_atomically", killed_before("latest", saving.write_atomically))
    try:
        saving._make_current(tmp_path, aside, new, SimpleNamespace(best=None))
    except Killed:
        assert at is not None
    else:
        assert at is None
    latest = (tmp_path / "latest").read_text().strip()
    assert latest == (new if at is None else old)
    assert (tmp_path / latest).is_dir()
    if latest == new:
        assert (tmp_path / new / "meta.json").exists()
