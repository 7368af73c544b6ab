"""`make demo`: the whole line on a small corpus, by the real commands, ending in a report.

In: nothing but this project (the corpus is Python's own documentation). Out: everything under demo/:

    corpus/ tokenizer/ shards/     what data-prep makes
    runs/KIND/ models/KIND/        one training run and one exported model per kind: vae, sllm, lm
    measured/                      what `data-prep stats` and `sllm evaluate|check|generate` printed
    logs/ stamps/                  per step: its output, and the record that it is done
    report.md report.html          the report (report.py)

A step runs again only when its command, its recipe (or a base of it), or a step that it builds on has
changed, or its output is gone. Changed code is not noticed: `make clean` forgets everything. A killed
training resumes from its last checkpoint. Exit status: 0, or that of the step that failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.environment import machine
from data_prep.common.errors import UserError, run_main
from data_prep.common.files import write_atomically
from data_prep.common.processes import start_logged
from pipeline.parallel.ranks import free_port
from tools.demo.report import KINDS, SAMPLING, build_report

PROJECT = Path(__file__).resolve().parents[2]
PORT = "PORT"  # in a command: stands for a free port, so that the step's stamp does not depend on it
LAST_LINES = 25
PACKAGES = "torch deepspeed transformers tokenizers sentencepiece webdataset numpy".split()

PROMPTS = Path("tools/demo/prompts.jsonl")
# Tokens of each training. The token model's fit the time of SentenceVAE and SLLM together on two cores.
TOKENS = {"vae": 600_000, "sllm": 600_000, "lm": 1_150_000}
TASK_ITEMS = 150  # of each task of lm-evaluation-harness


@dataclass(frozen=True)
class Step:
    """One command line. `reads`: project files it depends on; `needs`: earlier steps whose output it uses.

    `makes`: the file or folder that it leaves; `captures`: `makes` is its standard output. `resumes`: after a
    kill the same command continues with what is there, so that is kept.
    """

    name: str
    command: tuple[str, ...]
    makes: Path
    needs: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    captures: bool = False
    resumes: bool = False


def steps(demo: Path) -> list[Step]:
    """The demo's steps in order; paths are relative to the project's folder."""
    at = shlex.quote(str(demo))
    data = f"{at}/shards/validation"
    found: list[Step] = []

    def add(name: str, command: str, makes: str, needs: str = "", **more: Any) -> None:
        found.append(Step(name, tuple(shlex.split(command)), demo / makes, tuple(needs.split()), **more))

    add("corpus", f"data-prep demo-corpus --output {at}/corpus", "corpus")
    command = f"data-prep tokenizer --input {at}/corpus/EN --output {at}/tokenizer --vocab-size 2048"
    add("tokenizer", command, "tokenizer", "corpus")
    shard = f"data-prep shard --tokenizer {at}/tokenizer --segmenter clause --lang en --workers 2"
    for name, source in (("train", "EN"), ("validation", "valid")):
        command = f"{shard} --input {at}/corpus/{source} --output {at}/shards/{name}"
        if name == "train":
            # The documentation repeats itself: what the validation documents say stays out of training.
            command += f" --decontaminate {at}/corpus/valid"
        add(f"shards-{name}", command, f"shards/{name}", "corpus tokenizer", resumes=True)
    for name in ("train", "validation"):
        command = f"data-prep stats {at}/shards/{name} --json"
        add(f"stats-{name}", command, f"measured/stats-{name}.json", f"shards-{name}", captures=True)
    for kind in KINDS:
        recipe, strategy = Path(f"pipeline/recipes/demo-{kind}.yaml"), Path("ds_configs/zero3.json")
        command = f"deepspeed --num_gpus 2 --master_port {PORT} pipeline/train.py --config {recipe} "
        command += f"--deepspeed_config {strategy} --output_dir {at}/runs/{kind} "
        command += f"--data.shards {at}/shards/train --data.validation {data} "
        command += f"--training.max_tokens {TOKENS[kind]}"
        needs = "shards-train shards-validation"
        if kind == "sllm":
            command += f" --model.vae.path {at}/models/vae"
            needs += " export-vae"
        reads = (*recipe_files(recipe), strategy)
        add(f"train-{kind}", command, f"runs/{kind}", needs, reads=reads, resumes=True)
        command = f"sllm export {at}/runs/{kind} --output {at}/models/{kind}"
        add(f"export-{kind}", command, f"models/{kind}", f"train-{kind}")
    for what, more in (("evaluate", f"--data {data}"), ("check", "")):
        for kind in KINDS:
            command = f"sllm {what} --model {at}/models/{kind} --json {more}"
            needs = f"export-{kind} shards-validation"
            add(f"{what}-{kind}", command, f"measured/{what}-{kind}.json", needs, captures=True)
    command = f"sllm ngram --train {at}/shards/train --data {data} --window-tokens 512 --json"
    add("ngram", command, "measured/ngram.json", "shards-train shards-validation", captures=True)
    for kind in KINDS[1:]:
        command = f"sllm lm-eval --model {at}/models/{kind} --tasks sllm_local --limit {TASK_ITEMS}"
        command += f" --output_path {at}/measured/tasks-{kind}"
        add(f"tasks-{kind}", command, f"measured/tasks-{kind}", f"export-{kind}")
    options = " ".join(f"--{option} {value}" for option, value in SAMPLING.items())
    command = f"sllm generate --model {at}/models/sllm --prompts {PROMPTS} --max-sentences 12 {options}"
    makes = "measured/samples.jsonl"
    add("generate", f"{command} --output {at}/{makes}", makes, "export-sllm", reads=(PROMPTS,))
    return found


def recipe_files(recipe: Path, project: Path = PROJECT) -> tuple[Path, ...]:
    """A recipe and the ones it builds on by `base`: an edit in any of them changes the run."""
    base = yaml.safe_load((project / recipe).read_text(encoding="utf-8")).get("base")
    return (recipe, *(recipe_files(recipe.parent / base, project) if base else ()))


class Runner:
    """Runs steps in a project folder; keeps a log and a stamp for each in the demo's folder."""

    def __init__(self, project: Path, demo: Path):
        self.project, self.demo = project, demo
        self.keys: dict[str, str] = {}
        self.redone: set[str] = set()
        self.environment = dict(os.environ) | {
            # The console scripts of this very environment, also when it is not activated.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        for folder in ("logs", "stamps", "measured"):
            (self.path(demo) / folder).mkdir(parents=True, exist_ok=True)

    def path(self, relative: Path) -> Path:
        return self.project / relative

    def key(self, step: Step) -> str:
        """What the step's result depends on, as one hash; its `needs` must have been run before."""
        content = [self.path(file).read_bytes().hex() for file in step.reads]
        parts = [step.command, content, [self.keys[name] for name in step.needs]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def run(self, step: Step, order: int) -> int:
        """Do the step unless it is done; the command's exit status. Prints one line."""
        key = self.keys[step.name] = self.key(step)
        stamp, started = (
            self.path(self.demo) / "stamps" / f"{step.name}.{end}" for end in ("json", "started")
        )
        output = self.path(step.makes)
        if stamp.exists() and output.exists() and json.loads(stamp.read_text())["key"] == key:
            say(f"{step.name:<18}  done before")
            return 0
        stamp.unlink(missing_ok=True)
        goes_on = step.resumes and started.exists() and started.read_text() == key
        if not goes_on:
            remove(output)
        started.write_text(key)
        output.parent.mkdir(parents=True, exist_ok=True)

        say(f"{step.name:<18}", end="")
        begin = time.monotonic()
        status = self.execute(step, output)
        seconds = time.monotonic() - begin
        if status:
            say(f"  FAILED with status {status} after {seconds:.1f} s")
            self.explain(step)
            return status
        say(f"  {seconds:6.1f} s")
        finished = time.strftime("%Y-%m-%d %H:%M:%S")
        record = {"step": step.name, "order": order, "key": key, "seconds": seconds, "finished": finished}
        stamp.write_text(json.dumps(record) + "\n")
        started.unlink()
        self.redone.add(step.name)
        return 0

    def log(self, step: Step) -> Path:
        return self.demo / "logs" / f"{step.name}.log"

    def execute(self, step: Step, output: Path) -> int:
        """The command's exit status. Its captured output appears under its name only when it is complete."""
        command = [str(free_port()) if part == PORT else part for part in step.command]
        log = self.path(self.log(step))
        log.unlink(missing_ok=True)
        process = start_logged(command, log, step.captures, cwd=self.project, env=self.environment)
        try:
            printed, _ = process.communicate()
        except BaseException:  # Ctrl-C: the launcher's ranks are in its group and must not outlive us
            say("  stopped")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if step.captures and process.returncode == 0:
            write_atomically(output, printed.encode())
        return process.returncode

    def explain(self, step: Step) -> None:
        lines = self.path(self.log(step)).read_text(errors="replace").splitlines()[-LAST_LINES:]
        print("\n".join(f"  | {line}" for line in lines), file=sys.stderr)
        print(f"the whole output of {step.name}: {self.log(step)}", file=sys.stderr)


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe_machine() -> dict[str, str]:
    """The machine and the versions, for the report."""
    known = machine(PACKAGES)
    commit = known["git_commit"] or "not a git checkout"
    return {
        "processor": known["cpu"],
        "cores": str(known["cores"]),
        "memory": f"{known['memory_gb']:.0f} GB",
        "system": known["system"],
        "processes": "2, one thread each, exchanging by gloo",
        "project": f"{commit}{' with changes' if known['git_changed'] else ''}",
        "Python": known["python"],
        **known["packages"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.run", description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="demo", type=Path, help="folder for everything (default demo)")
    demo = parser.parse_args().output
    for program in ("data-prep", "sllm", "deepspeed"):
        if not (Path(sys.executable).parent / program).exists():
            raise UserError(f"{program} is not installed beside {sys.executable}: run `make demo`")

    begin = time.monotonic()
    runner = Runner(PROJECT, demo)
    machine = PROJECT / demo / "machine.json"
    for order, step in enumerate(steps(demo), start=1):
        if status := runner.run(step, order):
            return status
        if step.name.startswith("train-") and (step.name in runner.redone or not machine.exists()):
            machine.write_text(json.dumps(describe_machine(), indent=1) + "\n")
    build_report(PROJECT / demo)
    say(f"all done in {time.monotonic() - begin:.0f} s; the report: {demo}/report.md and {demo}/report.html")
    return 0


def console() -> int:
    # TERM ends like Ctrl-C, so that a stopped demo leaves no training process behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_main("demo", main)


if __name__ == "__main__":
    sys.exit(console())
