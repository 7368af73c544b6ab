"""Counters of the server, in Prometheus' format."""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from pipeline.serving.batcher import Batcher

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The figures of one server; `text` gives them."""

    def __init__(self, batcher: Batcher) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # seconds of the CPU, memory
        self._requests = Counter("sllm_requests", "Requests by answer", ["path", "status"], registry=registry)
        self._tokens = Counter("sllm_tokens", "Tokens read and generated", ["kind"], registry=registry)
        self._first = Histogram(
            "sllm_time_to_first_token_seconds",
            "From request to first token",
            buckets=SECONDS,
            registry=registry,
        )
        for name, what, value in (
            ("sllm_texts_waiting", "Texts that wait for a row", lambda: batcher.waiting),
            ("sllm_texts_generating", "Texts in the batch", lambda: batcher.generating),
            ("sllm_rows", "Texts that can be generated at once", lambda: batcher.rows),
        ):
            Gauge(name, what, registry=registry).set_function(value)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def finished(self, path: str, status: int, facts: dict[str, Any]) -> None:
        # A model's name in the path would make a series of its own.
        path = "/v1/models" if path.startswith("/v1/models/") else path
        self._requests.labels(path, str(status)).inc()
        for kind in ("prompt", "completion"):
            self._tokens.labels(kind).inc(facts.get(f"{kind}_tokens", 0))

    def text(self) -> bytes:
        return generate_latest(self._registry)
