"""Recipes, strategies and launch: refused early and clearly, or read exactly as written."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from deepspeed.utils.config import get_timers_config
from helpers.paths import REPOSITORY

from data_prep.common.errors import UserError
from pipeline.checkpoints.store import first_difference, require_same_model_recipe
from pipeline.config import deepspeed_config
from pipeline.config.deepspeed_config import complete_strategy, read_strategy, require_compatible, zero_stage
from pipeline.config.keys import expected
from pipeline.config.schema import BACKBONES, KEYS, VaeRecipe, load_recipe
from pipeline.parallel.ranks import Ranks, find_ranks

RECIPES = sorted((REPOSITORY / "pipeline" / "recipes").glob("*.yaml"))
CONFIGS = REPOSITORY / "ds_configs"
STRATEGIES = sorted(path for path in CONFIGS.glob("zero*.json") if path.stem != "zero3-nvme")
DEMO = REPOSITORY / "pipeline" / "recipes" / "demo-vae.yaml"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


SMALL = """
objective: vae
output_dir: runs/x
data: {shards: [a]}
model: {vae: {hidden_size: 32}}
training: {max_steps: 3}
"""


def test_every_published_size_has_a_recipe() -> None:
    wanted = {f"svae-{size}-h{layers}" for size in (768, 1024, 2048) for layers in (1, 2, 4)}
    wanted |= {f"sllm-{size}-h{layers}" for size in ("125m", "350m", "1.3b") for layers in (1, 2, 4)}
    assert wanted <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_what_their_names_say(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    parts = path.stem.replace("svae", "vae").split("-")
    objective = {"stack": "sllm", "anchors": "lm"}  # of the recipes named after a layout
    layout = recipe.model.layout
    assert recipe.objective in parts or (layout in parts and recipe.objective == objective[layout])
    assert recipe.data.shards and recipe.data.validation
    if "-h" in path.stem:
        assert Path(recipe.output_dir).name == path.stem
        vae = recipe.model.vae
        assert str(vae.get("layers") or vae["path"][-1]) == path.stem[-1]
    # What is written into the run directory says the same.
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_the_demos_models_get_the_same_budget() -> None:
    sllm, lm = (load_recipe(DEMO.with_name(f"demo-{kind}.yaml")) for kind in ("sllm", "lm"))
    assert sllm.training == lm.training and sllm.data == lm.data and sllm.optimizer == lm.optimizer


def test_overrides_win_and_get_the_keys_type(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    given = "--optimizer.lr 1e-4 --data.shards b c --training.max_tokens 1e6 --log.wandb=true"
    given += " --data.validation null --optimizer.betas 0.8 0.9 --schedule.final 0"
    recipe = load_recipe(path, given.split())
    assert recipe.optimizer.lr == 1e-4 and recipe.optimizer.betas == [0.8, 0.9]
    assert recipe.data.shards == ["b", "c"] and recipe.data.validation is None
    assert recipe.training.max_tokens == 1_000_000 and isinstance(recipe.training.max_tokens, int)
    assert recipe.log.wandb is True and recipe.schedule.final == 0.0


def test_a_path_replaces_the_sizes_of_a_model_part() -> None:
    sllm = DEMO.with_name("demo-sllm.yaml")
    recipe = load_recipe(sllm, ["--model.backbone.path", "models/opt"])
    assert recipe.model.backbone == {"path": "models/opt"}
    assert recipe.model.vae == {"path": "demo/models/vae"}, "its base gives sizes"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "--training.max_step 3",
            "unknown recipe key 'training.max_step': did you mean 'training.max_steps'?",
        ),
        ("--max_steps 3", "did you mean 'training.max_steps'?"),
        ("--model.vae.hiden_size 3", "did you mean 'model.vae.hidden_size'?"),
        ("--model.backbone.hidden 3", "did you mean 'model.backbone.hidden_size'?"),
        ("--modl.vae.layers 3", "did you mean 'model.vae.layers'?"),
        ("--training.max_steps", "needs a value"),
        (
            "--training.max_steps 1.5",
            "training.max_steps must be null or a whole number of at least 1, not 1.5",
        ),
        ("--training.max_steps 0", "training.max_steps must be null or a whole number of at least 1, not 0"),
        ("--training.max_steps null", "the run would never end"),
        ("--optimizer.lr fast", "optimizer.lr must be a number of at least 0, not 'fast'"),
        ("--log.wandb 3", "must be true or false"),
        ("--loss.kind mse", "loss.kind must be one of cross_entropy, focal"),
        ("--schedule.warmup 2", "schedule.warmup must be a number of at least 0 and at most 1, not 2"),
        ("--schedule.kind wsd --schedule.decay 0", "schedule.decay must be above 0"),
        ("--schedule.kind wsd --schedule.warmup 0.5 --schedule.decay 0.6", "leave room for warmup (0.5)"),
        ("--optimizer.parts {a:1}", "optimizer.parts"),
        ("--optimizer.parts={encoder:{lr_scale:0}}", "optimizer.parts"),
        ("--objective gan", "objective must be one of vae, sllm, lm"),
        ("--objective sllm", "objective sllm needs model.backbone"),
        ("--data.window_tokens 9000", "a window must fit into a bin"),
        ("--data.weights 0.7 0.3", "has 2 numbers for 1 shard set: give one for each"),
        (
            "--data.shards a b --data.weights 1 0",
            "data.weights must be null or a list, each a number above 0, not 0",
        ),
        ("--data.shards a b --data.weights 1 nan", "data.weights must be"),
        ("--model.vae.path x", "objective vae trains a SentenceVAE from sizes"),
        ("stray", "unexpected argument 'stray'"),
        ("--optimizer.lr -1", "optimizer.lr must be a number of at least 0, not -1"),
        ("--optimizer.lr .nan", "optimizer.lr must be a number of at least 0, not nan"),
        ("--seed 1e30", "seed must be below 2^63, not 1e30"),
        ("--training.max_steps 1e300", "training.max_steps must be below 2^63, not 1e300"),
        ("--optimizer.eps 0", "optimizer.eps must be a number above 0, not 0"),
        (
            "--model.backbone.model_type llama --model.backbone.rope_parameters '{rope_theta: .nan}'",
            "model.backbone.rope_parameters must be a mapping to finite numbers",
        ),
        ("--optimizer.lr true", "optimizer.lr must be a number of at least 0, not True"),
        ("--optimizer.clip .inf", "optimizer.clip must be a number of at least 0, not inf"),
        ("--optimizer.clip=-1", "optimizer.clip must be a number of at least 0, not -1"),
        (
            "--optimizer.betas 0.9",
            "optimizer.betas must be a list of 2, each a number of at least 0 and below 1",
        ),
        (
            "--optimizer.betas 0.9 1",
            "optimizer.betas must be a list of 2, each a number of at least 0 and below 1",
        ),
        ("--optimizer.parts.a 1", "unknown recipe key 'optimizer.parts.a'"),
        ("--optimizer.parts='{a: 1}'", "optimizer.parts.a must be a mapping, not 1"),
        (
            "--optimizer.parts='{a: {lr_scale: .nan}}'",
            "optimizer.parts.a must be {lr_scale: NUMBER above 0} or",
        ),
        ("--seed -1", "seed must be a whole number of at least 0, not -1"),
        ("--seed .nan", "seed must be a whole number of at least 0, not nan"),
        ("--seed .inf", "seed must be a whole number of at least 0, not inf"),
        ("--model.vae.dropout .nan", "model.vae.dropout must be a number of at least 0 and below 1, not nan"),
        ("--model.vae.layers 1.5", "model.vae.layers must be a whole number of at least 1, not 1.5"),
        ("--model.vae.fusion max", "model.vae.fusion must be one of sum, mean, attention, last, not 'max'"),
        ("--model.vae.vectors 2", "model.vae.vectors 2 needs model.vae.fusion attention, not sum"),
        ("--model.vae.free_bits 1", "need model.vae.variational true"),
        ("--training.ema 1", "training.ema must be null or a number above 0 and below 1, not 1"),
        ("--data.shards null", "data.shards must be a list, each text, not None"),
    ],
)
def test_wrong_overrides_are_refused(overrides: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe(write(tmp_path, SMALL), shlex.split(overrides))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective: [", "is not valid YAML"),
        ("just words", "is not a mapping"),
        (SMALL + "optimiser: {lr: 1}", "unknown recipe key 'optimiser': did you mean 'optimizer.lr'?"),
        (SMALL.replace("shards", "shard"), "did you mean 'data.shards'?"),
        (SMALL.replace("objective: vae", ""), "objective is missing"),
        (SMALL.replace("{hidden_size: 32}", "{path: x, layers: 2}"), "has a path and sizes (layers)"),
        (SMALL + "model: 3", "key 'model' is given twice, in lines 5 and 7"),
        (
            SMALL.replace("32}", "32, layers: 1, hidden_size: 48}"),
            "key 'hidden_size' is given twice, in lines 5",
        ),
        (SMALL + "loss: [{a: {b: 1,\n b: 2}}]", "key 'b' is given twice, in lines 7 and 8"),
        (SMALL + "optimizer:\n  {}: 1", "is not valid YAML"),
        (SMALL + "3: 1", "unknown recipe key '3'"),
        (SMALL + "loss: {3: 1}", "unknown recipe key 'loss.3'"),
        (SMALL + "loss: 3", "loss must be a mapping, not 3"),
        (SMALL.replace("{hidden_size: 32}", "3"), "model.vae must be a mapping, not 3"),
        (SMALL.replace("{hidden_size: 32}", "{hiden_size: null}"), "did you mean 'model.vae.hidden_size'?"),
        (SMALL.replace("training: {max_steps: 3}", ""), "the run would never end"),
        (SMALL.replace("runs/x", "' '"), "output_dir must be text, not ' '"),
        (SMALL.replace("runs/x", '"a\\0"'), "output_dir must be text, not 'a\\x00'"),
        (SMALL + "seed: " + "[" * 3000, "is nested too deeply"),
        (SMALL + "base: recipe.yaml", "leads back to itself"),
        (SMALL + "base: nowhere.yaml", "nowhere.yaml does not exist"),
    ],
)
def test_wrong_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe(write(tmp_path, text))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    model = "{vae: {hiden_size: 32, dropout: 2}, "
    model += "backbone: {model_type: llama, ffn_dim: 1, hidden_act: [], head_dim: 0}}"
    text = SMALL.replace("{vae: {hidden_size: 32}}", model).replace("objective: vae", "optimiser: {lr: 1}")
    overrides = "--max_steps 3 --data.window_tokens 9000 --loss.kind mse --seed -1 --log.profile x"
    with pytest.raises(UserError) as refused:
        load_recipe(write(tmp_path, text), overrides.split())
    for problem in (
        "unknown recipe key 'max_steps': did you mean 'training.max_steps'?",
        "unknown recipe key 'optimiser': did you mean 'optimizer.lr'?",
        "unknown recipe key 'model.vae.hiden_size': did you mean 'model.vae.hidden_size'?",
        "model.vae.dropout must be a number of at least 0 and below 1, not 2",
        "unknown recipe key 'model.backbone.ffn_dim': ",
        "model.backbone.hidden_act must be null or text, not []",
        "model.backbone.head_dim must be null or a whole number of at least 1, not 0",
        "a window must fit into a bin",
        "loss.kind must be one of cross_entropy, focal, not 'mse'",
        "seed must be a whole number of at least 0, not -1",
        "log.profile must be steps such as 10-12, not 'x'",
        "objective is missing",
    ):
        assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_model_parts_keep_the_keys_that_are_given_in_their_order(tmp_path: Path) -> None:
    given = "{layers: 2, hidden_size: 32.0, kl_weight: '1e-2', fusion: null, variational: true}"
    recipe = load_recipe(write(tmp_path, SMALL.replace("{hidden_size: 32}", given)))
    expected = {"layers": 2, "hidden_size": 32, "kl_weight": 0.01, "fusion": None, "variational": True}
    assert list(recipe.to_dict()["model"]["vae"].items()) == list(expected.items())
    assert type(recipe.model.vae["hidden_size"]) is int and recipe.model.backbone == {}
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert list(recipe.to_dict())[:4] == ["objective", "output_dir", "seed", "init_from"]


def test_numbers_that_old_checkpoints_kept_as_text_are_the_same_model(tmp_path: Path) -> None:
    variational = ["--model.vae.variational=true", "--model.vae.kl_weight=1e-2"]
    recipe = load_recipe(write(tmp_path, SMALL), variational).to_dict()
    old = copy.deepcopy(recipe)
    old["model"]["vae"]["kl_weight"] = "1e-2"
    meta = types.SimpleNamespace(recipe=old)
    require_same_model_recipe(meta, tmp_path, recipe)
    old["model"]["vae"]["kl_weight"] = "1e-3"
    with pytest.raises(UserError, match="is of another model"):
        require_same_model_recipe(meta, tmp_path, recipe)


def test_keys_that_an_older_release_did_not_have_are_no_difference_at_their_neutral_value() -> None:
    before, now = {"layout": "paper"}, {"layout": "paper", "published_inputs": False, "path": None}
    assert first_difference(before, now) is None
    assert first_difference(now, before) is None
    assert first_difference(before, now | {"published_inputs": True}) == (
        "published_inputs is None there and True here"
    )
    assert first_difference(before, now | {"slots": 1}) == "slots is None there and 1 here"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--data.sentence_ends=true", "data.sentence_ends is for objective lm: vae has sentence ends"),
        ("--model.vae.published_inputs=true", "published_inputs needs model.vae.layout paper"),
    ],
)
def test_controls_are_refused_where_they_mean_nothing(override: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe(write(tmp_path, SMALL), [override])


def test_a_merged_mapping_is_no_duplicate(tmp_path: Path) -> None:
    text = SMALL + "optimizer: {parts: {a: {freeze: &f true}, b: &b {freeze: *f}, c: {<<: *b, freeze: true}}}"
    assert load_recipe(write(tmp_path, text)).optimizer.parts["c"] == {"freeze": True}


NAMES = ("007", "1_000", "2026-01-31", "run #2", "a: b", "no", "1e3")


def test_text_stays_as_it_is_given(tmp_path: Path) -> None:
    """YAML 1.1 has numbers, dates, truths and comments in what people call a folder."""
    for name in NAMES:
        overrides = ["--output_dir", name, "--data.shards", name, "b c", f"--init_from={name}"]
        recipe = load_recipe(DEMO, overrides)
        assert (recipe.output_dir, recipe.init_from, recipe.data.shards) == (name, name, [name, "b c"])
    lists = load_recipe(DEMO, ["--data.shards", "[a, b]", "--data.validation", "null", "--init_from", ""])
    assert lists.data.shards == ["a", "b"] and lists.data.validation is lists.init_from is None
    for name in NAMES[:3]:
        assert load_recipe(write(tmp_path, f"base: {DEMO}\noutput_dir: {name}\n")).output_dir == name


def test_numbers_are_decimal(tmp_path: Path) -> None:
    file = write(tmp_path, f"base: {DEMO}\nseed: 010\noptimizer: {{lr: .5, eps: 1.e-8, clip: 1e1}}\n")
    recipe = load_recipe(file, ["--data.bins_per_step", "008"])
    assert (recipe.seed, recipe.optimizer.lr, recipe.optimizer.clip) == (10, 0.5, 10.0)
    assert recipe.optimizer.eps == 1e-8 and recipe.data.bins_per_step == 8
    for number in ("1:30", "0x10", "0o7", "1:30.5"):
        with pytest.raises(UserError, match=f"seed must be a whole number of at least 0, not '{number}'"):
            load_recipe(DEMO, ["--seed", number])


def test_a_model_config_has_the_keys_and_defaults_of_the_recipe() -> None:
    from pipeline.models.sentence_vae import SentenceVAEConfig

    config = SentenceVAEConfig()
    for key, field in VaeRecipe.model_fields.items():
        if key in ("path", "init_embeddings_from"):  # where weights come from: only in a recipe
            assert not hasattr(config, key)
        elif field.default is not None:
            assert getattr(config, key) == field.default, key
    assert (config.vocab_size, config.max_sentence_tokens, config.ffn_size) == (50272, 64, 1536)
    assert SentenceVAEConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(UserError, match="model.vae.layers must be"):
        SentenceVAEConfig(layers="two")


def test_every_key_has_a_meaning_and_a_valid_default() -> None:
    for key, field in KEYS.items():
        assert field.description and expected(field), key
    for kind in (VaeRecipe, *BACKBONES.values()):
        defaults = kind().model_dump()
        assert kind.model_validate(defaults).model_dump() == defaults


def test_an_unknown_key_is_refused_by_the_command_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, "pipeline/train.py", "--config", str(DEMO)]
    command += [
        "--deepspeed_config",
        str(REPOSITORY / "ds_configs" / "zero3.json"),
        "--training.max_step",
        "3",
    ]
    environment = dict(os.environ) | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "did you mean 'training.max_steps'?" in done.stderr


def test_help_has_an_example() -> None:
    done = subprocess.run(
        [sys.executable, "pipeline/train.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0 and "example:" in done.stdout and "--deepspeed_config" in done.stdout
    assert "--optimizer.lr (a number of at least 0; default 0.0001)" in done.stdout
    assert all(f"--{key} (" in done.stdout for key in KEYS)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_the_learning_rate_never_rises_after_the_warm_up(kind: str, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL), f"--schedule.kind {kind} --schedule.warmup 0.1".split())
    steps = 50
    factors = [recipe.schedule.factor((step + 1) / steps) for step in range(steps)]
    assert factors[0] > 0 and max(factors) == pytest.approx(1.0, abs=0.01)
    assert all(a < b for a, b in zip(factors[:4], factors[1:5], strict=True))
    assert all(a >= b for a, b in zip(factors[5:], factors[6:], strict=False))
    assert factors[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert factors[26] == pytest.approx(
        {"cosine": 0.55, "linear": 0.55, "wsd": 1.0, "constant": 1.0}[kind], abs=0.02
    )
    assert factors[44] == pytest.approx(
        {"cosine": 0.127, "linear": 0.2, "wsd": 0.55, "constant": 1.0}[kind], abs=0.01
    )


def test_progress_ends_at_whichever_limit_comes_first(tmp_path: Path) -> None:
    training = load_recipe(
        write(tmp_path, SMALL), "--training.max_steps 10 --training.max_tokens 100".split()
    ).training
    assert training.progress(0, 0) == 0
    assert training.progress(5, 20) == 0.5
    assert training.progress(5, 100) == 1
    assert training.progress(10, 20) == 1


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_strategies_are_completed_from_the_recipe(path: Path) -> None:
    recipe = load_recipe(DEMO, ["--data.bins_per_step", "5", "--optimizer.clip", "0.7"])
    config = complete_strategy(read_strategy(path), recipe, world=2, on_gpu=True)
    assert "//" not in config
    assert get_timers_config(config).enabled is False  # it would wait for a GPU in every micro-batch
    assert config["gradient_accumulation_steps"] == 3 and config["train_batch_size"] == 6
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"] == {"enabled": True}
    assert path.stem.startswith(f"zero{zero_stage(config)}")
    # ZeRO accumulates gradients in fp32 also when it computes in bf16; plain data parallel refuses to.
    expected = None if zero_stage(config) == 0 else {"grad_accum_dtype": "fp32"}
    assert config.get("data_types") == expected
    on_cpu = complete_strategy(read_strategy(path), recipe, world=2, on_gpu=False)
    assert "bf16" not in on_cpu and not any("quantized" in key for key in on_cpu["zero_optimization"])


def test_added_files_win_and_lead_into_the_run_directory() -> None:
    recipe = load_recipe(DEMO, ["--output_dir", "runs/here"])
    files = [CONFIGS / f"{name}.json" for name in ("zero2", "fp16", "flops-profiler", "comms-logger")]
    strategy = read_strategy(*files)
    assert strategy["zero_optimization"] == read_strategy(files[0])["zero_optimization"]
    config = complete_strategy(strategy, recipe, world=2, on_gpu=True)
    assert config["fp16"]["enabled"] and not config["bf16"]["enabled"]
    assert config["flops_profiler"]["output_file"] == "runs/here/flops-profile.txt"
    assert "fp16" not in complete_strategy(strategy, recipe, world=2, on_gpu=False)


def test_every_file_says_what_it_is_for_and_where_it_ran() -> None:
    table = (CONFIGS / "README.md").read_text()
    for path in CONFIGS.glob("*.json"):
        header = " ".join(json.loads(path.read_text())["//"])
        assert "CPU" in header and "not yet tested" in header.lower(), path
        assert f"`{path.name}`" in table


def test_nvme_is_refused_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    recipe, strategy = load_recipe(DEMO, []), read_strategy(CONFIGS / "zero3-nvme.json")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)
    with pytest.raises(UserError, match="offloads to an NVMe disk, and .* install libaio"):
        complete_strategy(strategy, recipe, world=2, on_gpu=True)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: True)
    config = complete_strategy(strategy, recipe, world=2, on_gpu=True)
    assert config["zero_optimization"]["offload_param"]["nvme_path"] == "/local_nvme"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ('{"train_batch_size": 8}', "sets train_batch_size: remove it"),
        ('{"optimizer": {}}', "sets optimizer: remove it"),
        ('{"wandb": {"enabled": true}}', "sets wandb: remove it, the recipe's log.wandb decides"),
        ('{"data_types": {"grad_accum_dtype": "fp32"}}', "stage 0 knows no data_types"),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}',
            "offload_optimizer.ratio 0.5 splits the update between two optimizers",
        ),
        (
            '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}, "fp16": {"enabled": true}}',
            "bf16 and fp16 are both enabled",
        ),
        (
            '{"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}',
            "stage 0 offloads nothing by offload_optimizer (use stage 1 or more",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            "stage 2 offloads nothing by offload_param (use stage 3 or more",
        ),
        ('{"a": ' * 3000 + "1" + "}" * 3000, "cannot be read as JSON"),
    ],
)
def test_wrong_strategies_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_strategy(write(tmp_path, text, "ds.json"))
    with pytest.raises(UserError, match="does not exist"):
        read_strategy(tmp_path / "none.json")


def test_pairs_that_train_wrongly_without_an_error_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, compiled = (load_recipe(DEMO, ["--training.compile", value]) for value in ("false", "true"))
    strategies = {
        name: read_strategy(CONFIGS / f"{name}.json") for name in ("zero0", "zero1", "zero2", "zero3")
    }
    half = {
        name: read_strategy(CONFIGS / f"{name}.json", CONFIGS / "fp16.json")
        for name in ("zero0", "zero1", "zero3")
    }
    require_compatible(half["zero1"], plain)
    require_compatible(half["zero3"], plain)
    with pytest.raises(UserError, match="fp16 with stage 0 trains with wrong gradients"):
        require_compatible(half["zero0"], plain)
    for torch, lost in (("2.6.0", True), ("2.11.0+cu130", True), ("2.13.0+cpu", False), ("3.0.1", False)):
        monkeypatch.setattr(deepspeed_config, "version", lambda name, torch=torch: torch)
        for name in ("zero0", "zero1", "zero2"):
            require_compatible(strategies[name], compiled)
        require_compatible(strategies["zero3"], plain)
        if lost:
            with pytest.raises(UserError, match=rf"loses gradients under torch {re.escape(torch)}"):
                require_compatible(strategies["zero3"], compiled)
        else:
            require_compatible(strategies["zero3"], compiled)


SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
}


def test_ranks_come_from_whichever_launcher_there_is() -> None:
    assert find_ranks({}) == Ranks(0, 1, 0)
    env = dict(SLURM)
    assert find_ranks(env) == Ranks(3, 4, 1)
    assert env["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(env["MASTER_PORT"]) < 32000
    other = SLURM | {"SLURM_PROCID": "0"}
    find_ranks(other)
    assert other["MASTER_PORT"] == env["MASTER_PORT"], "ranks of one step meet at one port"
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert find_ranks(mpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}) == Ranks(1, 2, 1)


def test_what_a_launcher_has_set_stays() -> None:
    env = SLURM | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n7", "MASTER_PORT": "9"}
    assert find_ranks(env) == Ranks(0, 2, 0)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("n7", "9")


def test_a_batch_script_is_no_rank() -> None:
    script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert find_ranks(script) == Ranks(0, 1, 0)


def test_several_machines_need_an_address() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        find_ranks(mpi)


def test_steps_to_profile(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    assert load_recipe(path, ["--log.profile", "10-12"]).log.profile_steps() == (10, 12)
    assert load_recipe(path, ["--log.profile", "7"]).log.profile_steps() == (7, 7)
    for wrong in ("12-10", "0-3", "a-b", "3-", "-3", "1-2-3"):
        with pytest.raises(UserError, match="log.profile must be steps such as 10-12"):
            load_recipe(path, [f"--log.profile={wrong}"])


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("label_smoothing", "1", "must be a number of at least 0 and below 1, not 1"),
        ("label_smoothing", "-0.1", "must be a number of at least 0 and below 1, not -0.1"),
        ("z_loss", "-1", "must be a number of at least 0, not -1"),
        ("z_loss", ".nan", "must be a number of at least 0, not nan"),
        ("focal_gamma", "0.5", "must be a number of at least 1, not 0.5"),
        ("embedding_weight", "-1", "must be a number of at least 0, not -1"),
        ("embedding_weight", "1", "is for objective sllm, not vae"),
    ],
)
def test_wrong_losses_are_refused(key, value, says, tmp_path):
    recipe = write(tmp_path, SMALL)
    with pytest.raises(UserError, match=f"loss.{key} {says}"):
        load_recipe(recipe, [f"--loss.{key}={value}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.vae.layers", "1"], "model.layout stack has no SentenceVAE"),
        (["--objective", "lm"], "model.layout stack is for objective sllm, not lm"),
        (
            ["--model.layout", "vae"],
            "model.tokens, memory, add_vector and ends are for model.layout stack",
        ),
        (["--model.layout", "lean"], "model.layout must be one of vae, stack"),
        (["--model.memory", "-1"], "model.memory must be a whole number of at least 0"),
        (["--model.tokens.window", "9"], "did you mean 'model.tokens.attention_window'"),
        (["--model.tokens.hidden_size", "100"], "no multiple of twice model.tokens.heads"),
        (
            ["--loss.embedding_weight", "1"],
            "loss.embedding_weight is for objective sllm, not model.layout stack",
        ),
    ],
)
def test_a_stack_refuses_what_it_does_not_have(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(RECIPES[0].with_name("memory-stack.yaml"), overrides)
