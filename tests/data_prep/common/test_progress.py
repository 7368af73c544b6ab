"""The progress of a job, read from its work folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import tokenizer_folders

from data_prep.common import progress
from data_prep.jobs.run import make_shards
from data_prep.shards.settings import ShardSettings
from data_prep.text.sentences import SentenceSettings


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.launch)])
def test_progress_grows_from_nothing_to_all_phases(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.0)
    lines = [json.dumps({"content": f"{n} " + tokenizer_folders.ENGLISH}) for n in range(300)]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, "bad"]))
    tokenizer = tokenizer_folders.byte_level(tmp_path / "tokenizer")
    settings = ShardSettings(SentenceSettings("clause", "en", 64), deduplicate=True, unit_bytes=20_000)
    seen: list[tuple[int, int, int]] = []
    rates: list[float] = []

    def report(now: progress.Progress) -> None:
        seen.append((now.done, now.documents, now.rejected))
        rates.append(now.documents_rate)

    make_shards([tmp_path / "x.jsonl"], tmp_path / "s", tokenizer, settings, workers, report=report)
    done = [one[0] for one in seen]
    size = (tmp_path / "x.jsonl").stat().st_size
    assert done[0] == 0 and len(set(done)) > 2 and done[-1] == 2 * size
    assert seen[-1][1:] == (300, 1)
    assert workers > 1 or max(rates) > 0
