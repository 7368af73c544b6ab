"""`sllm serve` in this process: the real application and connections, in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from pipeline.serving.app import Server, Settings
from pipeline.serving.batcher import Batcher
from pipeline.serving.run import Connection, _listen, _Uvicorn


@dataclass
class Serving:
    url: str
    port: int
    batcher: Batcher


@contextmanager
def serving(
    folder: str, settings: Settings | None = None, rows: int = 32, queue: int = 256
) -> Iterator[Serving]:
    batcher = Batcher(folder, rows, queue)
    listening = _listen("127.0.0.1", 0)
    app = Server(batcher, settings or Settings()).app
    server = _Uvicorn(uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    port = listening.getsockname()[1]
    try:
        yield Serving(f"http://127.0.0.1:{port}", port, batcher)
    finally:
        server.should_exit = True
        batcher.close(5)
        thread.join(20)


def wait_for(done, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "too late"
        time.sleep(0.02)
