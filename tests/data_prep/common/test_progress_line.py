"""The progress of `data-prep shard`: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from data_prep.common import progress_line as progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def counts(done: int) -> SimpleNamespace:
    return SimpleNamespace(
        done=done, total=4_000_000, documents=done // 1000, rejected=2, documents_rate=50.0
    )


def test_a_log_gets_a_plain_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    line = progress.ProgressLine(log)
    line(counts(0))
    assert log.getvalue() == ""  # ten seconds are not over
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    line(counts(1_000_000))
    line(counts(3_000_000))
    line.close()
    first, second = log.getvalue().splitlines()
    assert first.startswith("data-prep shard: 1.00M/4.00M [00:00<00:00, ")
    assert second.startswith("data-prep shard: 3.00M/4.00M [00:00<00:00, ")
    assert "B/s, 1,000 documents (50/s), 2 rejected]" in first
    assert not set("\r\x1b") & set(log.getvalue())


def test_a_terminal_gets_a_bar_and_a_resumed_run_counts_its_own_speed() -> None:
    terminal = Terminal()
    line = progress.ProgressLine(terminal)
    for done in (2_000_000, 2_000_000, 4_000_000):
        line(counts(done))
    line.close()
    assert "data-prep shard:  50%|" in terminal.getvalue()
    assert "100%|" in terminal.getvalue() and "4.00M/4.00M" in terminal.getvalue()
