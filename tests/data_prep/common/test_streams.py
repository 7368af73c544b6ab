"""Output that cannot be written or encoded ends no run and prints no trace. Surroundings change no byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tokenizer_folders
from helpers.data_prep_command import contents
from helpers.paths import REPOSITORY

pytestmark = pytest.mark.launch

DATA_PREP = f"{sys.executable} -m data_prep.cli"
SLLM = f"{sys.executable} -m pipeline.cli"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | environment
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=settings,
        errors="replace",
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A field, a folder and a text that are not ASCII, and an unread file with such a name."""
    folder = tmp_path_factory.mktemp("corpus") / "语料"
    folder.mkdir()
    records = [{"正文": f"你好 {n}。世界。", "n": 10**700 + n, "tags": ["a", "b"]} for n in range(40)]
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (folder / "é.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "未读.br").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def shard(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The command, but for its output folder."""
    tokenizer = tokenizer_folders.byte_level(tmp_path_factory.mktemp("tokenizer") / "t")
    rules = "--text-field 正文 --filter 'n>5' --lang zh --unit-mb 0.001 --shard-documents 7"
    return f"{DATA_PREP} shard --input {corpus} --tokenizer {tokenizer} {rules} --output"


@pytest.fixture(scope="module")
def reference(shard: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("reference") / "s"
    done = shell(f"{shard} {output}")
    assert done.returncode == 0, done.stderr
    return contents(output)


@pytest.mark.parametrize(
    ("environment", "redirection"),
    [
        ({"PYTHONINTMAXSTRDIGITS": "640", "PYTHONHASHSEED": "1"}, ""),
        ({"PYTHONINTMAXSTRDIGITS": "0", "PYTHONHASHSEED": "2", "LC_ALL": "POSIX"}, ">&- 2>&- <&-"),
        ({"PYTHONIOENCODING": "ascii", "TZ": "Asia/Tokyo"}, "2>&-"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "> >(true) 2> >(true)"),
    ],
)
def test_surroundings_change_no_byte(
    shard: str, reference: dict[str, bytes], tmp_path: Path, environment: dict[str, str], redirection: str
):
    done = shell(f"{shard} {tmp_path}/s --workers 2 {redirection}", **environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert contents(tmp_path / "s") == reference


@pytest.mark.parametrize("program", [DATA_PREP, SLLM])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_in_other_encodings(program: str, encoding: str):
    for words in ("--help", "shard --help" if program == DATA_PREP else "train --help"):
        done = shell(f"{program} {words}", PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, "") and "example" in done.stdout


@pytest.mark.parametrize(
    ("command", "statuses"),
    [
        (f"{SLLM} inspect --recipe demo-vae | true", (0, 141)),
        (f"{SLLM} inspect --recipe demo-vae >&-", (0,)),
        (f"{SLLM} inspect --recipe demo-vae 2>&- | cat", (0,)),
        (f"{SLLM} nonsense 2>&-", (2,)),
        (f"{SLLM} nonsense 2> >(true)", (2,)),
        (f"{DATA_PREP} nonsense >&- 2>&-", (2,)),
    ],
)
def test_closed_streams(command: str, statuses: tuple[int, ...]):
    done = shell(f"set -o pipefail; {command}")
    assert done.returncode in statuses and done.stderr == ""
