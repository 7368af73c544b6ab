"""`sllm sweep`: real trainings and evaluations, rows that equal the run directories, nothing done
twice, a stopped sweep that resumes, mistakes in one line."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from helpers.paths import REPOSITORY
from helpers.runs import records

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.checkpoints import store as checkpoints
from pipeline.cli import main as cli
from pipeline.evaluation.evaluate import evaluate
from pipeline.export.model_folder import export_run
from pipeline.models.factory import new_model
from pipeline.research.scaling import read_points
from pipeline.research.sweep import Workers, format_sweep, run
from pipeline.research.sweep_jobs import Job, operations_per_token, read_sweep, with_budgets
from pipeline.training.optimizer import parameter_groups

pytestmark = pytest.mark.launch

GOLDEN = REPOSITORY / "tests/data/golden/artifacts/shards/clause-valid"


def write(folder: Path, **sweep: object) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def swept(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int, dict]:
    """(sweep file, its folder, status, result): a SentenceVAE, an SLLM that starts from it, a run that
    cannot begin."""
    folder = tmp_path_factory.mktemp("sweep")
    path = write(
        folder,
        about="three runs",
        recipe=os.path.relpath(recipes / "sllm.yaml", folder),
        seeds=[3],
        overrides={"training.max_steps": 4, "optimizer.betas": [0.9, 0.99]},
        runs={
            "from-vae": {"after": "vae", "optimizer.lr": 1e-3},
            "vae": {"recipe": str(recipes / "vae.yaml"), "training.max_steps": 3},
            "lost": {"data.shards": str(folder / "nowhere")},
        },
    )
    command = ["sweep", str(path), "--output", str(folder / "out"), "--workers", "2"]
    status = cli.main([*command, "--training.eval_bins", "2"])
    return path, folder / "out", status, json.loads((folder / "out" / "results.json").read_text())


def test_rows_say_what_the_runs_say(swept: tuple[Path, Path, int, dict], tmp_path: Path) -> None:
    path, out, status, result = swept
    assert status == 1
    assert "nowhere" in result["failed"].pop("lost-s3") and result["failed"] == {} == dict(result["missing"])
    assert result["text"] == path.read_text() and result["overrides"] == ["--training.eval_bins", "2"]
    sllm, vae = result["rows"]
    assert (sllm["name"], sllm["seed"], sllm["after"]) == ("from-vae", 3, "vae-s3")
    assert sllm["overrides"] == {"optimizer.lr": 1e-3}
    for row, steps in ((sllm, 4), (vae, 3)):
        run_dir = out / f"{row['name']}-s3"
        steps_done, recipe = records(run_dir), yaml.safe_load((run_dir / "recipe.yaml").read_text())
        assert len(steps_done) == steps and row["checkpoint"] == f"step-{steps:08d}"
        assert recipe == row["recipe"] and recipe["seed"] == 3 and recipe["training"]["eval_bins"] == 2
        assert row["tokens"] == steps_done[-1]["tokens"]
        for cost in ("seconds", "operations"):
            assert row[cost] == pytest.approx(sum(one[cost] for one in steps_done))
        # The last checkpoint's figures, as the commands give them by themselves.
        figures = evaluate(
            export_run(run_dir, tmp_path / row["name"], "last"), data=recipe["data"]["validation"]
        )
        for key in ("bits_per_byte", "bits_per_byte_interval", "ppl", "parameters", "window_tokens"):
            assert row[key] == pytest.approx(figures[key]), key
        assert "by_sentence_position" not in row["evaluation"]
        assert row["evaluation"]["nll_nats"] == pytest.approx(figures["nll_nats"])
    assert sllm["recipe"]["model"]["vae"] == {"path": str(out / "models" / "vae-s3")}
    for cost in ("tokens", "seconds", "operations"):
        assert sllm[f"{cost}_with_vae"] == pytest.approx(sllm[cost] + vae[cost])
        assert f"{cost}_with_vae" not in vae
    short = {n: at for n, at in vae["evaluation"]["exact_match_by_length"].items() if int(n) <= 8}
    count = sum(at["sentences"] for at in short.values())
    exact = sum(round(at["sentences"] * at["exact_match"]) for at in short.values())
    assert vae["exact_match_to_8"] == pytest.approx(exact / count)
    assert sllm["vector_gain"] is not None and vae["vector_gain"] is None
    # 32 wide, 512 tokens: by hand, without what embeds tokens and positions.
    tensors = export_sizes(tmp_path / "vae")
    outside = sum(size for name, size in tensors.items() if "embedding" in name or name.startswith("head"))
    assert 0 < vae["body_parameters"] == sum(tensors.values()) - outside
    assert sllm["body_parameters"] < sllm["parameters"] - 512 * 32
    for x in ("parameters", "body_parameters"):  # also without the sweep's row
        assert [point.x for point in read_points([out / "from-vae-s3"], x)] == [sllm[x]]


def export_sizes(model: Path) -> dict[str, int]:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118


def test_what_is_done_is_not_repeated(
    swept: tuple[Path, Path, int, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, _, before = swept
    stamps = {file: file.stat().st_mtime_ns for file in (*out.glob("*-s3/**/*"), *out.glob("rows/*"))}
    again = ["sweep", str(path), "--output", str(out), "--training.eval_bins", "2", "--only", "from-vae"]
    capsys.readouterr()
    assert cli.main([*again, "--json"]) == 0  # the run that cannot begin was not asked for
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == before["rows"] and result["missing"] == ["lost-s3"] and not result["failed"]
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}
    assert cli.main(again) == 0
    *tables, missing = capsys.readouterr().out.rstrip().split("\n\n")
    runs, predicting, sentence_level, rebuilding = (table.splitlines() for table in tables)
    assert max(len(line) for line in (*runs, *predicting, *sentence_level, *rebuilding)) <= 100
    # A reconstruction is in no column of predictions.
    assert len(runs) == 3 and runs[2].split()[1:3] == ["3", "vae"] and runs[2].endswith("–")
    assert "bits/byte" in runs[0] and not runs[1].endswith("–")
    assert len(predicting) == len(sentence_level) == len(rebuilding) == 2
    assert "Kneser–Ney" in predicting[0] and "shuffle gain" in sentence_level[0]
    assert rebuilding[1].endswith(f"{result['rows'][1]['exact_match']:.2%}")
    assert missing == "not done: lost-s3"


def test_a_lost_row_is_measured_again_and_another_recipe_is_refused(
    swept: tuple[Path, Path, int, dict], tmp_path: Path
) -> None:
    path, out, _, before = swept
    ours = tmp_path / "out"
    shutil.copytree(out, ours)  # elsewhere: nothing of a row or a run depends on where the sweep lies
    (ours / "rows" / "vae-s3.json").unlink()
    steps = records(ours / "vae-s3")
    result = run(path, ours, only=["vae-s3"], overrides=["--training.eval_bins", "2"])  # this seed alone
    [vae] = [row for row in result["rows"] if row["name"] == "vae"]
    assert records(ours / "vae-s3") == steps and vae["bits_per_byte"] == before["rows"][1]["bits_per_byte"]

    with pytest.raises(UserError, match=r"vae-s3 is of another sweep \(optimizer.lr is 0.005 there and 0.01"):
        run(path, ours, only=["vae"], overrides=["--training.eval_bins", "2", "--optimizer.lr", "0.01"])
    shutil.rmtree(ours / "vae-s3")
    with pytest.raises(
        UserError, match="from-vae-s3 is of another sweep .it started from another run of vae"
    ):
        run(path, ours, only=["from-vae"], overrides=["--training.eval_bins", "2"])


def test_a_second_ctrl_c_ends_trainings_that_are_still_saving(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"
    deaf += "; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    workers = Workers(1, -1)
    workers._processes["long"] = process
    # A shell starts what runs in the background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            workers._stop()
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.wait(timeout=5) == -signal.SIGKILL


def test_a_stopped_sweep_saves_and_goes_on(recipes: Path, tmp_path: Path) -> None:
    path = write(tmp_path, recipe=str(recipes / "lm.yaml"), runs={"long": None})
    out, long = tmp_path / "out", ["--training.max_steps", "2000", "--training.save_every", "2000"]
    long += ["--training.eval_every", "2000"]
    command = [sys.executable, "-m", "pipeline.cli", "sweep", str(path), "--output", str(out), *long]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    metrics = out / "long-s1" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None
        time.sleep(0.05)
    with pytest.raises(UserError, match="is in use by a sweep"):
        run(path, out, overrides=long)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130, process.stderr.read()
    step = checkpoints.newest_whole(out / "long-s1")[1].step
    assert 3 <= step < 2000 and step == records(out / "long-s1")[-1]["step"]
    # The folder is free again: refused is what would change the run, not that another sweep holds it.
    with pytest.raises(UserError, match="training.max_steps is 2000 there"):
        run(path, out, overrides=[*long[:1], "5", *long[2:]])


@pytest.fixture(scope="module")
def gridded(
    tiny_shards: Path, tiny_valid_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict]:
    """A grid of two attention windows with one budget, and the loss by context length."""
    folder = tmp_path_factory.mktemp("grid")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "model_type": "mistral"}
    data = {"shards": [str(tiny_shards)], "validation": str(tiny_valid_shards), "window_tokens": 256}
    windows = {f"w{size}": {"model.backbone.sliding_window": size} for size in (8, 512)}
    path = write(
        folder,
        recipe="default-lm",
        overrides={
            **{f"model.backbone.{key}": value for key, value in sizes.items()},
            **{f"data.{key}": value for key, value in data.items()},
            **{"training.eval_bins": 1, "log.tensorboard": False, "data.sentence_ends": True},
        },
        context_curve=[4, 16],
        fresh=True,
        held_out=str(tiny_shards),
        grid={"window": windows, "budget": {"small": {"operations": "1.5e9"}}},
    )
    return path, folder / "out", run(path, folder / "out", only=["w8-small"])


@pytest.mark.long
def test_a_cell_of_a_grid_spends_its_budget_and_is_measured_by_context_length(gridded: tuple) -> None:
    path, out, result = gridded
    [row] = result["rows"]
    assert result["missing"] == ["w512-small-s1"] and row["cell"] == {"window": "w8", "budget": "small"}
    # A run ends with the step that reaches its tokens.
    most = row["recipe"]["data"]["bin_tokens"] / row["tokens"]
    assert 1 <= row["needed_operations"] / 1.5e9 < 1 + most
    lost = row["context_curve"]["contexts"]
    assert lost["16"]["lost"] == 0 and lost["4"]["lost"] != 0 and row["vector_gain"] is None
    held = row["held_out"]
    nats, sizes = (sum(held["by_document"][key]) for key in ("nats", "bytes"))
    assert held["bits_per_byte"] == pytest.approx(nats / sizes / math.log(2), rel=1e-5)
    again = evaluate(out / "models" / "w8-small-s1", data=held["data"])
    assert held["bits_per_byte"] == pytest.approx(again["bits_per_byte"], rel=1e-5) != row["bits_per_byte"]
    assert row["budget"] == 1.5e9 and row["new_token"]["multiply_adds"] > 0
    assert row["ngram_bits_per_byte"] > 0 and row["ngram_trained_tokens"] >= row["tokens"]
    text = format_sweep(result)
    assert "lost at 4" in text and "Kneser–Ney" in text
    assert (out / "context.svg").read_text().startswith("<svg")
    jobs = read_sweep(path, out)
    short, full = (j.recipe.training.max_tokens for j in with_budgets(jobs, {job.key for job in jobs}))
    assert short == row["recipe"]["training"]["max_tokens"] > 1.02 * full, "a short window buys tokens"


def test_a_budget_counts_the_sentence_vae_and_fresh_text_is_enough(recipes: Path, tmp_path: Path) -> None:
    runs = {
        "vae": {"recipe": str(recipes / "vae.yaml"), "training.max_tokens": 3000},
        "sllm": {"after": "vae", "operations": 2e9},
    }

    def made() -> list[Job]:
        path = write(tmp_path, recipe=str(recipes / "sllm.yaml"), runs=runs, fresh=True)
        return with_budgets(read_sweep(path, tmp_path / "out"), {"vae-s1", "sllm-s1"})

    vae, sllm = made()
    spent = 3000 * operations_per_token(vae.recipe)
    each = operations_per_token(sllm.recipe, vae.recipe.model.vae)
    assert sllm.recipe.training.max_tokens == int((2e9 - spent) / each) and sllm.after is vae
    runs["sllm"]["operations"] = 1e6
    with pytest.raises(UserError, match="sllm-s1: nothing of 1e.06 operations is left"):
        made()
    runs["sllm"]["operations"] = 1e13
    with pytest.raises(UserError, match="hold [0-9,]+ tokens of the [0-9,]+ that it trains on, and `fresh`"):
        made()
    # A run that is not asked for may lack its shards.
    path = write(
        tmp_path, recipe=str(recipes / "sllm.yaml"), runs={"a": {"data.shards": "no", "operations": 1}}
    )
    assert with_budgets(read_sweep(path, tmp_path / "out"), set())[0].operations == 1


@pytest.mark.parametrize(
    ("held_out", "message"),
    [("nowhere", "nowhere"), (str(GOLDEN), "a-s1: held_out .* has another tokenizer than ")],
)
def test_held_out_text_is_looked_at_before_any_training(
    held_out: str, message: str, recipes: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, recipe=str(recipes / "lm.yaml"), runs={"a": {}}, held_out=held_out)
    with pytest.raises(UserError, match=message):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"runs": {"a": {"operations": -1}}}, "run a: operations must be a number above 0, not -1"),
        ({"runs": {"a": {"held_out": 1}}}, "run a: held_out must be a shard folder, not 1"),
        ({"runs": {"a": {}}, "context_curve": [0]}, "context_curve must be a list of numbers of tokens"),
        ({"grid": {"depth": {"d2": 2}}}, "grid must map axes to labels"),
        ({"grid": {"depth": [2, 4]}}, "grid must map axes to labels"),
        ({"grid": {"x": {"a b": {}}}}, "run 'a b': a name is text"),
        ({"runs": {}}, "needs `runs`"),
        ({"runs": {"a": {}}, "seed": 1}, "unknown key 'seed'"),
        ({"runs": {"a": {}}, "seeds": "1"}, "seeds must be a list"),
        ({"runs": {"a": {}}, "seeds": [1, 1]}, "[1, 1] has a seed twice"),
        ({"runs": {"a": {}}, "recipe": None}, "run a: neither it nor the sweep names a recipe"),
        ({"runs": {"a": {"optimizer.lrr": 1}}}, "run a: unknown recipe key 'optimizer.lrr': did you mean"),
        ({"runs": {"a": {"seed": 2}}}, "run a: seed is set by the sweep itself"),
        ({"runs": {"a/b": {}}}, "run 'a/b': a name is text"),
        ({"runs": {"a": {"after": "b"}}}, "after 'b' names no run of this sweep"),
        ({"runs": {"a": {"after": "b"}, "b": {}}}, "run a: `after` is for an SLLM"),
        ({"runs": {"a": {"data.validation": None}}}, "run a: needs validation shards"),
    ],
)
def test_mistakes_are_one_line(sweep: dict, message: str, recipes: Path, tmp_path: Path) -> None:
    path = write(tmp_path, **{"recipe": str(recipes / "sllm.yaml"), **sweep})
    with pytest.raises(UserError) as error:
        read_sweep(path, tmp_path / "out")
    assert message in str(error.value) and str(path) in str(error.value)


def test_mistakes_of_the_command_line(recipes: Path, tmp_path: Path) -> None:
    path = write(tmp_path, recipe=str(recipes / "sllm.yaml"), runs={"a": {}})
    for arguments, words in (
        (["--only", "b"], "--only b: the sweep has no such run; there are a"),
        (["--seed", "2"], "--seed: the sweep sets it itself"),
        (["--optimizer.lrr", "2"], "unknown recipe key 'optimizer.lrr'"),
        (["--result", str(tmp_path / "no" / "file.json")], "its folder does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            cli.main(["sweep", str(path), "--output", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="Unknown option: --optimizer.lr"):
        cli.main(["check", "--model", "x", "--optimizer.lr", "1"])


def test_the_sweeps_that_come_along_are_sound(tiny_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    cut = {"segmenter": "clause", "language": "en", "max_tokens": 64}
    for path in (REPOSITORY / "pipeline" / "recipes" / "sweeps").glob("*.yaml"):
        jobs = read_sweep(path, Path("out"))
        assert len({job.key for job in jobs}) == len(jobs) > 1
        assert yaml.safe_load(path.read_text())["about"]
        for job in jobs:
            vae = (job.after or job).recipe.model.vae
            recipe = job.recipe
            if recipe.optimizer.parts:  # refused by the trainer only, hours after the start of the sweep
                recipe = recipe.model_copy(deep=True)
                recipe.model.vae = vae
                model = new_model(recipe, tokenizer, cut)
                assert parameter_groups(model, recipe.optimizer)
