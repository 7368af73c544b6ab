"""`sllm serve`: the server process, its signals and its connections."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from data_prep.common.errors import UserError, counted, log
from pipeline.models.inference import load_for_generation
from pipeline.parallel.device import DeviceName, DtypeName
from pipeline.serving.app import Server, Settings
from pipeline.serving.batcher import Batcher

KEY_VARIABLE = "SLLM_API_KEY"
BACKLOG = 2048  # connections that wait to be accepted
HEADER_SECONDS = 10.0  # for a connection's first request to arrive
TEMPLATE = "chat_template.jinja"  # in a model folder or its tokenizer folder, as transformers names it


class Connection(H11Protocol):
    """A connection that is closed when its first request does not arrive: others need the place."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._too_late = self.loop.call_later(HEADER_SECONDS, self._close_idle)

    def _close_idle(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._too_late.cancel()
        super().connection_lost(exc)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    folder: str,
    host: str,
    port: int,
    rows: int,
    most_waiting: int,
    settings: Settings,
    drain_seconds: float,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    int8: bool = False,
) -> None:
    """Serve a model folder until TERM or Ctrl-C; HUP reads the folder again.

    Raises: UserError for a folder without a model, a port in use, or an open address without a key.
    """
    require_key(host, settings.key)
    listening = _listen(host, port)
    batcher = Batcher(
        folder, rows, most_waiting, partial(load_for_generation, int8=int8, device=device, dtype=dtype)
    )
    server = Server(batcher, settings)
    config = uvicorn.Config(
        server.app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        backlog=BACKLOG,
    )
    address = listening.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    log(f"serving {folder} as {batcher.loaded.name!r} at http://{shown}:{address[1]}")
    asyncio.run(_run(_Uvicorn(config), listening, batcher, drain_seconds))
    log("stopped")


async def _run(
    server: uvicorn.Server, listening: socket.socket, batcher: Batcher, drain_seconds: float
) -> None:
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    async def drain() -> None:
        await stopping.wait()
        open_texts = counted(batcher.generating + batcher.waiting, "text is", "texts are")
        log(f"shutting down: {open_texts} finished first")
        await asyncio.to_thread(batcher.close, drain_seconds)
        server.should_exit = True

    def stop() -> None:
        if stopping.is_set():  # a second signal
            server.force_exit = server.should_exit = True
            threading.Thread(target=batcher.close, args=(0.0,), daemon=True).start()
        stopping.set()

    def reload() -> None:
        try:
            batcher.reload()
        except UserError as error:
            log(f"the old model stays: {error}")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, lambda: threading.Thread(target=reload, daemon=True).start())
    draining = asyncio.create_task(drain())
    await server.serve([listening])
    draining.cancel()


def require_key(host: str, key: str | None) -> None:
    """Raises: UserError for an address that others reach, without a key."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not key:
        raise UserError(
            f"--host {host} can be reached by others: set {KEY_VARIABLE} (or --api-key), or serve on "
            "127.0.0.1"
        )


def find_key(given: str | None) -> str | None:
    """The key that clients must send: as given, or from the environment."""
    key = given or os.environ.get(KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError("the API key must be printable ASCII without spaces: it travels in a header")
    return key


def find_template(folder: str, given: str | None) -> str | None:
    """The chat template: a file as given, or the model folder's own."""
    if given is not None:
        return Path(given).read_text(encoding="utf-8")
    for path in (Path(folder) / TEMPLATE, Path(folder) / "tokenizer" / TEMPLATE):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port") from None
    return listening
