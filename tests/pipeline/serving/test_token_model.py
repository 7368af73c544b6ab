"""A token-level model behind the same server, and the benchmark that compares it with an SLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from helpers import tokenizer_folders
from helpers.model_folders import save, small_model
from helpers.server import Serving, serving
from transformers import AutoModelForCausalLM

from data_prep.common.errors import UserError, run_main
from data_prep.text.tokenizer import load_tokenizer
from pipeline.cli import main as cli
from pipeline.generation.api import generate_many
from pipeline.generation.results import Limits
from pipeline.generation.sampling import Sampling
from pipeline.models.inference import load_for_generation
from pipeline.models.token_lm import TokenLM
from pipeline.serving.benchmark import Asked, format_serving, run

PROMPTS = ["The list is of 3 items. It", "", "“Well,” said the engineer", "  A word\n"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("served")
    tokenizer = load_tokenizer(tokenizer_folders.byte_level(place / "tokenizer"))
    return {kind: save(small_model(kind, tokenizer), place / kind, tokenizer) for kind in ("sllm", "lm")}


@pytest.fixture(scope="module")
def server(folders: dict[str, str]) -> Iterator[Serving]:
    with serving(folders["lm"], rows=8) as running:
        yield running


@pytest.fixture
def client(server: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_greedy_texts_are_those_of_hugging_face(client: openai.OpenAI, folders: dict[str, str]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folders["lm"]).eval()
    tokenizer = load_tokenizer(Path(folders["lm"]) / "tokenizer")
    answer = client.completions.create(model="lm", prompt=PROMPTS, max_tokens=25, temperature=0)
    for prompt, choice in zip(PROMPTS, answer.choices, strict=True):
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False)
        new = [token for token in found[0, ids.shape[1] :].tolist() if token != tokenizer.eos_id]
        assert choice.text == tokenizer.decode(new)
        assert choice.finish_reason == ("length" if len(new) == 25 else "stop")


def test_many_clients_get_their_own_texts(server: Serving, folders: dict[str, str]) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model="lm", prompt=PROMPTS[seed % 4], max_tokens=5 + seed % 30, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(40)))

    model, tokenizer = load_for_generation(folders["lm"])
    for seed, text in enumerate(asyncio.run(everyone())):
        limits = Limits(1 << 30, 5 + seed % 30)
        ((alone,),) = generate_many(
            model, tokenizer, [PROMPTS[seed % 4]], Sampling(1.0), limits, 1, seed=seed
        )
        assert text == alone.text


def test_positions_end_a_text_and_refuse_a_prompt(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="lm", prompt="x", max_tokens=1000, seed=1, logprobs=1, extra_body={"top_k": 50}
    )
    (choice,) = whole.choices
    # 300 positions: the start, the prompt's one token, and all new ones but the last.
    assert choice.finish_reason == "stop" or whole.usage.completion_tokens == 299
    assert len(choice.logprobs.tokens) == whole.usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match="positions for 299: shorten the prompt"):
        client.completions.create(model="lm", prompt="x" * 600)
    with pytest.raises(openai.BadRequestError, match="max_sentences: this model has tokens only"):
        client.completions.create(model="lm", prompt="x", extra_body={"max_sentences": 2})


def test_a_control_is_not_served(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(Path(folders["lm"]) / "tokenizer")
    model: Any = small_model("lm", tokenizer)
    assert isinstance(model, TokenLM)
    model.config.sentence_ends = True
    save(model, tmp_path / "control", tokenizer)
    with pytest.raises(UserError, match="reads sentence ends is a control"):
        load_for_generation(tmp_path / "control")
    words = ["serve", "--model", str(tmp_path / "control"), "--port", "0"]
    assert run_main("sllm", lambda: cli.main(words)) == 2
    err = capsys.readouterr().err
    assert "reads sentence ends is a control, and writes no texts" in err and err.count("\n") == 1


# The benchmark.


def test_two_servers_under_load(folders: dict[str, str], server: Serving, tmp_path: Path) -> None:
    with serving(folders["sllm"], rows=8) as other:
        output = str(tmp_path / "serving.json")
        urls = [other.url, f"{server.url}/v1"]
        result = run([], urls, [30.0], [4], 1.0, Asked(PROMPTS, 12, 1.0), 8, "none", output)
    assert json.loads(Path(output).read_text()) == result
    for side, url in zip(result["servers"], urls, strict=True):
        assert side["name"] == url and side["texts"]["other"] == 0
        open_loop, closed = side["points"]
        assert open_loop["rate"] == 30 and closed["clients"] == 4
        assert 10 < open_loop["requests"] < 60  # a Poisson process of 30
        for point in side["points"]:
            assert point["failures"] == {} and point["tokens"] > point["requests"]
            assert 0 < point["first"]["p50"] <= point["first"]["p99"] <= point["whole"]["p99"]
            assert point["tokens_per_cpu_second"] == point["tokens"] / point["cpu_seconds"]
        assert side["texts"]["compared"] == sum(point["requests"] for point in side["points"])
    # Both get the same arrivals.
    assert len({side["points"][0]["requests"] for side in result["servers"]}) == 1
    shown = format_serving(result)
    assert "30/s" in shown and "4 clients" in shown and "0 of" in shown


def test_failures_and_other_texts_are_counted(folders: dict[str, str]) -> None:
    with serving(folders["sllm"], rows=1, queue=1) as server:
        result = run([], [server.url], [], [8], 0.5, Asked(PROMPTS, 12, 1.0), 8, "none", None)
    (point,) = result["servers"][0]["points"]
    assert point["failures"]["status 429"] > 0
    assert result["servers"][0]["texts"]["compared"] == point["requests"] - sum(point["failures"].values())


@pytest.mark.long
@pytest.mark.launch
def test_the_command_starts_servers(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", folders["sllm"], folders["lm"], "--clients", "3", "--seconds", "1", "--json"]
    assert cli.main(["benchmark", "serve", *words, "--max-tokens", "10"]) == 0
    for side in json.loads(capsys.readouterr().out)["servers"]:
        assert len(side["generate_many"]) == 2 and side["start_seconds"] > 0
        assert all(one["tokens_per_cpu_second"] > 0 for one in side["generate_many"])
        assert side["texts"]["other"] == 0


def test_what_cannot_be_measured(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([], "give --model FOLDER or --url"),
        (["--url", "http://127.0.0.1:9"], "give --rate or --clients"),
        (["--url", "http://127.0.0.1:9", "--clients", "1"], "no server of OpenAI's API there"),
    ):
        assert run_main("sllm", lambda words=words: cli.main(["benchmark", "serve", *words])) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
