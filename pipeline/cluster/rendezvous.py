"""All ranks of a job meet at rank 0 and exchange JSON values (torch's TCPStore), before any training."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from data_prep.common.errors import UserError, counted, first_line
from pipeline.parallel.ranks import Ranks

PINGS = 5
HEARTBEAT_SECONDS = 2.0
LOST_SECONDS = 15.0  # without a heartbeat: the rank has died


class ServerLost(UserError):
    """Rank 0 ended the meeting; its own message says why."""


class Meeting:
    """A context that every rank enters alike; one rank alone needs no torch.

    Args:
        host: the name that other ranks report this machine by.
        address, port: of rank 0.
        timeout: seconds to wait for the other ranks, at the start and in every exchange.
    Raises: UserError, on rank 0 with the names of the missing ranks, when not all ranks arrive in time.
    """

    def __init__(self, ranks: Ranks, host: str, address: str, port: int, timeout: float):
        self.ranks, self.timeout, self.hosts = ranks, timeout, [host]
        self._round = 0
        if ranks.world == 1:
            return
        # Otherwise each rank prints C++ stack traces for a lost connection, beside the exception.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        from torch.distributed import TCPStore

        is_server, limit = ranks.rank == 0, timedelta(seconds=timeout)
        where = f"{host}: cannot listen on port {port}" if is_server else f"cannot reach {address}:{port}"
        try:
            self._store = TCPStore(
                "127.0.0.1" if is_server else address, port, None, is_server, limit, wait_for_workers=False
            )
        except RuntimeError as error:
            raise UserError(f"{where}: {first_line(error)}") from None
        self._port = port
        self._ended = threading.Event()
        if not is_server:
            threading.Thread(target=self._beat, args=(address, port, limit), daemon=True).start()
        self.hosts = self.exchange(host)

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave an empty value in the next round, so that no rank waits for this one."""
        if self.ranks.world == 1:
            return
        self._ended.set()
        self._round += 1
        with suppress(RuntimeError):
            self._store.set(self._key(self.ranks.rank or "all"), "")
            if self.ranks.rank == 0 and kind is None:  # the store ends with rank 0: others may still read
                self._wait(map(self._key, range(1, self.ranks.world)), self.timeout)
        del self._store

    def exchange(self, value: Any, timeout: float | None = None) -> list[Any]:
        """Every rank's value, by rank. Raises UserError when a rank does not answer within `timeout` seconds
        (default: the meeting's)."""
        world, limit = self.ranks.world, timeout or self.timeout
        if world == 1:
            return [value]
        self._round += 1
        if self.ranks.rank:
            with self._or_raise(ServerLost("lost rank 0: see its message")):
                self._store.set(self._key(self.ranks.rank), json.dumps(value))
                # Rank 0 may itself have to wait for others.
                self._wait([self._key("all")], limit + self.timeout)
                if not (answer := self._store.get(self._key("all"))):
                    raise RuntimeError
            return json.loads(answer)
        keys = {rank: self._key(rank) for rank in range(1, world)}
        self._wait_for_ranks(keys, limit)
        found = {0: json.dumps(value).encode()}
        found |= {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}
        values = {rank: json.loads(text) for rank, text in found.items() if text}
        silent = [rank for rank in range(world) if rank not in values]
        if silent and self._round == 1:
            raise UserError(
                f"{len(silent)} of {counted(world, 'rank')} did not reach {value}:{self._port} "
                f"within {limit:.0f} s: {_some(silent)}; here are {_some(sorted(set(values.values())))}"
            )
        if silent:
            raise self._no_answer(silent)
        answers = [values[rank] for rank in range(world)]
        self._store.set(self._key("all"), json.dumps(answers))
        return answers

    def clock_offsets(self, leaders: list[int], clock: Callable[[], float] = time.time) -> dict[int, float]:
        """On rank 0: by how many seconds the clocks of the ranks `leaders` are ahead of its own, as exact as
        half the fastest of a few round trips. Empty on other ranks."""
        mine, offsets = self.ranks.rank, {}
        for rank in leaders:
            if rank == 0 or mine not in (0, rank):
                continue
            rounds = []
            for n in range(PINGS):
                ping, pong = self._key(f"ping-{rank}-{n}"), self._key(f"pong-{rank}-{n}")
                if mine:
                    with self._or_raise(ServerLost("lost rank 0: see its message")):
                        self._wait([ping], self.timeout)
                        self._store.set(pong, repr(clock()))
                    continue
                with self._or_raise(self._no_answer([rank])):
                    sent = clock()
                    self._store.set(ping, "")
                    theirs = float(self._store.get(pong))
                    back = clock()
                rounds.append((back - sent, theirs - (sent + back) / 2))
            if mine == 0:
                offsets[rank] = min(rounds)[1]
        return offsets

    def _key(self, name: int | str) -> str:
        return f"{self._round}/{name}"

    def _wait(self, keys: Iterable[str], seconds: float) -> None:
        self._store.wait(list(keys), timedelta(seconds=seconds))

    def _wait_for_ranks(self, keys: dict[int, str], seconds: float) -> None:
        """Wait for every rank's key, at most `seconds`; after the first round also until a rank has died."""
        end = time.monotonic() + seconds
        beats: dict[int, tuple[int, float]] = {}
        while (left := end - time.monotonic()) > 0:
            absent = [rank for rank, key in keys.items() if not self._store.check([key])]
            if not absent:
                return
            with suppress(RuntimeError):
                self._wait([keys[rank] for rank in absent], min(HEARTBEAT_SECONDS, left))
            now = time.monotonic()
            for rank in absent:
                beat = self._store.add(f"beat/{rank}", 0)
                if rank not in beats or beats[rank][0] != beat:
                    beats[rank] = beat, now
            if self._round > 1 and any(now - beats[rank][1] > LOST_SECONDS for rank in absent):
                return

    def _beat(self, address: str, port: int, limit: timedelta) -> None:
        # A second client: the main one blocks in `wait`.
        from torch.distributed import TCPStore

        with suppress(RuntimeError):
            client = TCPStore(address, port, None, False, limit, wait_for_workers=False)
            while not self._ended.wait(HEARTBEAT_SECONDS):
                client.add(f"beat/{self.ranks.rank}", 1)

    def _no_answer(self, ranks: list[int]) -> UserError:
        names = _some([f"{self.hosts[rank]} (rank {rank})" for rank in ranks])
        return UserError(f"no answer from {names}: the process died or hangs there")

    @staticmethod
    @contextmanager
    def _or_raise(error: UserError) -> Iterator[None]:
        """`error` in place of what the store raises for a lost connection or a timeout."""
        try:
            yield
        except RuntimeError:
            raise error from None


def _some(items: list[Any], most: int = 8) -> str:
    shown = ", ".join(map(str, items[:most]))
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
