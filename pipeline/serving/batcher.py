"""One thread generates the texts of all clients. A text joins the batch when a row is free, and leaves it
when it ends.

A text equals the one that `sllm generate` writes with the same seed, whatever else is in the batch
(`pipeline/generation/writer.py`); without `batch_invariant` unless a draw falls between two symbols by less
than rounding.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError, first_line, log
from data_prep.text.tokenizer import Tokenizer
from pipeline.generation.prefixes import PrefixCache
from pipeline.generation.results import Continuation, Limits, Piece, Request, Sentence
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter
from pipeline.models.inference import load_for_generation

Deliver = Callable[[int, "Piece | Sentence | Continuation | Exception"], None]


class Busy(Exception):
    """The queue has no place for these texts."""


class Closing(Exception):
    """The server shuts down, or has lost this text."""


@dataclass(frozen=True)
class Loaded:
    """A model folder, ready to generate."""

    folder: str
    model: Any
    tokenizer: Tokenizer
    created: int = field(default_factory=lambda: int(time.time()))
    prefixes: PrefixCache = field(default_factory=PrefixCache)

    @cached_property
    def name(self) -> str:
        return Path(self.folder).resolve().name


class Batcher:
    """Generates the texts of many callers in a thread of its own.

    rows: texts at once. most_waiting: texts that may wait for a row. load: reads a model folder.
    """

    def __init__(
        self,
        folder: str,
        rows: int = 32,
        most_waiting: int = 256,
        load: Callable[[str], tuple[Any, Tokenizer]] = load_for_generation,
    ) -> None:
        self.rows, self.most_waiting, self._load = rows, most_waiting, load
        self.loaded = self._read(folder)
        self._next: Loaded | None = None
        self._waiting: deque[Request] = deque()
        self._callers: dict[int, Deliver] = {}  # of every text that waits or is generated
        self._generated: set[int] = set()
        self._cancelled: set[int] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def _read(self, folder: str) -> Loaded:
        model, tokenizer = self._load(folder)
        # On a CPU a loaded tensor may be a view of its file, and new weights may be copied over it. What is
        # laid out by columns is a copy already; the parts of one matrix stay side by side.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                tensor.data = tensor.data.clone()
        return Loaded(folder, model, tokenizer)

    def submit(self, requests: list[Request], deliver: Deliver) -> list[int]:
        """Queue texts, all or none; returns their numbers. `deliver(number, event)` is called in the
        generation thread, last with a `Continuation` or an exception.

        Raises: Busy, Closing.
        """
        with self._changed:
            if self._closing:
                raise Closing
            free = self.rows - len(self._generated)
            if len(self._waiting) + len(requests) > self.most_waiting + max(0, free):
                raise Busy
            numbers = [next(self._numbers) for _ in requests]
            for number, request in zip(numbers, requests, strict=True):
                self._callers[number] = deliver
                self._waiting.append(replace(request, number=number))
            self._changed.notify()
        return numbers

    def cancel(self, numbers: list[int]) -> None:
        """Free the rows of texts whose client has gone."""
        with self._changed:
            gone = {number for number in numbers if self._callers.pop(number, None)}
            self._waiting = deque(request for request in self._waiting if request.number not in gone)
            self._cancelled |= gone & self._generated
            self._generated -= gone

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def generating(self) -> int:
        return len(self._generated)

    def reload(self) -> None:
        """Read the model folder again. Texts in the batch are finished with the old model.

        Raises: UserError for a folder without a model; the old one stays.
        """
        loaded = self._read(self.loaded.folder)
        with self._changed:
            self._next = loaded
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Take no more texts, and finish those that are here; after `seconds` they fail with `Closing`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            self._cancelled |= self._generated
        self._fail(Closing())
        self._thread.join(seconds)

    # In the thread.

    def _work(self) -> None:
        while True:
            if self._next is not None:
                self.loaded, self._next = self._next, None
                log(f"serving {self.loaded.folder}, read again")
            loaded, settings = self.loaded, (Sampling(), Limits(), self.rows)
            writer = BatchWriter(loaded.model, loaded.tokenizer, *settings, prefixes=loaded.prefixes)
            try:
                for number, event in writer.run(self._requests(writer)):
                    self._deliver(number, event)
                    self._pass_on_cancelled(writer)
            except Exception as error:  # memory, a device: these texts are lost, the server is not
                log(f"generation failed: {type(error).__name__}: {first_line(error)}")
                self._fail(error, self._generated)
            if self._closing and not self._waiting:
                return

    def _requests(self, writer: BatchWriter) -> Iterator[Request | None]:
        """The next text, None while there is none, and the end when this writer is to be replaced."""
        while True:
            self._pass_on_cancelled(writer)
            with self._changed:
                while not (self._waiting or self._generated or self._closing or self._next):
                    self._changed.wait()
                if self._next is not None or (self._closing and not self._waiting):
                    return
                request = self._waiting.popleft() if self._waiting else None
                if request is not None:
                    self._generated.add(request.number)
            yield request

    def _pass_on_cancelled(self, writer: BatchWriter) -> None:
        if self._cancelled:
            with self._changed:
                cancelled, self._cancelled = self._cancelled, set()
            for number in cancelled:
                writer.cancel(number)

    def _deliver(self, number: int, event: Piece | Sentence | Continuation | UserError) -> None:
        if isinstance(event, (Continuation, UserError)):
            with self._changed:
                deliver = self._callers.pop(number, None)
                self._generated.discard(number)
        else:
            deliver = self._callers.get(number)
        if deliver is not None:
            deliver(number, event)

    def _fail(self, error: Exception, numbers: set[int] | None = None) -> None:
        with self._changed:
            gone = list(self._callers) if numbers is None else list(numbers)
            callers = {number: self._callers.pop(number, None) for number in gone}
            self._waiting = deque(request for request in self._waiting if request.number not in callers)
            self._generated -= callers.keys()
        for number, deliver in callers.items():
            if deliver is not None:
                deliver(number, error)
