"""The wheel alone: built, installed beside the dependencies, and used from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers.paths import REPOSITORY

pytestmark = pytest.mark.long

SMALL = ("--data.window_tokens", 128, "--data.bin_tokens", 256, "--training.max_steps", 2)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files that git knows."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pipeline", "data_prep", "ds_configs", "tools"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", output, source], check=True, cwd=source)
    (made,) = output.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a venv that has the dependencies of this one and, of ours, the wheel alone."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A path in a .pth file adds the packages, but no editable installation of the other venv.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--force-reinstall", wheel], check=True)
    return folder / "bin"


def test_the_wheel_holds_what_it_needs_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("pipeline", "*"), ("data_prep", "*"), ("ds_configs", "*.json")):
        for path in (REPOSITORY / folder).rglob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(REPOSITORY).as_posix() in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pipeline", "data_prep", "ds_configs"}


def test_from_text_to_generated_text_in_an_empty_folder(
    scripts: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(program: str, *words: object) -> str:
        command = [scripts / program, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{program} {words}: {done.stderr}"
        return done.stdout

    where = run("python", "-c", "import pipeline, data_prep; print(pipeline.__file__, data_prep.__file__)")
    assert all(Path(path).is_relative_to(scripts.parent) for path in where.split())
    run(
        "data-prep",
        "tokenizer",
        "--input",
        tiny_corpus / "train.jsonl",
        "--output",
        "tok",
        "--vocab-size",
        512,
    )
    for name in ("train", "valid"):
        text = ("--input", tiny_corpus / f"{name}.jsonl", "--output", name)
        run("data-prep", "shard", *text, "--tokenizer", "tok")
    config = ("--deepspeed-config", "zero1", "--data.shards", "train", "--data.validation", "valid", *SMALL)
    run("sllm", "train", "--recipe", "demo-vae", *config, "--output_dir", "runs/vae")
    run("sllm", "export", "runs/vae", "--output", "models/vae")
    config += ("--model.vae.path", "models/vae", "--output_dir", "runs/sllm")
    # In two ranks, by DeepSpeed's launcher.
    run("sllm", "train", "--recipe", "demo-sllm", "--ranks", 2, *config)
    assert len((tmp_path / "runs/sllm/metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "runs/sllm/starts.jsonl").read_text())["world"] == 2
    run("sllm", "export", "runs/sllm", "--output", "models/sllm")
    scored = json.loads(run("sllm", "evaluate", "--model", "models/sllm", "--data", "valid", "--json"))
    assert scored["bits_per_byte"] > 0
    written = run("sllm", "generate", "--model", "models/sllm", "--max-sentences", 1, "--seed", 1, "--json")
    assert json.loads(written)["tokens"]
    sweep = {"recipe": "demo-vae", "seeds": [1], "runs": {"one": {}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    data = ("--data.shards", "train", "--data.validation", "valid", *SMALL)
    swept = json.loads(run("sllm", "sweep", "sweep.yaml", "--output", "swept", *data, "--json"))
    assert len(swept["rows"]) == 1 and not swept["failed"]
