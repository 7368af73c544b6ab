"""The server over real connections, with the real `openai` client."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import shutil
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from helpers.model_folders import save, save_endless, small_model
from helpers.server import TEMPLATE, Serving, post, serving, wait_for

import pipeline.serving.run as running
from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.generation.api import Generation
from pipeline.generation.results import Limits, Request
from pipeline.generation.sampling import Sampling
from pipeline.models.inference import load_for_generation
from pipeline.serving.app import Server, Settings
from pipeline.serving.batcher import Batcher, Busy, Closing
from pipeline.serving.run import require_key

PROMPT = "The list is of 3 items. It"
OURS = {"top_k": 5, "repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def endless(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_endless(tmp_path_factory.mktemp("endless") / "tiny", Path(folder) / "tokenizer")


@pytest.fixture(scope="module")
def server(folder: str):
    with serving(folder, Settings(chat_template=TEMPLATE, most_tokens=2000)) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def alone(folder: str):
    """The text that `sllm generate` writes."""
    model, tokenizer = load_for_generation(folder)

    def text(prompt: str, seed: int, tokens: int = 16, stop: tuple[str, ...] = (), **sampling: Any):
        sampling = {"temperature": 1.0, **sampling}
        run = Generation(model, tokenizer, prompt, Sampling(**sampling), Limits(tokens, tokens, stop), seed)
        for _ in run:
            pass
        return run.result

    return text


@pytest.fixture
def client(server: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


@pytest.mark.parametrize(
    ("sampling", "more"),
    [
        ({"temperature": 0.0}, {}),
        ({"temperature": 0.7, "top_p": 0.9}, {}),
        (
            {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.3},
            {"top_k": 5, "repetition_penalty": 1.3},
        ),
    ],
)
def test_a_completion_is_the_text_of_sllm_generate(client, alone, sampling: dict, more: dict) -> None:
    known = {key: value for key, value in sampling.items() if key not in more}
    answer = client.completions.create(
        model="tiny", prompt=[PROMPT, ""], n=2, max_tokens=12, seed=5, **known, extra_body=more
    )
    expected = [alone(p, 5 + n, 12, **sampling) for n, p in enumerate([PROMPT, PROMPT, "", ""])]
    assert [choice.text for choice in answer.choices] == [text.text for text in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    written = sum(len(sentence.tokens) for text in expected for sentence in text.sentences)
    assert answer.usage.completion_tokens == written
    assert answer.usage.total_tokens == written + answer.usage.prompt_tokens
    for choice, text in zip(answer.choices, expected, strict=True):
        assert choice.finish_reason == ("stop" if text.stopped == "document end" else "length")


def test_streams_give_the_same_text_with_usage(client, alone) -> None:
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, n=2, max_tokens=20, seed=9, stream=True,
        stream_options={"include_usage": True}, echo=True, logprobs=1,
    )  # fmt: skip
    texts, reasons, usage, logprobs = ["", ""], {}, None, 0.0
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            scores = choice.logprobs.token_logprobs if choice.index == 0 else []
            logprobs += sum(score for score in scores if score is not None)  # the prompt has none
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    expected = [alone(PROMPT, seed, 20) for seed in (9, 10)]
    assert texts == [PROMPT + text.text for text in expected]
    written = sum(len(sentence.tokens) for text in expected for sentence in text.sentences)
    assert set(reasons) == {0, 1} and usage.completion_tokens == written
    # Sentence ends are no tokens: their probability is in the sentence's only.
    assert sum(s.log_probability for s in expected[0].sentences) <= logprobs + 1e-3 < 0


def test_stop_strings_end_the_text(client, alone) -> None:
    whole = alone(PROMPT, 3, 40).text
    stop = whole[6:8]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=40, seed=3, stop=[stop, "\x00"]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_token_ids_are_a_prompt(client, alone, folder) -> None:
    ids = load_tokenizer(Path(folder) / "tokenizer").encode(PROMPT).tolist()
    for prompt in (ids, [ids]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, seed=1)
        assert answer.choices[0].text == alone(PROMPT, 1, 5).text


def test_chat_renders_the_template(client, alone) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = alone("system: Be brief.\nuser: Hello\nassistant: ", 2, 10).text
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=10, seed=2)
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=10, seed=2, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_many_streaming_clients_get_their_own_texts(server: Serving, alone) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model="tiny", prompt=f"{PROMPT} {seed % 7}", max_tokens=5 + seed % 20, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(64)))

    texts = asyncio.run(everyone())
    assert texts == [alone(f"{PROMPT} {seed % 7}", seed, 5 + seed % 20).text for seed in range(64)]


# Bad requests.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff{}", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "model: Field required"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt: there is none"),
        ({"prompt": [9_999_999]}, "token ids are from 0 to"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "NaN is no JSON number"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 5000}, "this server writes at most 2000"),
        ({"n": 129}, "n"),
        ({"prompt": ["a"] * 129}, "at most 128"),
        ({"top_p": 0}, "top_p"),
        ({"stop": [""]}, "stop string must not be empty"),
        ({"suffix": "x"}, "suffix: this server cannot do that"),
        ({"best_of": 3}, "best_of"),
        ({"logit_bias": {"5": 1}}, "logit_bias: this server cannot do that"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logprobs": 3}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options is for stream"),
        ({"maxtokens": 5}, "maxtokens: is unknown here"),
        ({"prompt": "word " * 30_000}, "this server takes 16384"),
        ({"prompt": "A b. " * 400}, "shorten the prompt"),
    ],
)
def test_bad_requests_are_answered_in_openai_s_format(server: Serving, body: Any, message: str) -> None:
    if isinstance(body, dict):
        body = json.dumps({"model": "tiny", "prompt": "x", **body}).encode()
    status, answer = post(f"{server.url}/v1/completions", body)
    assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}
    assert message in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


def test_a_long_body_is_refused(folder: str) -> None:
    with serving(folder, Settings(body_bytes=1000)) as server:
        status, answer = post(f"{server.url}/v1/completions", b" " * 1001)
        assert status == 413 and "longer than 1,000 bytes" in answer["error"]["message"]


def test_unknown_routes_and_methods(server: Serving) -> None:
    assert post(f"{server.url}/v1/nothing", b"{}")[0] == 404
    status, answer = post(f"{server.url}/v1/models", b"{}")
    assert status == 405 and answer["error"]["message"] == "Method Not Allowed"


def mutated(rng: random.Random) -> bytes:
    body: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 2, "stream": False}
    wrong = [None, True, -1, 1e308, 10**40, "", "\ud800", [], {}, [[]], {"a": 1}, "x" * 1000, [None], 0.5]
    for _ in range(rng.randint(1, 3)):
        body[
            rng.choice([*body, "n", "stop", "seed", "top_p", "temperature", "messages", "x", "logprobs"])
        ] = rng.choice(wrong)
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice([0, 0, 1, 5])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])


def test_fuzzed_requests_never_break_the_server(server: Serving, capfd: pytest.CaptureFixture) -> None:
    rng = random.Random(3)
    bodies = [mutated(rng) for _ in range(500)]
    routes = [rng.choice(["completions", "chat/completions"]) for _ in bodies]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda each: post(f"{server.url}/v1/{each[0]}", each[1]), zip(routes, bodies, strict=True)
            )
        )
    for status, answer in answers:
        assert status in (200, 400, 404), (status, answer)
        assert "choices" in answer if status == 200 else set(answer) == {"error"}
    assert sum(status != 200 for status, _ in answers) > 300
    wait_for(lambda: server.batcher.generating == server.batcher.waiting == 0)
    assert "Traceback" not in capfd.readouterr().err


# Limits.


def test_a_full_queue_is_429_with_retry_after(endless: str) -> None:
    with serving(endless, rows=1, queue=1) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        first = client.completions.create(model="tiny", prompt="a", max_tokens=4000, seed=1, stream=True)
        next(iter(first))
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(client.completions.create, model="tiny", prompt="b", max_tokens=1)
            wait_for(lambda: server.batcher.waiting == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model="tiny", prompt="c")
            assert caught.value.response.headers["retry-after"] == "1"
            first.close()
            assert second.result(60).usage.completion_tokens <= 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_cut_connection_frees_its_row(endless: str, stream: bool) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 4000, "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with serving(endless) as server:
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall((head + body).encode())
            wait_for(lambda: server.batcher.generating == 1)
        wait_for(lambda: server.batcher.generating == 0)
        cut = time.monotonic() - started
        assert post(f"{server.url}/v1/completions", body.replace("true", "false").encode())[0] == 200
        assert time.monotonic() - started > 3 * cut  # it would have taken longer


def test_a_deadline_ends_a_request(endless: str) -> None:
    with serving(endless, Settings(deadline=0.3, most_tokens=100_000)) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 100_000, "temperature": 0, "max_sentences": 290}
        status, answer = post(f"{server.url}/v1/completions", json.dumps(body).encode())
        assert status == 504 and "deadline" in answer["error"]["message"]
        wait_for(lambda: server.batcher.generating == 0)


def test_an_idle_connection_can_be_used_again(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ARRIVAL_SECONDS", 0.3)
    with serving(folder) as server:
        used = http.client.HTTPConnection("127.0.0.1", server.port)
        for _ in range(2):
            used.request("GET", "/health")
            assert used.getresponse().read()
            used.auto_open = False  # a second request needs the same connection
            time.sleep(0.5)
        used.close()


# Keys.


def test_keys(folder: str, capfd: pytest.CaptureFixture) -> None:
    with serving(folder, Settings(key="right")) as server:
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1}).encode()
        for number in range(3):
            wrong = {"authorization": f"Bearer wrong-{number}"} if number else {}
            status, answer = post(f"{server.url}/v1/completions", body, wrong)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        for path in ("/v1/models", "/metrics"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(server.url + path)
        assert post(f"{server.url}/v1/completions", body, {"authorization": "Bearer right"})[0] == 200
        for path in ("/health", "/", "/app.js", "/style.css", "/icon.svg"):
            assert urllib.request.urlopen(server.url + path).status == 200
    err = capfd.readouterr().err
    assert '"status": 401' in err and "wrong" not in err and "right" not in err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(UserError, match="can be reached by others: set SLLM_API_KEY"):
        require_key(host, None)
    require_key(host, "key")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_none(host: str) -> None:
    require_key(host, None)


def test_the_page_loads_nothing_from_elsewhere(server: Serving) -> None:
    with urllib.request.urlopen(f"{server.url}/") as page:
        policy, text = page.headers["content-security-policy"], page.read().decode()
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "http" not in text and "<script>" not in text and "style=" not in text


def test_metrics_count(server: Serving, client: openai.OpenAI) -> None:
    def figure(name: str) -> float:
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[-1]) if lines else 0.0

    names = (
        'sllm_requests_total{path="/v1/completions",status="200"}',
        'sllm_tokens_total{kind="completion"}',
    )
    before = [figure(name) for name in names]
    written = client.completions.create(
        model="tiny", prompt="x", max_tokens=7, seed=1
    ).usage.completion_tokens
    assert [figure(name) for name in names] == [before[0] + 1, before[1] + written]
    assert figure("sllm_rows") == 32 and figure("sllm_texts_waiting") == 0


# The batcher.


def test_a_closing_batcher_finishes_and_then_refuses(folder: str) -> None:
    batcher, events = Batcher(folder, rows=2), []
    requests = [Request(0, PROMPT, seed, Sampling(1.0), Limits(10, 10)) for seed in range(5)]
    numbers = batcher.submit(requests, lambda number, event: events.append((number, event)))
    batcher.close(60)
    assert {number for number, event in events if hasattr(event, "stopped")} == set(numbers)
    with pytest.raises(Closing):
        batcher.submit(requests, print)


def test_texts_fail_with_closing_when_the_time_to_drain_is_over(endless: str) -> None:
    batcher, events = Batcher(endless, rows=1), []
    long = [Request(0, "", seed, Sampling(), Limits(290, 100_000)) for seed in range(3)]
    batcher.submit(long, lambda number, event: events.append((number, event)))
    batcher.close(0.2)
    assert sum(isinstance(event, Closing) for _, event in events) == 3


def test_a_reload_takes_the_new_weights(folder: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    place = save(small_model("sllm", tokenizer), tmp_path / "m", tokenizer)
    batcher = Batcher(place, rows=2)

    def text() -> str:
        done: list[Any] = []
        batcher.submit([Request(0, PROMPT, 1, Sampling(), Limits(8, 8))], lambda _, event: done.append(event))
        wait_for(lambda: done and hasattr(done[-1], "stopped"))
        return done[-1].text

    before = text()
    save(small_model("sllm", tokenizer, seed=1), tmp_path / "m", tokenizer)
    batcher.reload()
    wait_for(lambda: text() != before)
    (tmp_path / "m/config.json").unlink()
    with pytest.raises(UserError):
        batcher.reload()
    assert text() != before
    batcher.close(5)


def test_weights_that_are_overwritten_while_they_are_served(folder: str, tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "m")
    batcher = Batcher(str(place), rows=1)
    weights = {name: tensor.clone() for name, tensor in batcher.loaded.model.state_dict().items()}
    with open(place / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 10)
        file.write(bytes(size - file.tell()))
    for name, tensor in batcher.loaded.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    batcher.close(5)


def test_a_reload_takes_the_new_template(folder: str) -> None:
    batcher = Batcher(folder, rows=2)
    server = Server(batcher, Settings(chat_template=TEMPLATE))
    messages = [{"role": "user", "content": "Hello"}]
    assert server._template.render(messages=messages) == "user: Hello\nassistant: "
    with pytest.raises(UserError, match="not valid Jinja"):
        server.reload("{% for %}")
    assert server._template.render(messages=messages).startswith("user")
    server.reload("{{ messages[0].content }}!")
    assert server._template.render(messages=messages) == "Hello!"
    batcher.close(5)


def test_the_queue_takes_all_texts_of_a_request_or_none(endless: str) -> None:
    batcher = Batcher(endless, rows=1, most_waiting=1)
    many = [Request(0, "", seed, Sampling(), Limits(290, 2000)) for seed in range(3)]
    with pytest.raises(Busy):
        batcher.submit(many, print)
    assert batcher.waiting == batcher.generating == 0
    numbers = batcher.submit(many[:2], lambda *_: None)
    batcher.cancel(numbers)
    wait_for(lambda: batcher.waiting == batcher.generating == 0)
    started = time.monotonic()
    batcher.close(20)
    assert time.monotonic() - started < 15
