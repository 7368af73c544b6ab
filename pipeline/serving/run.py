"""`sllm serve`: the server process, its signals and its connections."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h11
import uvicorn
import uvloop
from uvicorn.protocols.http.h11_impl import H11Protocol

from data_prep.common.errors import UserError, counted, first_line, log
from pipeline.models.inference import load_for_generation
from pipeline.parallel.device import DeviceName, DtypeName
from pipeline.serving.app import Server, Settings
from pipeline.serving.batcher import Batcher
from pipeline.serving.protocol import ApiError

KEY_VARIABLE = "SLLM_API_KEY"
BACKLOG = 2048  # connections that wait to be accepted
ARRIVAL_SECONDS = 20.0  # for a request to arrive, from its first byte (a connection's first: from its start)
UNREAD_SECONDS = 30  # after which the system cuts a connection whose reader takes nothing
TEMPLATE = "chat_template.jinja"  # in a model folder or its tokenizer folder, as transformers names it


class Connection(H11Protocol):
    """A connection that is closed when a request does not arrive whole in time: others need the place."""

    _too_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Start the clock of the request that arrives, or stop it."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_clock()
        elif self._too_late is None:
            self._too_late = self.loop.call_later(ARRIVAL_SECONDS, self.transport.abort)

    def _stop_clock(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """No HTTP: an answer in OpenAI's format, unless another one has been given."""
        if self.conn.our_state is h11.IDLE:
            data = json.dumps(ApiError(400, msg).body).encode()
            head = [("content-type", "application/json"), ("content-length", str(len(data)))]
            for event in (
                h11.Response(status_code=400, headers=[*head, ("connection", "close")]),
                h11.Data(data=data),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self.transport.close()


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
    chat_template: str | None,
    drain_seconds: float,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    int8: bool = False,
    batch_invariant: bool | None = None,
) -> None:
    """Serve a model folder until TERM or Ctrl-C; HUP reads the folder and the template again.

    chat_template: a file, in place of the folder's own.
    Raises: UserError for a folder without a model, a port in use, or an open address without a key.
    """
    require_key(host, settings.key)
    settings = replace(settings, chat_template=find_template(folder, chat_template))
    # Every connection needs a descriptor.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asked = threading.Event()
    signal.signal(signal.SIGHUP, lambda *_: asked.set())  # while the model is read, too
    listening = _listen(host, port)
    load = partial(
        load_for_generation, int8=int8, device=device, dtype=dtype, batch_invariant=batch_invariant
    )
    batcher = Batcher(folder, rows, most_waiting, load)
    server = Server(batcher, settings)

    def reload() -> None:
        while asked.wait():  # one at a time, however often it is asked for
            asked.clear()
            try:
                server.reload(find_template(folder, chat_template))
            except Exception as error:  # whatever a broken folder leads to
                log(f"the old model stays: {first_line(error)}")

    config = uvicorn.Config(
        server.app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        backlog=BACKLOG,
    )
    address = listening.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    log(f"serving {folder} as {batcher.loaded.name!r} at http://{shown}:{address[1]}")
    threading.Thread(target=reload, daemon=True).start()
    uvloop.run(_run(_Uvicorn(config), listening, batcher, asked, drain_seconds))
    log("stopped")


async def _run(
    server: uvicorn.Server,
    listening: socket.socket,
    batcher: Batcher,
    reload_asked: threading.Event,
    drain_seconds: float,
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

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload_asked.set)
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
        # Only of a socket with its protocol named does asyncio send small answers at once.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port") from None
    return listening
