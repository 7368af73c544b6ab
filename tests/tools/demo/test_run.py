"""The demo's driver: what it redoes and what it reuses, how it fails, that it leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers.paths import REPOSITORY

from pipeline.config.schema import load_recipe
from tools.demo.run import Runner, Step, steps

pytestmark = pytest.mark.launch


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


APPEND = "open('{0}', 'a').write('x')"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text("a: 1\n")
    return tmp_path


def two_steps() -> list[Step]:
    first = Step("first", python(APPEND.format("out/first")), Path("out/first"), reads=(Path("recipe.yaml"),))
    second = Step("second", python("print(len('abc'))"), Path("out/second"), needs=("first",), captures=True)
    return [first, second]


def run(project: Path, steps: list[Step]) -> set[str]:
    """Run the steps as a new demo; the names of those that were really done."""
    runner = Runner(project, Path("out"))
    for order, step in enumerate(steps, start=1):
        assert runner.run(step, order) == 0
    return runner.redone


def test_done_steps_are_reused(project: Path) -> None:
    assert run(project, two_steps()) == {"first", "second"}
    assert run(project, two_steps()) == set()
    assert (project / "out/first").read_text() == "x"
    assert (project / "out/second").read_text() == "3\n"
    stamp = json.loads((project / "out/stamps/second.json").read_text())
    assert stamp["order"] == 2 and stamp["seconds"] > 0


def test_changed_recipe_redoes_the_step_and_those_that_need_it(project: Path) -> None:
    run(project, two_steps())
    (project / "recipe.yaml").write_text("a: 2\n")
    assert run(project, two_steps()) == {"first", "second"}
    assert (project / "out/first").read_text() == "x"  # the old output was removed first


def test_changed_command_and_lost_output_are_redone(project: Path) -> None:
    run(project, two_steps())
    first, second = two_steps()
    assert run(project, [first, replace(second, command=python("print(1)"))]) == {"second"}
    (project / "out/first").unlink()
    assert "first" in run(project, [first])


def test_failed_step_shows_its_last_lines_and_log(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('half'); print('the reason', file=sys.stderr); sys.exit(3)"
    step = Step("bad", python(code), Path("out/bad"), captures=True)
    assert Runner(project, Path("out")).run(step, 1) == 3
    shown = capfd.readouterr()
    assert "FAILED with status 3" in shown.out
    assert "the reason" in shown.err and "out/logs/bad.log" in shown.err
    assert not (project / "out/bad").exists()
    assert not (project / "out/stamps/bad.json").exists()


@pytest.mark.parametrize("resumes, expected", [(True, "xx"), (False, "x")])
def test_only_resuming_steps_keep_a_killed_attempts_output(
    project: Path, resumes: bool, expected: str
) -> None:
    fails_once = APPEND.format("out/file") + "; import os, sys; sys.exit(not os.path.exists('ready'))"
    step = Step("step", python(fails_once), Path("out/file"), resumes=resumes)
    assert Runner(project, Path("out")).run(step, 1) == 1
    (project / "ready").touch()
    assert run(project, [step]) == {"step"}
    assert (project / "out/file").read_text() == expected


def test_stopped_demo_leaves_no_process(project: Path) -> None:
    # A step whose command has a child of its own, as a launcher has its ranks.
    child = "import time; open('started', 'w').close(); time.sleep(600)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    script = f"""
import signal, sys
from pathlib import Path
from tools.demo.run import Runner, Step
signal.signal(signal.SIGTERM, signal.default_int_handler)
step = Step("long", (sys.executable, "-c", {launcher!r}), Path("out/long"))
Runner(Path({str(project)!r}), Path("out")).run(step, 1)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    while not (project / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert psutil.wait_procs(family, timeout=30)[1] == []


def test_an_edited_base_recipe_redoes_every_training_built_on_it(project: Path) -> None:
    for step in steps(Path("demo")):
        for file in step.reads:
            (project / file).parent.mkdir(parents=True, exist_ok=True)
            (project / file).write_bytes((REPOSITORY / file).read_bytes())
    trainings = [replace(step, needs=()) for step in steps(Path("demo")) if step.name.startswith("train-")]

    def keys() -> dict[str, str]:
        return {step.name: Runner(project, Path("demo")).key(step) for step in trainings}

    def changed_by(kind: str) -> set[str]:
        before = keys()
        with open(project / f"pipeline/recipes/demo-{kind}.yaml", "a") as recipe:
            recipe.write("seed: 2\n")
        return {name for name, key in keys().items() if key != before[name]}

    assert changed_by("lm") == {"train-lm"}
    assert changed_by("sllm") == {"train-sllm", "train-lm"}
    assert changed_by("vae") == {"train-vae", "train-sllm", "train-lm"}


def test_every_step_uses_the_projects_own_files() -> None:
    seen: set[str] = set()
    for step in steps(Path("demo")):
        assert step.makes.parts[0] == "demo"
        assert set(step.needs) <= seen, f"{step.name} needs a step that comes after it"
        for file in step.reads:
            assert (REPOSITORY / file).is_file(), file
        seen.add(step.name)
    trained = [step.command for step in steps(Path("demo")) if step.command[0] == "deepspeed"]
    assert len(trained) == 3


def test_baseline_has_the_budget_of_the_sllm() -> None:
    shards = ["--data.shards", "demo/shards/train"]
    recipes = [
        load_recipe(REPOSITORY / f"pipeline/recipes/demo-{kind}.yaml", shards) for kind in ("sllm", "lm")
    ]
    assert recipes[0].training.max_tokens == recipes[1].training.max_tokens > 0
    assert [recipe.objective for recipe in recipes] == ["sllm", "lm"]


def test_environment_finds_the_commands(project: Path) -> None:
    first = Runner(project, Path("out")).environment["PATH"].split(os.pathsep)[0]
    assert Path(first) == Path(sys.executable).parent
