"""A meeting of all ranks over plain TCP: what `sllm doctor` compares the machines by, before torch is there.

In: `Ranks` and rank 0's address. Out: `Meeting.exchange(value)`: every rank gives a JSON value and gets the
list of all, by rank. Rank 0 is the table that all others sit at, one connection each; whoever stays away or
falls silent is named by its host. Nothing but the standard library.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from data_prep.common.errors import UserError
from pipeline.parallel.ranks import Ranks

PINGS = 5
RETRY_SECONDS = 0.2
LARGEST_MESSAGE = 64 << 20  # bytes; more is not one of ours
_LENGTH = struct.Struct("!I")


class LostTable(UserError):
    """Rank 0 has ended the meeting; it says why."""


class Meeting:
    """Made by every rank alike; raises UserError, on rank 0 with the names, when not all have come in time.

    timeout: seconds to wait for the others, at the beginning and at every exchange.
    """

    def __init__(self, ranks: Ranks, host: str, address: str, port: int, timeout: float):
        self.ranks, self.timeout = ranks, timeout
        self.hosts: list[str] = [host]
        self._peers: dict[int, socket.socket] = {}
        if ranks.world == 1:
            return
        if ranks.rank == 0:
            self._receive_all(host, port)
        else:
            self._peers[0] = self._connect(address, port)
            self._send(0, {"rank": ranks.rank, "host": host})
        self.hosts = self.exchange(host)

    def exchange(self, value: Any, timeout: float | None = None) -> list[Any]:
        """Every rank's value, by rank. UserError when a rank does not answer in time (default: the
        meeting's)."""
        if self.ranks.world == 1:
            return [value]
        deadline = time.monotonic() + (timeout or self.timeout)
        if self.ranks.rank:
            self._send(0, value)
            return self._receive(0, deadline + self.timeout)  # rank 0 may itself have to wait for others
        values, silent = [value], []
        for rank in range(1, self.ranks.world):
            try:
                values.append(self._receive(rank, deadline))
            except UserError:
                silent.append(rank)
        if silent:
            raise UserError(f"no answer from {self._names(silent)}: the process died or hangs there")
        for rank in self._peers:
            self._send(rank, values)
        return values

    def clock_offsets(self, leaders: list[int], clock: Callable[[], float] = time.time) -> dict[int, float]:
        """On rank 0: by how many seconds the clocks of the ranks `leaders` are ahead of its own, as exact as
        half the fastest of a few round trips. Empty on other ranks."""
        mine, offsets = self.ranks.rank, {}
        for rank in leaders:
            if rank == 0:
                continue
            if mine == rank:
                for _ in range(PINGS):
                    self._receive(0, time.monotonic() + self.timeout)
                    self._send(0, clock())
            elif mine == 0:
                rounds = []
                for _ in range(PINGS):
                    sent = clock()
                    self._send(rank, None)
                    theirs = self._receive(rank, time.monotonic() + self.timeout)
                    back = clock()
                    rounds.append((back - sent, theirs - (sent + back) / 2))
                offsets[rank] = min(rounds)[1]
        return offsets

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _receive_all(self, host: str, port: int) -> None:
        deadline = time.monotonic() + self.timeout
        known = {0: host}
        try:
            server = socket.create_server(("", port), backlog=self.ranks.world)
        except OSError as error:
            raise UserError(f"{host}: cannot listen on port {port}: {error.strerror}") from None
        with server:
            while len(known) < self.ranks.world:
                ready, _, _ = select.select([server], [], [], max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = [rank for rank in range(self.ranks.world) if rank not in known]
                    raise UserError(
                        f"{len(missing)} of {self.ranks.world} ranks did not reach {host}:{port} within "
                        f"{self.timeout:.0f} s: {_some(missing)}; here are "
                        f"{_some(sorted(set(known.values())))}"
                    )
                peer, _ = server.accept()
                self._peers[-1] = peer
                try:
                    hello = self._receive(-1, min(deadline, time.monotonic() + 5))
                    rank = int(hello["rank"])
                except (UserError, TypeError, KeyError, ValueError):
                    peer.close()  # somebody else's connection
                    continue
                finally:
                    del self._peers[-1]
                if not 0 < rank < self.ranks.world or rank in known:
                    peer.close()
                    continue
                self._peers[rank], known[rank] = peer, str(hello["host"])
        self.hosts = [known[rank] for rank in range(self.ranks.world)]

    def _connect(self, address: str, port: int) -> socket.socket:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return socket.create_connection(
                    (address, port), timeout=max(1.0, deadline - time.monotonic())
                )
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(f"cannot reach rank 0 at {address}:{port}: {error}") from None
                time.sleep(RETRY_SECONDS)  # it may not have begun to listen

    def _names(self, ranks: list[int]) -> str:
        return _some([f"{self.hosts[rank]} (rank {rank})" for rank in ranks])

    def _send(self, rank: int, value: Any) -> None:
        data = json.dumps(value).encode()
        try:
            self._peers[rank].sendall(_LENGTH.pack(len(data)) + data)
        except OSError:
            raise self._lost(rank) from None

    def _receive(self, rank: int, deadline: float) -> Any:
        (length,) = _LENGTH.unpack(self._read(rank, _LENGTH.size, deadline))
        if length > LARGEST_MESSAGE:
            raise UserError(f"rank {rank} sent something else than a message of ours")
        try:
            return json.loads(self._read(rank, length, deadline))
        except ValueError:
            raise UserError(f"rank {rank} sent something else than a message of ours") from None

    @staticmethod
    def _lost(rank: int) -> UserError:
        return UserError(f"lost rank {rank}") if rank else LostTable("lost rank 0: see its message")

    def _read(self, rank: int, count: int, deadline: float) -> bytes:
        parts, peer = [], self._peers[rank]
        try:
            while count:
                peer.settimeout(max(0.001, deadline - time.monotonic()))
                part = peer.recv(min(count, 1 << 20))
                if not part:
                    raise ConnectionResetError
                parts.append(part)
                count -= len(part)
        except OSError:
            raise self._lost(rank) from None
        return b"".join(parts)


def _some(items: list[Any], most: int = 8) -> str:
    shown = ", ".join(map(str, items[:most]))
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
