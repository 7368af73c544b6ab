"""Hugging Face's format: Auto classes, save and load in every way, `generate`, an export's model card."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ranks
from helpers.backbone_families import CONFIGS, family_lm, family_sllm
from helpers.data_prep_command import data_prep
from helpers.model_folders import save, small_model, write_jsonl
from helpers.models import random_batch, small_vae
from helpers.paths import REPOSITORY
from helpers.runs import MODELS, arguments
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from data_prep.common.errors import UserError
from data_prep.shards.reader import ShardSet
from data_prep.text.tokenizer import load_tokenizer
from pipeline import SLLM, SentenceVAE, SLLMConfig
from pipeline.export.model_card import RESULTS
from pipeline.export.model_folder import export_run
from pipeline.generation.api import generate
from pipeline.models.factory import load_model
from pipeline.training.provenance import provenance

pytestmark = pytest.mark.launch

MAKERS = {
    "vae": small_vae,
    "vae-tied": lambda: small_vae(tie_word_embeddings=True),
    "sllm-tied": lambda: family_sllm("opt", tie_word_embeddings=True),
    **{f"sllm-{name}": lambda name=name: family_sllm(name) for name in CONFIGS},
}


def scores(model, seed: int = 31) -> torch.Tensor:
    with torch.no_grad():
        return model(random_batch(seed)).target_nll_N


# --- one line to import ---------------------------------------------------------------------------


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_import_makes_the_auto_classes_know_our_folders(tmp_path):
    family_sllm("llama").save_pretrained(tmp_path / "sllm")
    small_vae().save_pretrained(tmp_path / "vae")
    load = "from transformers import AutoModel; "
    load += "".join(
        f"print(type(AutoModel.from_pretrained({str(tmp_path / kind)!r})).__name__); "
        for kind in ("sllm", "vae")
    )
    assert python("from pipeline import SentenceVAE; " + load) == "SLLM\nSentenceVAE"
    assert "does not recognize this architecture" in python(
        "import contextlib\ntry:\n  import pipeline; " + load + "\nexcept ValueError as error: print(error)"
    )


def test_the_package_alone_imports_nothing_heavy():
    code = "import sys, pipeline, pipeline.config.schema; print({'torch', 'transformers'} & set(sys.modules))"
    assert python(code) == "set()"
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        from pipeline import Nonsense  # noqa: F401


def test_a_token_model_folder_needs_nothing_of_ours(tmp_path):
    model = family_lm("qwen3")
    model.model.save_pretrained(tmp_path)
    code = "import torch, sys; from transformers import AutoModelForCausalLM as A; "
    code += f"m = A.from_pretrained({str(tmp_path)!r}).eval(); "
    code += "print(m(torch.tensor([[0, 5, 6]])).logits[0, -1, 7].item(), 'pipeline' in sys.modules)"
    value, ours = python(code).split()
    with torch.no_grad():
        expected = model.model(torch.tensor([[0, 5, 6]])).logits[0, -1, 7].item()
    assert float(value) == pytest.approx(expected, abs=1e-5) and ours == "False"


# --- save and load --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_gives_the_same_model_also_after_a_move(name, tmp_path):
    model = MAKERS[name]()
    model.save_pretrained(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert str(tmp_path) not in (tmp_path / "there" / "config.json").read_text()
    loaded = AutoModel.from_pretrained(tmp_path / "there")
    assert type(loaded) is type(model) and not loaded.training
    for (key, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    for (key, a), (_, b) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(a, b), key  # rotary frequencies: not in the file
    assert torch.equal(scores(model), scores(loaded))


@pytest.mark.parametrize("name", MAKERS)
def test_config_round_trip(name, tmp_path):
    config = MAKERS[name]().config
    config.save_pretrained(tmp_path / "one")
    again = AutoConfig.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()
    if name.startswith("sllm"):
        assert type(again) is SLLMConfig and type(again.backbone) is type(config.backbone)
        assert again.backbone.to_dict() == config.backbone.to_dict()
        assert again.vae.to_dict() == config.vae.to_dict()
    assert (
        type(again).from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()
    )


def test_no_folder_of_the_maker_is_published(tmp_path, tiny_tokenizer):
    """A backbone that began from a folder must not write that folder's path into the config."""
    from pipeline.models.factory import build_model

    family_lm("qwen2").model.save_pretrained(tmp_path / "secret-place")
    text = {"segmenter": "clause", "language": "en", "max_tokens": 16}
    sizes = {"hidden_size": 32, "layers": 1, "heads": 4}
    path = {"path": str(tmp_path / "secret-place")}
    model = build_model("sllm", sizes, path, load_tokenizer(tiny_tokenizer), text, 100)
    model.save_pretrained(tmp_path / "model")
    assert "secret-place" not in (tmp_path / "model" / "config.json").read_text()


@pytest.mark.parametrize("name", ["sllm-tied", "sllm-opt-post-norm", "sllm-llama", "sllm-qwen3-narrow"])
def test_straight_to_bfloat16(name, tmp_path):
    model = MAKERS[name]()
    model.save_pretrained(tmp_path)
    half = SLLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for (key, a), (_, b) in zip(half.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b.bfloat16()), key
    # Rotary frequencies stay exact: rounded ones would be other positions.
    assert all(torch.equal(a, b) for a, b in zip(half.buffers(), model.buffers(), strict=True))
    expected = scores(model)
    assert (scores(half) - expected).abs().mean() < 0.05 * expected.mean()
    half.save_pretrained(tmp_path / "half")
    assert torch.equal(scores(SLLM.from_pretrained(tmp_path / "half", dtype="auto")), scores(half))
    back = load_model(tmp_path / "half")  # our own loader computes in fp32
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert (scores(back) - expected).abs().mean() < 0.05 * expected.mean()


@pytest.mark.parametrize("name", ["vae", "sllm-tied", "sllm-llama"])
def test_loading_never_holds_random_weights(name, tmp_path, monkeypatch):
    """The low-memory path: modules are made without storage, then filled from the file."""
    model, devices = MAKERS[name](), set()
    model.save_pretrained(tmp_path)
    made = type(model).__init__

    def spy(self, config, *args, **kwargs):
        made(self, config, *args, **kwargs)
        devices.update(p.device.type for p in self.parameters())

    monkeypatch.setattr(type(model), "__init__", spy)
    loaded = type(model).from_pretrained(tmp_path)
    assert devices == {"meta"}
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert torch.equal(scores(loaded), scores(model))


@pytest.mark.parametrize("name", ["vae-tied", "sllm-tied", "sllm-llama"])
def test_large_models_are_written_in_several_files(name, tmp_path):
    model = MAKERS[name]()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and "model.safetensors" not in files
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert torch.equal(scores(load_model(tmp_path)), scores(model))
    (tmp_path / files[1]).unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["vae-tied", "sllm-tied"])
def test_tied_weights_stay_tied(name, tmp_path):
    model = MAKERS[name]()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    vae = loaded if isinstance(loaded, SentenceVAE) else loaded.vae
    assert vae.head.weight is vae.encoder.embedding.token.weight is vae.decoder.embedding.token.weight
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_weights_of_another_family_are_refused(tmp_path):
    for name in ("llama", "qwen3"):
        family_sllm(name).save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "llama" / "model.safetensors", tmp_path / "qwen3" / "model.safetensors")
    with pytest.raises(UserError, match="weights do not match its config"):
        load_model(tmp_path / "qwen3")


@pytest.mark.parametrize("change", ["missing", "unknown"])
@pytest.mark.parametrize("name", ["vae", "sllm-qwen2"])
def test_missing_and_unknown_weights_are_refused_by_name(name, change, tmp_path):
    MAKERS[name]().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key in sorted(weights) if key.endswith("ffn_in.weight"))
    other = key.replace("ffn_in", "ffn_more")
    if change == "unknown":
        weights[other] = weights[key].clone()
    else:
        del weights[key]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    named = other if change == "unknown" else key
    with pytest.raises(UserError, match=rf"weights do not match its config \(first: {re.escape(named)}\)"):
        load_model(tmp_path)


# --- generate -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory) -> str:
    tokenizer = load_tokenizer(tiny_tokenizer)
    model = small_model("sllm", tokenizer, seed=3)
    torch.nn.init.constant_(model.stop_head.bias, -50.0)  # it continues to the sentence limit
    return save(model, tmp_path_factory.mktemp("generate") / "sllm", tokenizer)


def test_generate_is_the_generator_of_the_command(folder, tiny_tokenizer):
    model, tokenizer = SLLM.from_pretrained(folder), load_tokenizer(tiny_tokenizer)
    expected = list(generate(model, tokenizer, "The list", max_sentences=3, temperature=0.9, seed=5))
    settings = {"max_sentences": 3, "temperature": 0.9, "seed": 5}
    text = model.generate("The list", **settings)
    assert text == "".join(sentence.text for sentence in expected) and text
    tokens = model.generate("The list", **settings, return_tokens=True)
    assert tokens == [list(sentence.tokens) for sentence in expected] and len(tokens) == 3
    assert model.generate("The list", tokenizer, **settings) == text
    assert model.generate("The list", **settings | {"seed": 6}) != text


def test_generate_in_bfloat16_and_by_the_auto_class(folder):
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert len(model.generate("The list", max_sentences=2, return_tokens=True)) == 2


def test_generate_refuses_in_one_line(folder):
    model = SLLM.from_pretrained(folder)
    with pytest.raises(UserError, match="temperature -1: must be 0"):
        model.generate("x", temperature=-1)
    with pytest.raises(UserError, match="give its tokenizer"):
        family_sllm("llama").generate("x")


# --- the model card -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(pool, tiny_shards, tiny_valid_shards, tmp_path_factory) -> Path:
    """A folder with one small run per objective, each evaluated twice."""
    folder = tmp_path_factory.mktemp("runs")
    for objective, model in MODELS.items():
        recipe = {
            "objective": objective,
            "output_dir": "set below",
            "data": {
                "shards": [str(tiny_shards)],
                "validation": str(tiny_valid_shards),
                "window_tokens": 128,
            },
            "model": model,
            "training": {"max_steps": 4, "eval_every": 2, "eval_bins": 3, "save_every": 2},
            "log": {"tensorboard": False},
        }
        recipe["data"] |= {"bin_tokens": 256, "bins_per_step": 2}
        (folder / f"{objective}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        command = arguments(folder, objective, "zero0", folder / objective)
        assert pool.run(1, ranks.train, command) == [0]
    return folder


@pytest.fixture
def run(request, runs, tmp_path) -> Path:
    """A copy of the run of one objective that the test may change."""
    return Path(shutil.copytree(runs / request.param, tmp_path / request.param))


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card[4 : card.index("\n---\n", 4)])


every_objective = pytest.mark.parametrize("run", MODELS, indirect=True)
one_objective = pytest.mark.parametrize("run", ["sllm"], indirect=True)


@every_objective
def test_an_export_has_a_card_that_says_what_the_run_was(run, tmp_path):
    model = export_run(run, tmp_path / "model", "last")
    card = (model / "README.md").read_text(encoding="utf-8")
    front, objective = front_matter(card), run.name
    assert front["language"] == ["en"] and "license" not in front and "base_model" not in front
    assert front["library_name"] == ("transformers" if objective == "lm" else "sentence-llm")
    assert ("pipeline_tag" in front) is (objective != "vae")
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evaluations] == [2, 4]
    best = min(evaluations, key=lambda e: e["bits_per_byte"])
    for name, row in (("best", best), ("last", evaluations[-1])):
        assert f"| {name} | {row['step']} | {row['bits_per_byte']:.5g} | {row['ppl']:.5g} |" in card
    provenance = json.loads((run / "provenance.json").read_text())
    for part in provenance["shards"] + provenance["validation"]:
        assert part["fingerprint"] in card and f"{part['totals']['tokens']:,} tokens" in card
    for package in ("torch", "transformers", "deepspeed"):
        assert f"| {package} | {provenance['packages'][package]} |" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe == yaml.safe_load((run / "recipe.yaml").read_text())


@every_objective
def test_every_figure_on_the_card_is_the_runs(run, tmp_path):
    model = export_run(run, tmp_path / "model", "last")
    card = (model / "README.md").read_text(encoding="utf-8")
    meta = json.loads((run / "checkpoints" / "step-00000004" / "meta.json").read_text())
    sources = [
        meta,
        json.loads((run / "provenance.json").read_text()),
        yaml.safe_load((run / "recipe.yaml").read_text()),
    ]
    sources += [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    known = set(numbers(yaml.safe_dump(meta["recipe"]))) | {"00000004", "8"}  # step-00000004, UTF-8
    for value in leaves(sources):
        known |= set(numbers(str(value)))
        if isinstance(value, (int, float)):
            known |= set(numbers(f"{value:,}")) | set(numbers(f"{value:.5g}"))
    parameters = sum(p.numel() for p in load_model(model).parameters())
    known |= {f"{parameters:,}", str(meta["position"][0][1] + 1)}
    unknown = [number for number in numbers(card) if number not in known]
    # The example's own argument is the only number that is ours.
    assert [n for n in unknown if n != "5"] == []
    assert len(set(numbers(card))) > 30


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", re.sub(r",(?!\d{3})", " ", text))


def leaves(value) -> Iterator:
    if isinstance(value, dict):
        for one in value.values():
            yield from leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one)
    else:
        yield value


@one_objective
def test_a_card_depends_on_the_run_alone(run, tmp_path, monkeypatch):
    first = export_run(run, tmp_path / "one" / "model", "last") / "README.md"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9.9")
    monkeypatch.chdir(tmp_path)
    second = export_run(run, tmp_path / "two" / "model", "last") / "README.md"
    assert first.read_bytes() == second.read_bytes()


@one_objective
def test_the_cards_example_runs(run, tmp_path):
    model = export_run(run, tmp_path / "model", "last")
    code = (model / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "print(model.generate(" in code
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@one_objective
def test_results_of_evaluate_enter_the_card(run, tmp_path, tiny_valid_shards):
    from pipeline.checkpoints import store as checkpoints
    from pipeline.evaluation.evaluate import evaluate

    model = export_run(run, tmp_path / "model", "last")
    result = evaluate(model, data=tiny_valid_shards)
    (run / RESULTS).mkdir()
    (run / RESULTS / "valid.json").write_text(json.dumps(result), encoding="utf-8")
    card = (export_run(run, model, "last") / "README.md").read_text()
    assert result["data_fingerprint"] in card
    assert f"| valid | {tiny_valid_shards} | {result['bits_per_byte']:.5g} | {result['ppl']:.5g} |" in card
    assert f"{result['vector_gain']:.5g}" in card

    # The same file beside other weights is refused: the figures would be another model's.
    checkpoint = run / "checkpoints" / "step-00000004"
    meta = checkpoints.read_meta(checkpoint)
    meta.tokens += 1
    checkpoints.write_meta(checkpoint, meta)
    with pytest.raises(UserError, match="valid.json measured .* which does not hold step-00000004"):
        export_run(run, model, "last")
    meta.tokens -= 1
    checkpoints.write_meta(checkpoint, meta)
    (run / RESULTS / "valid.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is no output of `sllm evaluate --json`"):
        export_run(run, model, "last")
    assert (model / "README.md").read_text() == card, "a refused export leaves the old one alone"


@every_objective
def test_the_mean_of_the_last_checkpoints(run, tmp_path):
    from pipeline.checkpoints import store as checkpoints
    from pipeline.checkpoints.zero_shards import Parts

    model = export_run(run, tmp_path / "mean", average=2)
    paths = checkpoints.listed(run)[0]
    parts = [Parts(path, checkpoints.read_meta(path)) for path in paths]
    assert [path.name for path in paths] == ["step-00000004", "step-00000002"]
    found = load_model(model).state_dict()
    for name, tensor in found.items():
        each = [part.tensor(name).double() for part in parts]
        torch.testing.assert_close(tensor.double(), (each[0] + each[1]) / 2, rtol=0, atol=1e-6)
    assert any((found[name] - parts[0].tensor(name)).abs().max() > 1e-5 for name in found)
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "| weights | mean of the last 2 checkpoints: step-00000004, step-00000002 |" in card
    assert json.loads((model / "training.json").read_text())["averaged"] == [path.name for path in paths]
    one = load_model(export_run(run, tmp_path / "one", average=1)).state_dict()
    last = load_model(export_run(run, tmp_path / "last", "last")).state_dict()
    assert all(torch.equal(one[name], last[name]) for name in last)


@one_objective
def test_a_mean_that_cannot_be_made_is_refused(run, tmp_path, tiny_valid_shards):
    from pipeline.evaluation.evaluate import evaluate

    for given, message in (
        ({"average": 3}, "--average 3: .* keeps its last 2 checkpoints"),
        ({"average": 2, "which": "best"}, "leave --which and --weights out"),
        ({"average": 2, "weights": "ema"}, "leave --which and --weights out"),
    ):
        with pytest.raises(UserError, match=message):
            export_run(run, tmp_path / "model", **given)
    # An older checkpoint that is kept as the best is none of the last.
    shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000001")
    with pytest.raises(UserError, match="--average 3: .* keeps its last 2 checkpoints"):
        export_run(run, tmp_path / "model", average=3)
    # Figures of one checkpoint are not those of the mean.
    result = evaluate(export_run(run, tmp_path / "last", "last"), data=tiny_valid_shards, max_documents=1)
    (run / RESULTS).mkdir()
    (run / RESULTS / "valid.json").write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(UserError, match="valid.json measured .* which does not hold step-00000004"):
        export_run(run, tmp_path / "model", average=2)
    with open(run / "checkpoints" / "step-00000002" / "mp_rank_00_model_states.pt", "r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    with pytest.raises(UserError, match="step-00000002"):
        export_run(run, tmp_path / "model", average=2)


@one_objective
def test_evaluate_records_its_result_for_the_card(run, tmp_path, tiny_valid_shards, capsys):
    from pipeline.cli.main import main

    model = export_run(run, tmp_path / "model", "last")
    words = ["evaluate", "--model", str(model), "--data", str(tiny_valid_shards), "--max-documents", "3"]
    assert main([*words, "--record", str(run)]) == 0
    (recorded,) = (run / RESULTS).glob("*.json")
    assert str(recorded) in capsys.readouterr().err
    fingerprint = json.loads(recorded.read_text())["data_fingerprint"]
    assert fingerprint in (export_run(run, model, "last") / "README.md").read_text()
    other = tmp_path / "other"
    other.mkdir()
    for wrong in (other, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="--record .* is no export of this run"):
            main([*words, "--record", str(wrong)])


@one_objective
def test_what_the_shards_left_out_by_comparison_is_on_the_card(run, tmp_path, tiny_corpus):
    corpus = next(tiny_corpus.rglob("*.gz"))
    documents = [line["content"] for line in map(json.loads, gzip.open(corpus, "rt"))]
    (tmp_path / "tests.jsonl").write_text(json.dumps({"content": documents[0][:400]}) + "\n")
    write_jsonl(tmp_path / "in.jsonl", documents[:6])
    folder = json.loads((run / "provenance.json").read_text())["shards"][0]["folder"]
    shard = ("shard", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "set", "--deduplicate")
    shard += ("--tokenizer", Path(folder) / "tokenizer", "--decontaminate", tmp_path / "tests.jsonl")
    data_prep(*shard)
    shards = ShardSet.open(tmp_path / "set")
    copy = shutil.copytree(run, tmp_path / "run")
    found = provenance([shards], [], "cpu")
    (copy / "provenance.json").write_text(json.dumps(found))
    card = (export_run(copy, tmp_path / "model", "last") / "README.md").read_text()
    left_out = shards.manifest["rejected"]["shares words with a test text"]
    assert left_out and f"  - {left_out} left out: shares words with a test text\n" in card
    digest = shards.manifest["settings"]["decontaminate"]["sha256"]
    assert f"  - checked against 1 test text (sha256 `{digest[:16]}`), 13 words in a row\n" in card


@one_objective
def test_a_run_without_provenance_or_validation_has_a_card_too(run, tmp_path):
    (run / "provenance.json").unlink()
    (run / "evaluations.jsonl").unlink()
    card = (export_run(run, tmp_path / "model", "last") / "README.md").read_text()
    meta = json.loads((run / "checkpoints" / "step-00000004" / "meta.json").read_text())
    assert "Nothing was measured in this run" in card and meta["shards"][0] in card
    assert "torch |" not in card


@one_objective
def test_a_base_model_is_named_only_where_its_id_is_known(run):
    from pipeline.checkpoints import store as checkpoints
    from pipeline.export.model_card import model_card

    meta = checkpoints.read_meta(run / "checkpoints" / "step-00000004")
    for path, base in (("facebook/opt-125m", "facebook/opt-125m"), ("/data/models/opt", None), ("./a", None)):
        meta.recipe["model"]["backbone"] = {"path": path}
        card = model_card(run, "step-00000004", meta, 1, "model")
        assert front_matter(card).get("base_model") == base
        assert f"| backbone began from | `{path}` |" in card
