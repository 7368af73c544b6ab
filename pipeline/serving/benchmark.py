"""`sllm benchmark serve`: servers of OpenAI's completions under the same load, side by side.

A load is either a rate, at which requests arrive whether or not others are answered (open loop, exponential
gaps, the same for all servers), or a number of clients of which each asks again at once. Every request is a
stream. Servers take turns, the others idle. The texts asked for repeat, so that each can be compared with the
one that the idle server gives alone.

tokens per CPU second   new tokens over the CPU seconds that the server process used, by its `/metrics`;
                        beside `generate_many` of the same texts at the same batch, in its own process
first token             seconds from a request's time of arrival to its first text
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import numpy as np
import openai

from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, counted, log
from data_prep.common.measuring import in_new_process
from data_prep.common.page import NOTHING, Table, to_text
from pipeline.generation.api import generate_many
from pipeline.generation.results import Limits
from pipeline.generation.sampling import Sampling
from pipeline.models.inference import load_for_generation
from pipeline.serving.protocol import new_tokens

PACKAGES = ("numpy", "torch", "transformers", "starlette", "uvicorn", "openai")
PROMPTS = ("The", "The list is", "It was a", "In the first place,", "“Well,” said", "When the day came", "")
CASES = 64  # different texts asked for
SHARES = (50, 90, 99)  # percentiles


class Asked(NamedTuple):
    """The texts: number n has the prompt n modulo their number, and the seed n."""

    prompts: Sequence[str]
    tokens: int
    temperature: float

    def prompt(self, case: int) -> str:
        return self.prompts[case % len(self.prompts)]


@dataclass
class Target:
    """A server. folder, started: of one that was started here, and how long that took."""

    name: str
    url: str
    model: str = ""
    folder: str | None = None
    started: float | None = None
    texts: dict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    points: list[dict[str, Any]] = field(default_factory=list)


class Answer(NamedTuple):
    """One answer. failure: of a request that got no whole text; late: seconds from its time of arrival until
    it was sent, which are the measuring process's own."""

    case: int
    late: float
    first: float
    whole: float
    tokens: int
    failure: str | None


async def _ask(client: openai.AsyncOpenAI, target: Target, asked: Asked, case: int, due: float) -> Answer:
    late, first, text, tokens, ended = time.perf_counter() - due, None, "", 0, False
    failure = None
    try:
        stream = await client.completions.create(
            model=target.model,
            prompt=asked.prompt(case),
            seed=case,
            max_tokens=asked.tokens,
            temperature=asked.temperature,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            for choice in chunk.choices:
                if first is None and choice.text:
                    first = time.perf_counter() - due
                text += choice.text
                ended = ended or choice.finish_reason is not None
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
        failure = None if ended else "cut off"
    except openai.APIStatusError as error:
        failure = f"status {error.status_code}"
    except openai.APIError as error:
        failure = type(error).__name__
    whole = time.perf_counter() - due
    if failure is None:
        target.texts[case][text] += 1
    return Answer(case, late, whole if first is None else first, whole, tokens, failure)


async def _arrivals(rate: float, seconds: float) -> AsyncIterator[float]:
    """The times at which requests are due, each when it has come."""
    rng, due = np.random.default_rng(0), time.perf_counter()
    end = due + seconds
    while (due := due + float(rng.exponential(1 / rate))) < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield due


async def _load(
    target: Target, asked: Asked, key: str, rate: float | None, clients: int | None, seconds: float
) -> list[Answer]:
    """The answers to one load; every request that has started is waited for."""
    numbers = iter(range(1 << 62))
    async with openai.AsyncOpenAI(base_url=f"{target.url}/v1", api_key=key, max_retries=0) as client:
        if rate is not None:
            tasks = [
                asyncio.create_task(_ask(client, target, asked, next(numbers) % CASES, due))
                async for due in _arrivals(rate, seconds)
            ]
            return list(await asyncio.gather(*tasks))
        end = time.perf_counter() + seconds

        async def ask_again() -> list[Answer]:
            answers = []
            while (now := time.perf_counter()) < end:
                answers.append(await _ask(client, target, asked, next(numbers) % CASES, now))
            return answers

        assert clients is not None
        return sum(await asyncio.gather(*(ask_again() for _ in range(clients))), [])


def _process(target: Target, key: str) -> dict[str, float]:
    """Seconds of the CPU and resident bytes of the server's process; nothing where it does not say."""
    request = urllib.request.Request(f"{target.url}/metrics", headers={"authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
    except (OSError, ValueError):
        return {}
    names = {"cpu_seconds_total": "cpu_seconds", "resident_memory_bytes": "resident_bytes"}
    found = re.findall(rf"^process_({'|'.join(names)}) (\S+)$", text, re.MULTILINE)
    return {names[name]: float(value) for name, value in found}


def _point(target: Target, asked: Asked, key: str, seconds: float, load: dict[str, Any]) -> dict[str, Any]:
    before, began = _process(target, key), time.perf_counter()
    answers = asyncio.run(_load(target, asked, key, load.get("rate"), load.get("clients"), seconds))
    took, after = time.perf_counter() - began, _process(target, key)
    done = [answer for answer in answers if answer.failure is None]
    tokens = sum(answer.tokens for answer in done)
    point: dict[str, Any] = {
        **load,
        "requests": len(answers),
        "failures": dict(Counter(answer.failure for answer in answers if answer.failure)),
        "tokens": tokens,
        "seconds": took,
        "tokens_per_second": tokens / took,
    }
    for name in ("first", "whole", "late") if done else ():
        values = np.percentile([getattr(answer, name) for answer in done], SHARES)
        point[name] = {f"p{share}": float(value) for share, value in zip(SHARES, values, strict=True)}
    if "cpu_seconds" in before and "cpu_seconds" in after:
        point["cpu_seconds"] = after["cpu_seconds"] - before["cpu_seconds"]
        point["tokens_per_cpu_second"] = tokens / max(point["cpu_seconds"], 1e-9)
        point["resident_bytes"] = [before.get("resident_bytes"), after.get("resident_bytes")]
    return point


def _compare_texts(target: Target, asked: Asked, key: str) -> dict[str, int]:
    """How many texts of the loads are not the one that the idle server gives alone."""
    loaded, target.texts = target.texts, defaultdict(Counter)

    async def alone() -> list[Answer]:
        async with openai.AsyncOpenAI(base_url=f"{target.url}/v1", api_key=key, max_retries=0) as client:
            return [await _ask(client, target, asked, case, time.perf_counter()) for case in sorted(loaded)]

    failures = [answer.failure for answer in asyncio.run(alone()) if answer.failure]
    if failures:
        raise UserError(f"{target.name}: an idle server fails: {failures[0]}")
    other = sum(
        count
        for case, texts in loaded.items()
        for text, count in texts.items()
        if text not in target.texts[case]
    )
    return {"compared": sum(texts.total() for texts in loaded.values()), "other": other}


def _batch(folder: str, asked: Asked, rows: int) -> dict[str, Any]:
    """`generate_many` of the texts; the first time is a warm-up."""
    model, tokenizer = load_for_generation(folder, batch_invariant=None)
    limits, repeats = Limits(asked.tokens, asked.tokens), 1 + 2 * rows // CASES
    prompts = [asked.prompt(case) for case in range(CASES)] * repeats

    def once() -> dict[str, Any]:
        began, tokens = time.process_time(), 0
        for found in generate_many(model, tokenizer, prompts, Sampling(asked.temperature), limits, rows):
            if isinstance(found, UserError):
                raise found
            tokens += sum(map(new_tokens, found))
        seconds = time.process_time() - began
        return {"tokens": tokens, "cpu_seconds": seconds, "tokens_per_cpu_second": tokens / seconds}

    once()
    return once()


@contextmanager
def _started(folder: str, rows: int, queue: int) -> Iterator[Target]:
    """A server of this machine, on a free port."""
    command = [sys.executable, "-m", "pipeline.cli", "serve", "--model", folder, "--port", "0"]
    command += ["--rows", str(rows), "--queue", str(queue)]
    began = time.perf_counter()
    with TemporaryFile("w+") as log_file, subprocess.Popen(command, stderr=log_file) as process:
        try:
            while not (found := re.search(r"at (http://\S+)$", _text(log_file), re.MULTILINE)):
                if process.poll() is not None:
                    lines = _text(log_file).splitlines() or ["no message"]
                    raise UserError(f"{folder}: the server does not start: {lines[-1]}")
                time.sleep(0.02)
            yield Target(folder, found.group(1), folder=folder, started=time.perf_counter() - began)
        finally:
            process.terminate()


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def run(
    models: Sequence[str],
    urls: Sequence[str],
    rates: Sequence[float],
    clients: Sequence[int],
    seconds: float,
    asked: Asked,
    rows: int,
    key: str,
    output: str | None,
) -> dict[str, Any]:
    """Measure every server under every load; the result is plain JSON.

    Raises: UserError for a folder or an address that cannot be served, and without a load.
    """
    require_folder(output)
    if not (models or urls):
        raise UserError("nothing to measure: give --model FOLDER or --url ADDRESS")
    loads = [{"rate": rate} for rate in rates] + [{"clients": count} for count in clients]
    if not loads:
        raise UserError("no load: give --rate or --clients")
    # Before the loads and after them: the speed of a machine changes.
    many = {folder: [in_new_process(_batch, folder, asked, rows)] for folder in models}
    with ExitStack() as stack:
        # Its servers end with this process.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        stack.callback(signal.signal, signal.SIGTERM, before)
        # Nothing is refused for a full queue: a figure of the load, not of a limit.
        targets = [stack.enter_context(_started(folder, rows, 1 << 20)) for folder in models]
        targets += [Target(url, url.rstrip("/").removesuffix("/v1")) for url in urls]
        for target in targets:
            try:
                with openai.OpenAI(base_url=f"{target.url}/v1", api_key=key, max_retries=0) as client:
                    target.model = client.models.list().data[0].id
            except (openai.APIError, IndexError) as error:
                raise UserError(f"{target.name}: no server of OpenAI's API there ({error})") from None
            asyncio.run(_load(target, asked, key, None, 2, 0.5))  # warm-up
            target.texts.clear()
        for load in loads:
            for target in targets:
                point = _point(target, asked, key, seconds, load)
                target.points.append(point)
                log(f"{target.name}, {_shown(load)}: {point['tokens_per_second']:,.0f} tokens/s")
        sides = [
            {
                "name": target.name,
                "start_seconds": target.started,
                "points": target.points,
                "texts": _compare_texts(target, asked, key),
            }
            for target in targets
        ]
    for target, side in zip(targets, sides, strict=True):
        if target.folder is not None:
            many[target.folder].append(in_new_process(_batch, target.folder, asked, rows))
            side["generate_many"] = many[target.folder]
    result = {
        **header(PACKAGES),
        "rows": rows if models else None,
        "load_seconds": seconds,
        "max_tokens": asked.tokens,
        "temperature": asked.temperature,
        "cases": CASES,
        "servers": sides,
    }
    write_result(result, output)
    return result


def _shown(load: dict[str, Any]) -> str:
    return f"{load['rate']:g}/s" if "rate" in load else counted(load["clients"], "client")


def format_serving(result: dict[str, Any]) -> str:
    """The result of `run` as text."""
    head = ["load", "server", "texts", "failed", "tokens/s", "of the CPU's", "first token p50", "p99"]
    head += ["whole text p50", "p99"]
    rows = []
    for at in range(len(result["servers"][0]["points"])):
        for side in result["servers"]:
            point = side["points"][at]
            failed = sum(point["failures"].values())
            row = [_shown(point), side["name"], f"{point['requests'] - failed:,}", f"{failed:,}"]
            row += [f"{point['tokens_per_second']:,.0f}"]
            by_cpu = point.get("tokens_per_cpu_second")
            row += [NOTHING if by_cpu is None else f"{by_cpu:,.0f}"]
            for name in ("first", "whole"):
                row += [
                    f"{point[name][share]:.3f} s" if name in point else NOTHING for share in ("p50", "p99")
                ]
            rows.append(row)
    lines = [
        f"{result['cpu']}, {counted(result['cores'], 'core')}",
        "",
        to_text(Table(head, rows, left=(0, 1))),
    ]
    for side in result["servers"]:
        compared, other = side["texts"]["compared"], side["texts"]["other"]
        line = f"{side['name']}: {other:,} of {counted(compared, 'text')} differ from the same text alone"
        if many := side.get("generate_many"):
            speeds = " and ".join(f"{one['tokens_per_cpu_second']:,.0f}" for one in many)
            line += f"; generate_many, tokens per second of the CPU: {speeds}"
        if side["start_seconds"] is not None:
            line += f"; started in {side['start_seconds']:.1f} s"
        lines.append(line)
    return "\n".join(lines)
