"""A request's texts as they are generated, and the form in which OpenAI's API gives them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from data_prep.text.tokenizer import Tokenizer
from pipeline.generation.results import Continuation, Piece, Request, Sentence, TextStream
from pipeline.serving.batcher import Batcher
from pipeline.serving.metrics import Metrics
from pipeline.serving.protocol import CompletionRequest, finish_reason

# Seconds between two chunks of a stream, per text being generated, and at least: what comes meanwhile is one
# chunk. So chunks cost about as much with many streams as with few.
PACE, LEAST_PACE = 0.01, 0.05


@dataclass
class Call:
    """One request, for the log and the metrics."""

    path: str
    deadline: float  # time of the event loop
    began: float = field(default_factory=time.perf_counter)
    facts: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def left(self) -> float:
        return max(0.0, self.deadline - asyncio.get_running_loop().time())


class Texts:
    """The events of a request's texts, in the order in which they happen."""

    def __init__(self, batcher: Batcher, requests: list[Request], call: Call, metrics: Metrics) -> None:
        self.requests, self.call, self.left = requests, call, len(requests)
        self._batcher, self._metrics, self._loop = batcher, metrics, asyncio.get_running_loop()
        self._events: deque[tuple[int, Piece | Continuation | Exception]] = deque()
        self._wait: asyncio.Future[None] | None = None
        self._started = self._wants_pieces = self._overdue = False
        self._numbers = batcher.submit(requests, self._deliver)
        self._deadline = self._loop.call_at(call.deadline, self._expire)

    def _deliver(self, number: int, event: Piece | Sentence | Continuation | Exception) -> None:
        # In the generation thread, for every token: the other one is woken as rarely as can be.
        if isinstance(event, Sentence):
            return
        self._events.append((number, event))
        if self._wants_pieces or not isinstance(event, Piece):
            self._wants_pieces = False
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._wait is not None and not self._wait.done():
            self._wait.set_result(None)

    def _expire(self) -> None:
        self._overdue = True
        self._wake()

    def _take_pieces(self) -> None:
        self._wants_pieces = True
        if self._events:
            self._wake()

    async def next(self) -> list[tuple[int, list[Any]]]:
        """What has happened since the last call: (number of the text in this request, its events). Raises
        what ended a text."""
        found: dict[int, list[Any]] = {}
        while not found:
            if self._overdue:
                raise TimeoutError
            self._wait = self._loop.create_future()
            # An event that came between two calls has woken no one.
            if self._events and not isinstance(self._events[-1][1], Piece):
                self._wake()
            if self._started:
                # All streams look at the same moments, so that one turn of the event loop serves many.
                pace = max(LEAST_PACE, PACE * self._batcher.generating)
                due = ((self._loop.time() + pace) // LEAST_PACE + 1) * LEAST_PACE
                timer: asyncio.Handle = self._loop.call_at(due, self._take_pieces)
            else:
                timer = self._loop.call_soon(self._take_pieces)
            try:
                await self._wait
            finally:
                timer.cancel()
            self._wants_pieces = False
            while self._events:
                number, what = self._events[0]
                if type(what) is not Piece:
                    if isinstance(what, Exception):
                        if not found:
                            raise what
                        break
                    self.left -= 1
                found.setdefault(number - self._numbers[0], []).append(what)
                self._events.popleft()
        if not self._started:
            self._started = True
            self._metrics.first_token(time.perf_counter() - self.call.began)
        if not self.left:
            self._deadline.cancel()
        return sorted(found.items())

    async def all(self) -> list[tuple[list[Piece], Continuation]]:
        """Every text with its pieces."""
        found: list[list[Any]] = [[] for _ in self.requests]
        while self.left:
            for number, events in await self.next():
                found[number] += events
        return [(events[:-1], events[-1]) for events in found]

    def cancel(self) -> None:
        self._deadline.cancel()
        self._batcher.cancel(self._numbers)


class Completion:
    """The form of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, tokenizer: Tokenizer) -> None:
        self._echo, self._logprobs, self._tokenizer = bool(body.echo), body.logprobs is not None, tokenizer
        self._offsets: dict[int, int] = {}

    def choice(
        self, number: int, request: Request, pieces: list[Piece], text: Continuation
    ) -> dict[str, Any]:
        (choice,) = self.chunks(number, request, [*pieces, text])
        return choice

    def chunks(
        self, number: int, request: Request, events: list[Piece | Continuation]
    ) -> list[dict[str, Any]]:
        before = str(request.prompt) if self._echo and number not in self._offsets else ""
        self._offsets.setdefault(number, 0)
        end = events[-1]
        pieces: list[Any] = events[:-1] if isinstance(end, Continuation) else events
        choice = {
            "text": before + "".join([piece.text for piece in pieces]),
            "index": number,
            "logprobs": self._table(number, before, pieces),
            "finish_reason": finish_reason(end) if isinstance(end, Continuation) else None,
        }
        return [choice]

    def _table(self, number: int, before: str, pieces: list[Piece]) -> dict[str, Any] | None:
        """A row for every token; those of the prompt have no score."""
        if not self._logprobs:
            return None
        rows: list[tuple[str, float | None, bool]] = []
        if before:
            tokens = self._tokenizer.encode(before)
            rows = [(text, None, True) for text in _spelled(self._tokenizer, tokens)]
        rows += [(piece.text, piece.log_probability, piece.token is not None) for piece in pieces]
        table: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for text, score, is_token in rows:
            if is_token:
                table["tokens"].append(text)
                table["token_logprobs"].append(score)
                table["top_logprobs"].append(None if score is None else {text: score})
                table["text_offset"].append(self._offsets[number])
            self._offsets[number] += len(text)
        return table


def _spelled(tokenizer: Tokenizer, tokens: Any) -> list[str]:
    """The text of each token; a character that is spread over several belongs to the last of them."""
    stream = TextStream(())
    return [stream.push(tokenizer.decode_bytes([token])) for token in tokens]


class Chat:
    """The form of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self) -> None:
        self._started: set[int] = set()

    def choice(self, number: int, _: Request, __: list[Piece], text: Continuation) -> dict[str, Any]:
        message = {"role": "assistant", "content": text.text, "refusal": None}
        return {"index": number, "message": message, "logprobs": None, "finish_reason": finish_reason(text)}

    def chunks(self, number: int, _: Request, events: list[Piece | Continuation]) -> list[dict[str, Any]]:
        deltas: list[tuple[dict[str, str], str | None]] = []
        if number not in self._started:
            self._started.add(number)
            deltas.append(({"role": "assistant", "content": ""}, None))
        if text := "".join(event.text for event in events if isinstance(event, Piece)):
            deltas.append(({"content": text}, None))
        if isinstance(end := events[-1], Continuation):
            deltas.append(({}, finish_reason(end)))
        return [
            {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}
            for delta, reason in deltas
        ]


Form = Completion | Chat
