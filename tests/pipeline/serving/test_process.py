"""`sllm serve` as a process: signals under load, and what it refuses at the start."""

from __future__ import annotations

import json
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import tokenizer_folders
from helpers.model_folders import save_endless
from helpers.server import Process, started, wait_for

from data_prep.common.errors import run_main
from pipeline.cli import main as cli

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("served")
    return save_endless(place / "tiny", tokenizer_folders.byte_level(place / "tokenizer"))


@pytest.fixture
def server(folder: str) -> Iterator[Process]:
    with started(folder, "--rows", "4", "--drain-seconds", "2") as running:
        yield running


def test_every_accepted_request_is_answered_when_the_server_is_stopped(server: Process, folder: str) -> None:
    process, url, lines = server.process, server.url, server.lines
    config = Path(folder) / "config.json"
    right = config.read_bytes()
    config.write_bytes(b"[]")
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: any(line.startswith("the old model stays: ") for line in lines), 60)
    config.write_bytes(right)

    def ask(number: int) -> list[dict]:
        tokens = 20 if number % 2 else 4000
        body = {"model": "tiny", "prompt": "x", "max_tokens": tokens, "seed": number, "stream": True}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                data = answer.read().decode()
        except urllib.error.HTTPError as error:  # it waited in the queue
            return [json.loads(error.read())]
        return [json.loads(part[6:]) for part in data.split("\n\n") if part.startswith("data: {")]

    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, number) for number in range(16)]
        wait_for(lambda: sum('"status"' in line for line in lines) >= 1, 60)  # some are done
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        answers = [each.result(60) for each in asked]
    assert process.wait(30) == 0
    last = [answer[-1] for answer in answers]
    finished = [each for each in last if "choices" in each and each["choices"][0]["finish_reason"]]
    failed = [each["error"] for each in last if "error" in each]
    assert len(finished) + len(failed) == len(last) == 16
    assert finished and all(error["message"] == "the server is shutting down" for error in failed)
    assert "Traceback" not in "".join(lines) and lines[-1] == "stopped\n"


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert run_main("sllm", lambda: cli.main(["serve", *arguments])) == 2
    err = capsys.readouterr().err
    assert err.startswith("sllm: error: ") and err.count("\n") == 1
    return err


def test_what_is_refused_at_the_start(folder: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("SLLM_API_KEY", raising=False)
    assert "no config.json" in refused(capsys, "--model", str(tmp_path))
    assert "set SLLM_API_KEY" in refused(capsys, "--model", folder, "--host", "0.0.0.0")
    assert "printable ASCII" in refused(capsys, "--model", folder, "--api-key", "ключ")
    template = tmp_path / "t.jinja"
    template.write_text("{% for %}")
    assert "not valid Jinja" in refused(
        capsys, "--model", folder, "--port", "0", "--chat-template", str(template)
    )
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        assert f"cannot listen at 127.0.0.1:{port}" in refused(capsys, "--model", folder, "--port", port)
