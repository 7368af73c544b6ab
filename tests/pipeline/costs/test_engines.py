"""Other engines of `sllm benchmark generation`: they write what Hugging Face's `generate` writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from data_prep.common.errors import UserError
from pipeline.costs.benchmark_generation import format_benchmark, run
from pipeline.costs.engines import ENGINES, Case, CTranslate2Side, LlamaCppSide, StaticSide, TokenSide
from pipeline.costs.options import GenerationBenchmark

pytestmark = pytest.mark.launch

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 80}
FAMILIES = {
    "opt": {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "llama": {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
CASE = Case(2, 9, 3, 5)


def options(folder: Path, family: str, **more: object) -> GenerationBenchmark:
    common = {"data": {"shards": ["x"], "window_tokens": 40}, "training": {"max_steps": 1}, "output_dir": "x"}
    backbone = {"model_type": family, "vocab_size": 64, **FAMILIES[family]}
    token_model = {**common, "objective": "lm", "model": {"backbone": backbone}}
    vae = {"vocab_size": 64, "hidden_size": 64, "heads": 4, "layers": 1}
    sllm = {**common, "objective": "sllm", "model": {"vae": vae, "backbone": backbone}}
    for name, recipe in (("lm", token_model), ("sllm", sllm)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    names = {"recipe": str(folder / "sllm.yaml"), "against": str(folder / "lm.yaml")}
    return GenerationBenchmark(**names, **{"threads": 1, "runs": 1, **more})


@pytest.mark.parametrize("family", FAMILIES)
def test_ctranslate2_writes_the_same_tokens(family: str, tmp_path: Path) -> None:
    side = CTranslate2Side(options(tmp_path, family), torch.device("cpu"))
    prompts = np.random.default_rng(0).integers(4, 64, (2, 9))
    ids = torch.from_numpy(prompts)
    # min_new_tokens keeps the end symbol out, as min_length does.
    whole = side.model.generate(ids, do_sample=False, min_new_tokens=15, max_new_tokens=15)
    found = side._generator.generate_batch(
        [[str(token) for token in row] for row in prompts.tolist()],
        max_length=15,
        min_length=15,
        sampling_topk=1,
        include_prompt_in_result=False,
    )
    assert [one.sequences_ids[0] for one in found] == whole[:, 9:].tolist()
    turn = side.turn(CASE, prompts)
    assert turn.first_sentence > 0 and turn.tokens_per_second > 0
    assert turn.cached_tokens == 2 * (9 + 15 - 1)


def test_llama_cpp_writes_the_same_tokens(tmp_path: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama.cpp: llama-cpp-python is not installed (it is built from source)")
    prompts = np.random.default_rng(0).integers(4, 64, (2, 9))
    side = LlamaCppSide(options(tmp_path, "llama"), torch.device("cpu"))
    whole = side.model.generate(
        torch.from_numpy(prompts), do_sample=False, min_new_tokens=15, max_new_tokens=15
    )
    assert side.write(CASE, prompts).tolist() == whole[:, 9:].tolist()
    assert side.turn(CASE, prompts).cached_tokens == 2 * (9 + 15 - 1)
    small = LlamaCppSide(options(tmp_path, "llama", int8=True), torch.device("cpu"))
    assert small.bytes_per_token(CASE) < 0.3 * side.bytes_per_token(CASE)
    assert small.write(CASE, prompts).shape == (2, 15)


def test_llama_cpp_runs_llamas_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--engine llama.cpp: lm is of the family opt"):
        LlamaCppSide(options(tmp_path, "opt"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention_bias", True), ("mlp_bias", True), ("head_dim", 32), ("hidden_act", "gelu")]
    + [("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})],
)
def test_llama_cpp_runs_plain_llamas_only(key: str, value: object, tmp_path: Path) -> None:
    asked = options(tmp_path, "llama")
    recipe = yaml.safe_load((tmp_path / "lm.yaml").read_text())
    recipe["model"]["backbone"][key] = value
    (tmp_path / "lm.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=f"lm has {key.replace('parameters', 'type')} .*; give a plain Llama"):
        LlamaCppSide(asked, torch.device("cpu"))


class _LlamaCpp:
    """llama.cpp's contexts, counted; a context of more than 600 places has no memory."""

    GGML_TYPE_F32 = 0

    def __init__(self) -> None:
        self.live: set[int] = set()
        self.made = 0

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def llama_init_from_model(self, _: object, settings: SimpleNamespace) -> int | None:
        if settings.n_ctx > 600:
            return None
        self.made += 1
        self.live.add(self.made)
        return self.made

    def llama_free(self, context: int) -> None:
        self.live.remove(context)


def test_contexts_of_llama_cpp_are_freed_and_refused_without_memory() -> None:
    side = LlamaCppSide.__new__(LlamaCppSide)
    side._llama, side._loaded, side._made, side._int8 = _LlamaCpp(), None, None, False
    assert [side._context(case) for case in (CASE, CASE, Case(1, 9, 3, 5))] == [1, 1, 2]
    assert side._llama.live == {2}
    with pytest.raises(UserError, match="llama.cpp: no memory for 768 places"):
        side._context(Case(3, 9, 3, 5))
    assert not side._llama.live


def test_caches_of_all_engines_are_counted_alike(tmp_path: Path) -> None:
    prompts = np.random.default_rng(0).integers(4, 64, (2, 9))
    found = {}
    for name, side in ENGINES.items():
        if name == "llama.cpp":  # needs a build
            continue
        turn = side(options(tmp_path, "llama"), torch.device("cpu")).turn(CASE, prompts)
        found[name] = turn.cache_bytes / turn.cached_tokens
    token = 2 * 2 * 32 * 4  # keys and values, layers, 2 of 4 heads of 16, fp32
    assert found["hf"] == found["ctranslate2"] == token
    assert found["hf-static"] == pytest.approx(token, rel=0.1)  # one place more


def test_bytes_of_a_token_are_those_of_all_matrices_and_the_cache(tmp_path: Path) -> None:
    side = TokenSide(options(tmp_path, "llama"), torch.device("cpu"))
    tied_head = 64 * 64
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    weights = tied_head + 2 * layer + 64
    assert side.bytes_per_token(CASE) == 4 * weights + (9 + 7.5) * 2 * 2 * 32 * 4
    opt = TokenSide(options(tmp_path, "opt"), torch.device("cpu"))
    positions = 82 * 64  # a table: one row of it is read
    tied = opt.model.get_output_embeddings().weight is opt.model.get_input_embeddings().weight
    tables = positions + (0 if tied else 64 * 64)
    cached = (9 + 7.5) * 2 * 2 * 64 * 4
    assert opt.bytes_per_token(CASE) == 4 * (opt.parameters - tables) + cached


def test_a_result_has_the_bound_and_the_share_of_the_reading_rate(tmp_path: Path) -> None:
    asked = options(
        tmp_path, "llama", engine="ctranslate2", int8=True, sentences=2, context=(20,), no_memory=True
    )
    result = run(asked)
    [point] = result["points"]
    ours, other = point["model"], point["against"]
    assert result["engine"] == "ctranslate2" and result["reading_bytes_per_second"] > 1e8
    assert point["ratios"]["bytes_bound"] == other["bytes_per_token"] / ours["bytes_per_token"]
    speed = other["tokens_per_second"]["median"] * other["bytes_per_token"]
    assert other["reading_share"] == pytest.approx(speed / result["reading_bytes_per_second"])
    full = TokenSide(options(tmp_path, "llama"), torch.device("cpu"))
    case = Case(1, 20, 2, 11)
    assert other["bytes_per_token"] < full.bytes_per_token(case)  # weights of one byte
    assert "of reading rate" in format_benchmark(result)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "bf16"), ("cuda", "fp32")])
@pytest.mark.parametrize("side", [CTranslate2Side, LlamaCppSide])
def test_what_an_engine_for_cpus_does_not_run_is_refused(
    side: type[TokenSide], device: str, dtype: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"--engine {side.engine} is for CPUs"):
        side(options(tmp_path, "llama", dtype=dtype), torch.device(device))


def test_static_is_static(tmp_path: Path) -> None:
    side = StaticSide(options(tmp_path, "llama"), torch.device("cpu"))
    out = side.model.generate(
        torch.full((1, 3), 5), max_new_tokens=4, cache_implementation="static", return_dict_in_generate=True
    )
    assert type(out.past_key_values).__name__ == "StaticCache"
