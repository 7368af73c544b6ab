"""`sllm generate` over files and in the terminal: resumed files are those of one run, and mistakes are one
line.
"""

from __future__ import annotations

import json

import pytest
import torch
from helpers.model_folders import save, small_model

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.cli import generate as generate_command
from pipeline.cli import main as cli
from pipeline.cli.chat import converse
from pipeline.cli.generate import generate_file, generate_prompt, settings
from pipeline.generation.api import generate
from pipeline.models.sllm import SLLM

PROMPTS = ["The list", "", "One is set.", "他走了，", "It ends. The", "a b"]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> str:
    model = small_model("sllm", tokenizer, seed=4, max_tokens=12)
    with torch.no_grad():
        model.vae.head.bias[tokenizer.eos_id] += 3
    return save(model, tmp_path_factory.mktemp("command") / "sllm", tokenizer)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": p, "id": f"n{n}"}, ensure_ascii=False) for n, p in enumerate(PROMPTS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


HOW = {"max_sentences": 3, "temperature": 1.0, "seed": 7, "samples": 2}


def test_a_file_of_prompts_is_what_its_prompts_give_alone(folder, prompts, tmp_path):
    counts = generate_file(folder, prompts, tmp_path / "out.jsonl", settings(**HOW), batch_size=5)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [(line["prompt"], line["id"]) for line in lines] == [(p, f"n{n}") for n, p in enumerate(PROMPTS)]
    assert counts["prompts"] == 6 and counts["errors"] == counts["resumed"] == 0
    seeds = [sample["seed"] for line in lines for sample in line["samples"]]
    assert seeds == list(range(7, 19))
    assert counts["tokens"] == sum(
        len(s) for line in lines for sample in line["samples"] for s in sample["tokens"]
    )
    for line in lines[:3]:
        for sample in line["samples"]:
            how = settings(3, temperature=1.0, seed=sample["seed"])
            alone = generate_prompt(folder, line["prompt"], how)
            assert alone["text"] == line["prompt"] + sample["text"]


def texts(data: bytes) -> list:
    """The lines without log-probabilities and stop probabilities, whose last digits depend on the batch."""
    lines = [json.loads(line) for line in data.splitlines()]
    for line in lines:
        for sample in line["samples"]:
            for key in [key for key in sample if "probabilit" in key]:
                del sample[key]
    return lines


@pytest.mark.parametrize("kept", [0, 1, 200, 1500, None])
def test_a_started_file_is_continued_to_the_same_texts(kept, folder, prompts, tmp_path):
    how = settings(**HOW)
    generate_file(folder, prompts, tmp_path / "whole.jsonl", how, batch_size=4)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    generate_file(folder, prompts, tmp_path / "part.jsonl", how, batch_size=4)
    (tmp_path / "part.jsonl").write_bytes(whole[:kept])
    counts = generate_file(folder, prompts, tmp_path / "part.jsonl", how, batch_size=3)
    resumed = whole[:kept].count(b"\n")
    assert counts["resumed"] == resumed
    part = (tmp_path / "part.jsonl").read_bytes()
    assert texts(part) == texts(whole)
    assert part.splitlines()[:resumed] == whole.splitlines()[:resumed]  # what was there is left alone


def test_a_drawn_seed_is_taken_over_by_the_run_that_resumes(folder, prompts, tmp_path):
    how = {"max_sentences": 2, "temperature": 1.0}
    out = tmp_path / "out.jsonl"
    generate_file(folder, prompts, out, settings(**how), batch_size=4)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    generate_file(folder, prompts, out, settings(**how), batch_size=4)
    assert texts(out.read_bytes()) == texts(whole)


def test_other_settings_prompts_and_files_are_refused(folder, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    generate_file(folder, prompts, out, settings(**HOW), batch_size=4)
    with pytest.raises(UserError, match="started with temperature 1.0, not 0.5"):
        generate_file(folder, prompts, out, settings(**HOW | {"temperature": 0.5}), batch_size=4)
    with pytest.raises(UserError, match="started with seed 7, not 8"):
        generate_file(folder, prompts, out, settings(**HOW | {"seed": 8}), batch_size=4)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(prompts.read_text("utf-8").replace("One is", "Two is"), "utf-8")
    with pytest.raises(UserError, match="out.jsonl line 3: is of another prompt"):
        generate_file(folder, changed, out, settings(**HOW), batch_size=4)
    (tmp_path / "mine.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match="not started by this command"):
        generate_file(folder, prompts, tmp_path / "mine.jsonl", settings(**HOW), batch_size=4)
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"
    out.write_bytes(b"[1]\n")
    with pytest.raises(UserError, match="out.jsonl line 1: was changed by something else"):
        generate_file(folder, prompts, out, settings(**HOW), batch_size=4)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "a"}\nrubbish\n', "line 2: must be an object"),
        (b'{"text": "a"}\n', "line 1: must be an object"),
        (b'{"prompt": "\\ud800"}\n', "line 1: the prompt is not valid"),
        (b"\xff\xfe", "not UTF-8"),
        (b"\n", "holds no prompt"),
    ],
)
def test_bad_prompt_files_are_refused(content, says, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=says):
        generate_file(tmp_path, tmp_path / "p.jsonl", tmp_path / "o.jsonl", settings(1), batch_size=1)
    assert not (tmp_path / "o.jsonl").exists()


def test_a_prompt_too_long_is_an_error_line_and_status_1(folder, tmp_path, capsys):
    room = SLLM.from_pretrained(folder).max_sentences
    lines = [{"prompt": "It is. " * (room + 2)}, {"prompt": "The"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["generate", "--model", folder, "--prompts", str(tmp_path / "p.jsonl")]
    arguments += ["--output", str(tmp_path / "o.jsonl"), "--max-sentences", "2", "--json"]
    for _ in range(2):  # run again, there is nothing left to do, and the prompt is still refused
        assert cli.main(arguments) == 1
        assert json.loads(capsys.readouterr().out)["errors"] == 1
    refused, good = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert "shorten the prompt" in refused["error"] and good["samples"][0]["text"]


def test_best_of_keeps_the_likeliest(folder):
    many = generate_prompt(folder, "The", settings(2, samples=5, seed=1))
    best = generate_prompt(folder, "The", settings(2, best_of=5, seed=1))
    assert len(many["samples"]) == 5 and len(best["samples"]) == 1
    likeliest = max(many["samples"], key=lambda sample: sample["log_probability"])
    assert best["samples"] == [likeliest] and best["text"] == "The" + likeliest["text"]


def test_several_texts_in_a_conversation_and_impossible_seeds_are_refused():
    with pytest.raises(UserError, match="--interactive writes one text"):
        cli.main(["generate", "--model", "m", "--interactive", "--samples", "2"])
    for seed in (-1, 1 << 64):
        with pytest.raises(UserError, match="seed .*: must be from 0"):
            settings(1, seed=seed)


@pytest.mark.parametrize("flags", [{"samples": 3}, {"best_of": 2}])
def test_several_greedy_texts_are_refused(flags):
    with pytest.raises(UserError, match="all the same at temperature 0"):
        settings(1, temperature=0.0, **flags)
    assert settings(1, **flags).sampling.temperature == 1


def test_a_conversation_goes_on_from_what_is_there(folder, tokenizer):
    typed, shown = ["The list", "", "/new", "One is set. ", "\udce9"], []

    def read() -> str:
        if not typed:
            raise EOFError
        return typed.pop(0)

    how = settings(2, temperature=1.0, seed=3)
    first, more, new = converse(folder, how, read, shown.append)
    assert "not valid" in shown[-1]
    model = SLLM.from_pretrained(folder)
    prompts = ["The list", "The list" + first, "One is set. "]
    for turn, (prompt, text) in enumerate(zip(prompts, (first, more, new), strict=True)):
        run = generate(model, tokenizer, prompt, 2, 1.0, seed=3 + turn)
        assert "".join(s.text for s in run) == text
        assert f"{text}\n[{run.stopped}]\n" in "".join(shown)


def test_live_text_in_the_terminal(folder, monkeypatch, capsys):
    typed = iter(["The list"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed, None) or (_ for _ in ()).throw(EOFError))
    assert (
        cli.main(
            ["generate", "--model", folder, "--interactive", "--max-sentences", "2", "--temperature", "0"]
        )
        == 0
    )
    run = generate(
        SLLM.from_pretrained(folder), generate_command.load_for_generation(folder)[1], "The list", 2
    )
    text = "".join(sentence.text for sentence in run)
    assert capsys.readouterr().out == f"{text}\n[{run.stopped}]\n"


def test_the_models_stream_is_its_generate(folder):
    model = SLLM.from_pretrained(folder)
    how = {"max_sentences": 3, "temperature": 0.9, "seed": 2, "min_p": 0.01, "max_tokens": 20}
    run = model.stream("The list", **how)
    assert "".join(piece.text for piece in run.pieces()) == model.generate("The list", **how)
    assert run.result.log_probability < 0
