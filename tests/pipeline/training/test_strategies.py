"""Training with real ranks: strategies, world sizes and options of a recipe agree."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from helpers import ranks, run_checks
from helpers.runs import STRATEGIES, arguments, losses, records

from pipeline.config.schema import load_recipe


@pytest.mark.parametrize(
    ("objective", "strategy", "world"),
    [
        *[("vae", f"zero{stage}", 2) for stage in range(4)],
        *[("sllm", f"zero{stage}", 2) for stage in range(4)],
        ("sllm", "zero3", 1),
        ("sllm", "zero2-offload", 2),
        ("sllm", "zero3-offload", 2),
        ("sllm", "zero3-plusplus", 2),
        ("sllm", "zero3 fp16", 2),
        ("lm", "zero1", 2),
        ("lm", "zero3", 2),
    ],
)
def test_every_strategy_and_world_size_trains_alike(
    objective: str,
    strategy: str,
    world: int,
    pool: ranks.RankPool,
    recipes: Path,
    reference: dict[str, Path],
    tmp_path: Path,
) -> None:
    statuses = pool.run(world, ranks.train, arguments(recipes, objective, strategy, tmp_path))
    assert statuses == [0] * world
    assert all(r["skips"] == 0 and "skipped" not in r and "kl" not in r for r in records(tmp_path))
    assert losses(tmp_path) == pytest.approx(losses(reference[objective]), abs=1e-4)
    for name, tolerance in (
        ("bits_per_byte", 1e-4),
        ("grad_norm", 1e-3),
        ("tokens", 0),
        ("bytes", 0),
        ("operations", 0),
        ("lr", 0),
    ):
        ours, theirs = ([r[name] for r in records(run)] for run in (tmp_path, reference[objective]))
        assert ours == pytest.approx(theirs, abs=tolerance), name
    measured, expected = (records(run, "evaluations") for run in (tmp_path, reference[objective]))
    assert [r["step"] for r in measured] == [4, 6]
    assert measured[-1]["bits_per_byte"] == pytest.approx(expected[-1]["bits_per_byte"], abs=1e-4)


def test_chosen_ranks_trace_the_chosen_steps(
    pool: ranks.RankPool, recipes: Path, reference: dict[str, Path], tmp_path: Path
) -> None:
    settings = arguments(recipes, "sllm", "zero3", tmp_path, "--log.profile", "2-3", "--log.profile_ranks", 1)
    assert pool.run(2, ranks.train, settings) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(reference["sllm"]), abs=1e-4)
    [path] = (tmp_path / "profile").iterdir()
    assert path.name == "rank-1.steps-2-3.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {name for name in names if str(name).startswith("step ")} == {"step 2", "step 3"}
    assert {"aten::embedding", "aten::addmm", "aten::layer_norm"} <= names
    assert not (reference["sllm"] / "profile").exists()


def test_a_trace_that_cannot_be_written_ends_all_ranks_with_one_line(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "vae", "zero1", tmp_path, "--log.profile", "2-3", "--log.profile_ranks", 1)
    (tmp_path / "profile").touch()
    message, status = pool.run(2, ranks.train, settings)
    assert status == 2 and "\n" not in message
    assert message.startswith("after step 3: rank 1 cannot write its log or trace: ")
    assert "/profile: File exists; checkpoints are whole" in message


def test_a_run_continues_when_no_process_reads_its_output(
    pool: ranks.RankPool, recipes: Path, reference: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank-7.txt").touch()  # of a start with more ranks
    assert pool.run(1, ranks.train_without_reader, arguments(recipes, "vae", "zero0", tmp_path)) == [0]
    assert losses(tmp_path) == losses(reference["vae"])
    assert not (tmp_path / "stacks").exists() and (tmp_path / "stacks-before" / "rank-7.txt").exists()


def test_the_rate_of_a_step_is_that_of_its_end(reference: dict[str, Path]) -> None:
    """By the tokens and steps that are done when it is applied: no step has a rate of 0."""
    for run in reference.values():
        recipe = load_recipe(run / "recipe.yaml")
        rates = [
            recipe.optimizer.lr * recipe.schedule.factor(recipe.training.progress(one["step"], one["tokens"]))
            for one in records(run)
        ]
        assert [one["lr"] for one in records(run)] == pytest.approx(rates, rel=1e-12)
        assert all(rate > 0 for rate in rates) and len(set(rates)) > 3


@pytest.mark.parametrize("strategy", ["zero0", "zero3"])
def test_deepspeeds_profilers_write_into_the_run_directory(
    strategy: str, pool: ranks.RankPool, recipes: Path, reference: dict[str, Path], tmp_path: Path
) -> None:
    with_both = f"{strategy} flops-profiler comms-logger"
    answers = pool.run(2, ranks.train_and_listen, arguments(recipes, "sllm", with_both, tmp_path))
    assert [status for status, _ in answers] == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(reference["sllm"]), abs=1e-4)
    ours = (f"{tmp_path}: ", "step ", "the run ends after ", "a step takes about ")
    for _, said in answers:
        assert all(line.startswith(ours) for line in said.splitlines()), said
    profile = (tmp_path / "flops-profile.txt").read_text()
    assert "Profile Summary at step 4" in profile and "SentenceEncoder" in profile
    summary = json.loads((tmp_path / "comms.json").read_text())
    gathers = [name for name in summary if "gather" in name and "object" not in name]
    assert bool(gathers) == (strategy == "zero3")
    reductions = summary["all_reduce"]
    assert sum(size["count"] for size in reductions.values()) >= 6  # figures of six steps at the least


@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"])
def test_bf16_trains_nearly_alike(
    strategy: str, pool: ranks.RankPool, recipes: Path, reference: dict[str, Path], tmp_path: Path
) -> None:
    # As on GPUs; CPUs are spared bf16 because it is slow there, not because it would not work.
    settings = arguments(recipes, "sllm", strategy, tmp_path)
    assert pool.run(2, ranks.train_as_on_gpus, settings) == [0, 0]
    assert json.loads((tmp_path / "ds_config.json").read_text())["bf16"] == {"enabled": True}
    found, expected = losses(tmp_path), losses(reference["sllm"])
    assert found == pytest.approx(expected, abs=0.05) and found != pytest.approx(expected, abs=1e-6)
    # Later steps start from other weights.
    assert records(tmp_path)[0]["grad_norm"] == pytest.approx(
        records(reference["sllm"])[0]["grad_norm"], rel=0.02
    )


@pytest.mark.parametrize(("objective", "stage", "world"), [("sllm", 3, 2), ("sllm", 0, 1), ("lm", 2, 1)])
def test_compiled_layers_train_alike(
    objective: str,
    stage: int,
    world: int,
    pool: ranks.RankPool,
    recipes: Path,
    reference: dict[str, Path],
    tmp_path: Path,
) -> None:
    strategy = json.loads((STRATEGIES / f"zero{stage}.json").read_text())
    # Partition every weight: by default small ones stay whole, and here all are small.
    strategy["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "strategy.json").write_text(json.dumps(strategy))
    run = tmp_path / "run"
    settings = arguments(recipes, objective, f"zero{stage}", run, "--training.compile", "true")
    settings[settings.index("--deepspeed_config") + 1] = str(tmp_path / "strategy.json")
    # Not torch's own backend, which needs a C++ compiler: the graphs are the same, run by torch's kernels.
    for status, graphs, reasons in pool.run(world, ranks.train_compiled, settings, "aot_eager"):
        assert status == 0 and graphs >= 4
        assert len(reasons) == 1 and "disable" in reasons[0], "attention, and nothing else, cuts the graphs"
    assert losses(run) == pytest.approx(losses(reference[objective]), abs=1e-4)


PARTS = {
    "vae.encoder": {"freeze": True},
    "backbone.decoder.layers.0-0": {"freeze": True},
    "backbone": {"lr_scale": 0.5},
    "vae.decoder.final_norm": {"lr_scale": 2},
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_parts_stay_and_others_have_their_rates(
    stage: int, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    strategy = partition_everything(stage, tmp_path)
    runs = {}
    for name, world, parts in (("one", 1, PARTS), ("two", 2, PARTS), ("free", 1, {})):
        if world == 1 and stage:
            continue  # compared with stage 0 below
        run = tmp_path / name
        settings = arguments(recipes, "sllm", "zero0", run, "--optimizer.parts", json.dumps(parts))
        settings[settings.index("--deepspeed_config") + 1] = strategy
        assert pool.run(world, ranks.train, settings) == [0] * world
        [runs[name]] = pool.run(1, run_checks.export_and_compare, str(run), str(tmp_path / f"{name}-model"))
    for name, moved in runs["two"].items():
        frozen = name.startswith(("vae.encoder.", "backbone.decoder.layers.0."))
        assert (moved == 0) == frozen or "attention.qkv" in name, (name, moved)
    if stage == 0:
        assert runs["two"] == pytest.approx(runs["one"], abs=1e-4)
        # AdamW's first steps are as long as the rate: so the sizes of the moves show it.
        moves = {name: runs["two"][name] / runs["free"][name] for name in runs["two"] if runs["free"][name]}
        assert moves["backbone.decoder.layers.1.fc1.weight"] == pytest.approx(0.5, abs=0.15)
        assert moves["vae.decoder.final_norm.weight"] == pytest.approx(2, abs=0.6)
        assert moves["vae.decoder.layers.0.ffn_in.weight"] == pytest.approx(1, abs=0.2)


def test_parts_that_the_model_has_not_are_refused(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    for parts, words in (
        ({"vae.encodr": {"freeze": True}}, "vae.encodr is no part of this model: did you mean vae.encoder?"),
        ({"backbone.decoder.layers.7-9": {"freeze": True}}, "is no part of this model"),
        (
            {
                "vae": {"freeze": True},
                "backbone": {"freeze": True},
                "start": {"freeze": True},
                "stop_head": {"freeze": True},
            },
            "freezes every parameter",
        ),
    ):
        settings = arguments(recipes, "sllm", "zero0", tmp_path, "--optimizer.parts", json.dumps(parts))
        [answer] = pool.run(1, ranks.train, settings)
        assert words in answer and "\n" not in answer
    tied = ("--model.vae.tie_word_embeddings", "true", "--optimizer.parts", '{"head": {"freeze": true}}')
    [answer] = pool.run(1, ranks.train, arguments(recipes, "vae", "zero0", tmp_path, *tied))
    assert "one tied matrix" in answer


def partition_everything(stage: int, folder: Path) -> str:
    """A strategy that partitions every weight: by default small ones stay whole, and here all are small."""
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    (folder / "strategy.json").write_text(json.dumps({"zero_optimization": zero}))
    return str(folder / "strategy.json")


@pytest.mark.parametrize(("objective", "stage", "world"), [("sllm", 0, 1), ("sllm", 3, 2), ("lm", 3, 1)])
def test_activation_checkpointing_changes_no_loss(
    objective: str, stage: int, world: int, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    strategy = partition_everything(stage, tmp_path)
    for name in ("false", "true"):
        settings = arguments(recipes, objective, "zero0", tmp_path / name)
        settings += ["--training.activation_checkpointing", name]
        settings += [] if objective == "lm" else ["--model.vae.dropout", "0.1"]
        settings[settings.index("--deepspeed_config") + 1] = strategy
        assert pool.run(world, ranks.train, settings) == [0] * world
    assert losses(tmp_path / "true") == losses(tmp_path / "false")


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (2, 2), (3, 2)])
def test_the_average_of_the_weights_is_exported(
    stage: int, world: int, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "vae", "zero0", tmp_path / "run", "--model.vae.tie_word_embeddings", "true")
    settings += ["--training.ema", "0.75", "--training.save_every", "1", "--training.keep", "10"]
    settings[settings.index("--deepspeed_config") + 1] = partition_everything(stage, tmp_path)
    for steps in ("3", "6"):  # the average continues after a restart
        assert pool.run(world, ranks.train, [*settings, "--training.max_steps", steps]) == [0] * world
    run, model = str(tmp_path / "run"), str(tmp_path / "model")
    [(from_average, from_last)] = pool.run(1, run_checks.export_average, run, model, 0.75)
    assert from_average < 1e-6 < 1e-3 < from_last


def test_activation_checkpointing_keeps_less_for_the_backward_pass(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    for objective in ("sllm", "lm"):
        recipe = arguments(recipes, objective, "zero0", tmp_path)[1]
        [(plain, checkpointed)] = pool.run(1, run_checks.bytes_kept_for_backward, recipe)
        assert checkpointed < 0.75 * plain, objective


def test_compiling_without_a_compiler_is_refused(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = arguments(recipes, "vae", "zero0", tmp_path, "--training.compile", "true")
    (answer,) = pool.run(1, ranks.train_without_programs, settings)
    assert "training.compile needs a C++ compiler" in answer


@pytest.mark.parametrize(
    ("objective", "strategy", "options"),
    [
        ("vae", "zero3", "fusion=attention variational=true kl_weight=0.01 dropout=0.1"),
        ("vae", "zero2", "layout=paper latent_noise=0.1 tie_word_embeddings=true"),
        # An SLLM around a variational SentenceVAE: the layer of its log-variances is never called.
        ("sllm", "zero3", "layout=paper fusion=attention variational=true dropout=0.1"),
        ("sllm", "zero1", "fusion=mean variational=true"),
    ],
)
def test_every_option_of_the_sentence_vae_trains_alike_on_two_ranks(
    objective: str, strategy: str, options: str, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    extra = [f"--model.vae.{option}" for option in options.split()]
    extra += ["--loss.label_smoothing=0.1", "--loss.z_loss=0.001", "--training.max_steps=9"]
    alone = arguments(recipes, objective, "zero0", tmp_path / "one", *extra)
    assert pool.run(1, ranks.train, alone) == [0]
    assert pool.run(2, ranks.train, arguments(recipes, objective, strategy, tmp_path / "two", *extra)) == [
        0,
        0,
    ]
    learned = losses(tmp_path / "one")
    assert learned[-1] < learned[0] - 0.2, "the run learns nothing: comparing losses would say nothing"
    assert losses(tmp_path / "two") == pytest.approx(learned, abs=2e-4)
    for name in ("metrics", "evaluations"):
        one, two = ([r.get("kl") for r in records(tmp_path / run, name)] for run in ("one", "two"))
        if objective == "vae" and "variational" in options:
            assert min(one) > 1 and two == pytest.approx(one, rel=1e-3)
        else:
            assert set(one + two) == {None}
