"""`sllm serve`: in this process (the real application and connections, in a thread), or as a process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
import uvloop

from pipeline.serving.app import Server, Settings
from pipeline.serving.batcher import Batcher
from pipeline.serving.run import Connection, _listen, _Uvicorn

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@dataclass
class Serving:
    url: str
    port: int
    batcher: Batcher
    connections: Callable[[], int]  # that are open


@contextmanager
def serving(
    folder: str, settings: Settings | None = None, rows: int = 32, queue: int = 256
) -> Iterator[Serving]:
    batcher = Batcher(folder, rows, queue)
    listening = _listen("127.0.0.1", 0)
    app = Server(batcher, settings or Settings()).app
    server = _Uvicorn(uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None))
    thread = threading.Thread(target=lambda: uvloop.run(server.serve([listening])), daemon=True)
    thread.start()
    port = listening.getsockname()[1]
    try:
        yield Serving(f"http://127.0.0.1:{port}", port, batcher, lambda: len(server.server_state.connections))
    finally:
        server.should_exit = True
        batcher.close(5)
        thread.join(20)


def wait_for(done, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "too late"
        time.sleep(0.02)


@dataclass
class Process:
    process: subprocess.Popen
    url: str
    lines: list[str]  # of its log


@contextmanager
def started(folder: str, *options: str) -> Iterator[Process]:
    """`sllm serve` as users start it, on a free port."""
    command = [sys.executable, "-m", "pipeline.cli", "serve", "--model", folder, "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True)
        reader.start()
        try:
            wait_for(lambda: any("serving" in line for line in lines) or process.poll() is not None, 120)
            yield Process(process, re.search(r"http://\S+", "".join(lines)).group(), lines)
        finally:
            if process.poll() is None:
                process.kill()


def post(url: str, data: bytes, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and body; the events of a stream are its `choices`."""
    request = urllib.request.Request(url, data, {"content-type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            data = answer.read()
            events = data.decode().split("\n\n") if data.startswith(b"data: ") else []
            return answer.status, {"choices": events} if events else json.loads(data)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
