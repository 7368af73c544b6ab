"""`sllm serve`, a model behind OpenAI's HTTP API, and `sllm chat`, a conversation in the terminal."""

from __future__ import annotations

import signal
from typing import Annotated

from cyclopts import Parameter

from data_prep.common.command_line import Natural, Positive
from data_prep.common.extras import import_extra
from pipeline.cli.options import Device, Dtype, Int8, app


@app.command(group="Models")
def serve(
    *,
    model: str,
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(help="0: any that is free")] = 8000,
    api_key: str | None = None,
    rows: Positive = 32,
    queue: Positive = 256,
    max_tokens: Positive = 4096,
    max_prompt_tokens: Positive = 16_384,
    max_body_bytes: Positive = 1 << 20,
    request_seconds: float = 300.0,
    drain_seconds: float = 30.0,
    chat_template: str | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    int8: Int8 = False,
    batch_invariant: bool | None = None,
) -> None:
    """Serve a model: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics, and a page to try
    it (docs/serving.md). TERM finishes accepted requests; HUP reads the model folder again.

    example:
      sllm serve --model demo/models/sllm --port 8000

    Args:
        model: folder of an exported SLLM, or of a token-level model
        host: address; any but loopback needs an API key
        api_key: what clients must send (better: the variable SLLM_API_KEY, which other users cannot see)
        rows: texts generated at once
        queue: texts that may wait for a row; more get status 429
        max_tokens: most new tokens of a text
        max_prompt_tokens: longest prompt
        max_body_bytes: longest body of a request
        request_seconds: deadline of a request
        drain_seconds: time for accepted requests after TERM
        chat_template: Jinja file for /v1/chat/completions (default: the model folder's chat_template.jinja)
        batch_invariant: a text has the same bits in any batch, a few texts are slower (default: in CPU fp32)
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a reload has no meaning before the model is read
    for package in ("starlette", "uvicorn", "uvloop", "prometheus_client"):
        import_extra(package, "serve")
    from pipeline.serving.app import Settings
    from pipeline.serving.run import find_key, require_key
    from pipeline.serving.run import serve as run

    key = find_key(api_key)
    require_key(host, key)
    settings = Settings(key, max_body_bytes, max_prompt_tokens, max_tokens, request_seconds)
    precision = device, dtype, int8, batch_invariant
    run(model, host, port, rows, queue, settings, chat_template, drain_seconds, *precision)


@app.command(group="Models")
def chat(
    *,
    model: str,
    max_sentences: Positive = 10,
    temperature: float = 0.8,
    top_p: float | None = None,
    seed: Natural | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    int8: Int8 = False,
) -> None:
    """Type text, and the model continues it, in the terminal; /help lists the commands.

    example:
      sllm chat --model demo/models/sllm --temperature 0.7

    Args:
        model: folder of an exported SLLM
        max_sentences: most sentences of an answer
        temperature: 0: greedy
        top_p: sample from the smallest set of this mass
        seed: makes sampling repeatable (default: drawn)
    """
    from dataclasses import replace

    from pipeline.cli.chat import converse, line_reader
    from pipeline.cli.generate import settings, show

    how = replace(
        settings(max_sentences, temperature, top_p, seed=seed), device=device, dtype=dtype, int8=int8
    )
    for _ in converse(model, how, line_reader(), show):
        pass
