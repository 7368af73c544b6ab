"""`sllm inspect --fit`: what it chooses for which memory, and the YAML it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.recipes import write_recipe

from data_prep.common.errors import UserError, run_main
from pipeline.cli import main as cli
from pipeline.config.schema import load_recipe
from pipeline.costs.fit import best, bin_sizes, fit, read_size
from pipeline.costs.inspect import inspect
from pipeline.costs.options import Cluster

WIDE = {"backbone": {"hidden_size": 512, "word_embed_proj_dim": 512}}


def found_by(recipe: Path, memory: str, **cluster) -> dict:
    return fit(recipe, None, 8000, 10.9, "bf16", memory, Cluster(**cluster))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, "lm", data={"bin_tokens": 1024, "bins_per_step": 4}, **WIDE)


def test_the_chosen_candidate_is_what_inspect_predicts(recipe):
    chosen = found_by(recipe, "80GB", gpus=4)["chosen"]
    assert chosen["bins_per_step"] * chosen["bin_tokens"] == 1024 * 4
    cluster = Cluster(gpus=4, strategy=[chosen["strategy"]], accumulation=[chosen["accumulation"]])
    same = inspect(recipe, None, 8000, chosen["bin_tokens"], cluster=cluster)
    [memory], [time] = same["memory_per_gpu"], same["traffic"]
    assert chosen["peak"] == pytest.approx(memory["total"], rel=1e-9)
    assert chosen["step_seconds"] == pytest.approx(time["step_seconds"], rel=1e-9)
    assert chosen["sent_bytes"] == time["sent_bytes"]


def test_less_memory_costs_time_until_nothing_fits(recipe):
    before = 0.0
    for memory in ("80GB", "0.19GB", "0.15GB"):
        found = found_by(recipe, memory, strategy=("zero0", "zero1"))
        chosen = found["chosen"]
        assert chosen["peak"] <= 0.9 * read_size(memory)
        assert chosen["step_seconds"] >= before
        before = chosen["step_seconds"]
        assert chosen in found["candidates"] and len(found["candidates"]) == 4
    with pytest.raises(UserError, match=r"--fit 0\.01GB: nothing fits: .* needs 0\.1 GB"):
        found_by(recipe, "0.01GB", strategy=("zero0", "zero1"))


def test_one_gpu_takes_zero1(recipe):
    found = found_by(recipe, "80GB", gpus=1)
    assert found["chosen"]["strategy"] == "zero1"
    assert "zero0" not in {one["strategy"] for one in found["candidates"]}


def test_offloading_is_the_last_choice_and_large_bins_win_among_equals():
    def candidate(strategy: str, seconds: float, tokens: int) -> dict:
        return {"strategy": strategy, "step_seconds": seconds, "bin_tokens": tokens}

    slow, fast = candidate("zero2", 2.0, 8), candidate("zero3-offload", 1.0, 8)
    near = candidate("zero1", 2.01, 16)
    assert best([fast, slow]) == slow and best([fast]) == fast and best([]) is None
    assert best([slow, near, candidate("zero1", 3.0, 32)]) == near


def test_bins_hold_a_window_and_divide_the_step(tmp_path):
    odd = load_recipe(write_recipe(tmp_path, data={"bin_tokens": 1536, "bins_per_step": 3}))
    assert bin_sizes(odd) == [384, 768, 1536]


def test_sizes_of_memory():
    assert read_size("80GB") == read_size("80") == read_size("80 g") == 80e9
    assert read_size("24GiB") == 24 * 2**30
    for wrong in ("", "80TBB", "GB", "-3GB", "0"):
        with pytest.raises(UserError, match="such as 80GB"):
            read_size(wrong)


def test_the_command_prints_yaml_for_the_recipe(recipe, capsys):
    words = ["inspect", "--recipe", str(recipe), "--fit", "80GB", "--gpus", "4", "--vocab-size", "8000"]
    assert run_main("sllm", lambda: cli.main(words)) == 0
    out = capsys.readouterr().out
    settings = yaml.safe_load(out[out.index("# sllm train") :])
    assert run_main("sllm", lambda: cli.main([*words, "--json"])) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    assert settings["data"] == {key: chosen[key] for key in ("bin_tokens", "bins_per_step")}
    assert f"--deepspeed-config {chosen['strategy']}" in out and "chosen" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recipe", "demo-lm", "--fit", "lots"), "such as 80GB"),
        (("--recipe", "demo-lm", "--fit", "80GB", "--tokens", "64"), "leave out --tokens"),
        (("--recipe", "demo-lm", "--fit", "80GB", "--accumulation", "2"), "leave out"),
        (("--all", "--nodes", "2"), "give --recipe"),
        (("--recipe", "demo-lm", "--bandwidth", "0"), "--bandwidth"),
        (("--recipe", "demo-lm", "--strategy", "zero3-plusplus"), "no estimate"),
        (("--recipe", "demo-lm", "--strategy", "zero7"), "does not exist"),
    ],
)
def test_bad_input_is_refused_in_one_line(words, message, capsys):
    assert run_main("sllm", lambda: cli.main(["inspect", *words])) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1
