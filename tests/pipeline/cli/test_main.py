"""The `sllm` command line: its own process, JSON on stdout, one line per mistake, the right exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from helpers.model_folders import save, small_model
from helpers.paths import REPOSITORY

from data_prep.common.command_line import parse
from data_prep.common.errors import run_main
from data_prep.text.tokenizer import load_tokenizer
from pipeline.cli import main as cli
from pipeline.cli.models import inspect
from pipeline.cli.options import app

pytestmark = pytest.mark.launch

COMMANDS = ("evaluate", "generate", "check", "export")


def sllm(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Run the command as a user does, in a separate process."""
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def run(capsys):
    """Run the command in this process: (status, stdout, stderr)."""

    # A separate process gets this from the environment that the command sets before it imports
    # transformers.
    transformers.utils.logging.disable_progress_bar()

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run_main("sllm", lambda: cli.main([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def folders(tiny_tokenizer, tmp_path_factory):
    tokenizer = load_tokenizer(tiny_tokenizer)
    base = tmp_path_factory.mktemp("models")
    return {
        kind: save(small_model(kind, tokenizer), base / kind, tokenizer) for kind in ("sllm", "vae", "lm")
    }


def assert_one_line(status: int, out: str, err: str, *words: str) -> None:
    assert status == 2 and out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("sllm: error: ") and all(word in line for word in words), line


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['sllm', '--help']\nfrom pipeline.cli import console\n"
    code += "try:\n    console()\nfinally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("False False")
    assert all(command in done.stdout for command in COMMANDS)


def test_evaluate_prints_one_json_object(folders, tiny_valid_shards):
    done = sllm(
        "evaluate", "--model", folders["sllm"], "--data", tiny_valid_shards, "--max-documents", 2, "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for key in ("bits_per_byte", "ppl", "nll_nats", "bytes", "tokens", "sentences", "documents", "windows"):
        assert result[key] > 0
    assert result["documents"] == 2 and result["kind"] == "sllm" and "vector_gain" in result
    assert done.stderr == ""  # no progress, no warnings without a terminal


@pytest.mark.parametrize(
    ("kind", "words"), [("sllm", "vector gain"), ("lm", "bits per byte"), ("vae", "reconstruction")]
)
def test_evaluate_prints_a_table(kind, words, folders, tiny_corpus, run):
    text = tiny_corpus / "valid.jsonl"
    status, out, _ = run("evaluate", "--model", folders[kind], "--text", text, "--max-documents", 1)
    assert status == 0 and words in out and "windows of at most 200" in out


def test_generate_streams_text_and_prints_json(folders):
    arguments = (
        "generate",
        "--model",
        folders["sllm"],
        "--prompt",
        "他走了，the list",
        "--max-sentences",
        2,
        "--seed",
        3,
    )
    plain = sllm(*arguments, "--temperature", "0.8")
    assert plain.returncode == 0, plain.stderr
    done = sllm(*arguments, "--temperature", "0.8", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["text"].startswith("他走了，the list")
    assert len(result["sentences"]) <= 2 and result["seed"] == 3 and result["stopped"]
    # Text mode of the pipe turns \r into \n, nothing else.
    assert plain.stdout == (result["text"] + "\n").replace("\r\n", "\n").replace("\r", "\n")
    assert "stopped" in plain.stderr


@pytest.mark.parametrize("kind", ["sllm", "vae", "lm"])
def test_check_reports_and_passes(kind, folders, run):
    status, out, _ = run("check", "--model", folders[kind], "--documents", 2, "--json")
    report = json.loads(out)
    assert status == 0 and report["passed"] and report["kind"] == kind
    assert {"check", "path", "max_difference", "tolerance", "passed"} <= report["checks"][0].keys()


def test_failed_check_gives_status_1(folders, run):
    status, out, _ = run("check", "--model", folders["sllm"], "--documents", 2, "--tolerance", "1e-30")
    assert status == 1 and "FAIL" in out


def test_missing_and_foreign_folders_are_refused_in_one_line(folders, tiny_valid_shards, tmp_path, run):
    assert_one_line(*run("evaluate", "--model", tmp_path / "gone", "--data", tiny_valid_shards), "gone")
    assert_one_line(*run("generate", "--model", tmp_path, "--prompt", "x"), "config.json")
    assert_one_line(*run("check", "--model", tiny_valid_shards), "config.json")
    assert_one_line(*run("evaluate", "--model", folders["lm"], "--data", tmp_path / "gone"), "gone")
    assert_one_line(*run("evaluate", "--model", folders["lm"], "--data", folders["vae"]), "vae")
    assert_one_line(*run("generate", "--model", folders["vae"]), "cannot continue")
    assert_one_line(*run("export", tmp_path / "gone", "--output", tmp_path / "out"), "gone")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    assert_one_line(*run("check", "--model", tmp_path), "cannot be loaded")


def test_damaged_weights_are_refused_in_one_line(folders, tmp_path, tiny_tokenizer, run):
    for name, damage in (("cut", lambda data: data[: len(data) // 2]), ("none", lambda data: b"")):
        folder = Path(
            save(small_model("sllm", load_tokenizer(tiny_tokenizer)), tmp_path / name, tiny_tokenizer)
        )
        weights = folder / "model.safetensors"
        weights.write_bytes(damage(weights.read_bytes()))
        assert_one_line(*run("generate", "--model", folder), str(folder))


def test_bad_input_files_are_refused_in_one_line(folders, tmp_path, run):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rubbish.jsonl").write_text("no json here\n")
    (tmp_path / "table.xls").write_text("text")
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    reasons = {
        "empty.jsonl": "no text",
        "rubbish.jsonl": "1 × invalid JSON",
        "table.xls": "neither",
        "cut.jsonl.gz": "too early",
    }
    for name, reason in reasons.items():
        assert_one_line(*run("evaluate", "--model", folders["lm"], "--text", tmp_path / name), name, reason)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no command"),
        ("fly", 'Unknown command "fly"'),
        ("evaluatee", 'Did you mean "evaluate"?'),
        ("benchmark", "no command"),
        ("benchmark trainn", 'Did you mean "train"?'),
        ("evaluate --model x", "--data"),
        ("evaluate --model x --data y --text z", "--text"),
        ("evaluate --model x --data y --max-document 3", "Did you mean --max-documents?"),
        ("evaluate --model x --data y --lang fr", '"en", "zh", "auto"'),
        ("generate --model x --max-sentences 0", "Must be >= 1"),
        ("generate --model x --top-k many", "must be a whole number, not 'many'"),
        ("generate --model x --prompt a --interactive", "--interactive"),
        ("generate --model x --samples 2 --best-of 2", "--best-of"),
        ("inspect --recipe x --all", "--all"),
        ("export --output x", "RUN_DIR requires an argument"),
        ("check --model", "requires an argument"),
        ("check", "--model is missing and requires an argument: see `sllm check --help`"),
        ("evaluate --data x", "--model is missing"),
        ("scaling fit", "INPUTS requires an argument"),
        ("evaluate --modle x --data y", "Did you mean --model instead of --modle?"),
        ("ngram --train a --data b --order 1000", "--order 1000: must be from 1 to 20"),
        ("ngram --train a --data b --order 0", "Must be >= 1"),
        ("ngram --train a --data b --output .", "--output .: is a folder; name a file"),
        ("check --model x --tolerance -1", "Must be >= 0"),
        ("check --model x --tolerance nan", "for --tolerance"),
        ("doctor --free-gb -1", "Must be >= 0"),
        ("doctor --timeout nan", "for --timeout"),
        ("benchmark generation --recipe sllm-125m-h1 --vocab-size 1", "Must be >= 5"),
        ("export run --output s3://bucket/m", "--output s3://bucket/m is a URL"),
    ],
)
def test_impossible_arguments_are_refused(words, message, run):
    assert_one_line(*run(*words.split()), message)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("doctor --shards a b --output_dir c --free_gb 2", "doctor --data a b --output-dir c --free-gb 2"),
        ("doctor --data a --data b", "doctor --data a b"),
        ("audit run --shards a b", "audit run --data a b"),
        ("benchmark train --recipe r --shards s", "benchmark train --recipe r --data s"),
        ("ngram --shards t --validation v", "ngram --train t --data v"),
        ("train --config r --deepspeed_config a b", "train --recipe r --deepspeed-config a b"),
        ("report --output page.html a b", "report a b --output page.html"),
    ],
)
def test_spellings_of_one_command(old, new):
    before, after = (parse(app, words.split()) for words in (old, new))
    assert (before.func, before.args, before.keywords) == (after.func, after.args, after.keywords)


@pytest.mark.parametrize("command", ["train --recipe r --deepspeed-config z", "sweep f --output o"])
def test_recipe_keys_pass_through(command):
    bound = parse(app, [*command.split(), "--data.shards", "a", "b", "--training.max_steps", "-3"])
    assert bound.args[-5:] == ("--data.shards", "a", "b", "--training.max_steps", "-3")


def test_a_command_is_a_function(capsys):
    inspect(recipe="svae-768-h1", world=(1, 2), json=True)
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] > 1e8


def test_a_closed_pipe_is_no_accident(folders):
    command = (
        f"{sys.executable} -m pipeline.cli generate --model {folders['sllm']} --max-sentences 50 | head -c 1"
    )
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, env=os.environ)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["benchmark", "scaling"])
def test_groups_of_commands_have_an_example(command, run):
    status, out, _ = run(command, "--help")
    assert status == 0 and f"example: sllm {command} " in " ".join(out.split())
