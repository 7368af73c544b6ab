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
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_prep.common.environment import machine
from data_prep.common.errors import UserError, run_main
from data_prep.common.files import write_atomically
from data_prep.common.processes import start_logged
from pipeline.parallel.ranks import free_port
from tools.demo.report import KINDS, build_report

PROJECT = Path(__file__).resolve().parents[2]
PORT = "PORT"  # in a command: stands for a free port, so that the step's stamp does not depend on it
LAST_LINES = 25
PACKAGES = "torch deepspeed transformers tokenizers sentencepiece webdataset numpy".split()

# (prompt, further options of `sllm generate`): drawn once each, all of them shown.
SAMPLES = (
    ("The list of", ("--temperature", "0")),
    ("Return the number of", ("--temperature", "0.8", "--top-p", "0.95", "--seed", "1")),
    ("If the file does not exist,", ("--temperature", "0.8", "--top-p", "0.95", "--seed", "2")),
    ("", ("--temperature", "0.8", "--top-p", "0.95", "--seed", "3")),
)


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
    corpus, tokenizer, measured = demo / "corpus", demo / "tokenizer", demo / "measured"
    train, validation = demo / "shards" / "train", demo / "shards" / "validation"

    def data_prep(name: str, *arguments: object) -> tuple[str, ...]:
        return ("data-prep", name, *map(str, arguments))

    def shard(name: str, source: Path, output: Path) -> Step:
        settings = ("--segmenter", "clause", "--lang", "en", "--workers", 2)
        command = data_prep(
            "shard", "--input", source, "--output", output, "--tokenizer", tokenizer, *settings
        )
        return Step(f"shards-{name}", command, output, needs=("corpus", "tokenizer"), resumes=True)

    def stats(name: str, folder: Path) -> Step:
        command = data_prep("stats", folder, "--json")
        output = measured / f"stats-{name}.json"
        return Step(f"stats-{name}", command, output, needs=(f"shards-{name}",), captures=True)

    found = [
        Step("corpus", data_prep("demo-corpus", "--output", corpus), corpus),
        Step(
            "tokenizer",
            data_prep("tokenizer", "--input", corpus / "EN", "--output", tokenizer, "--vocab-size", 2048),
            tokenizer,
            needs=("corpus",),
        ),
        shard("train", corpus / "EN", train),
        shard("validation", corpus / "valid", validation),
        stats("train", train),
        stats("validation", validation),
    ]
    for kind in KINDS:
        run, model = demo / "runs" / kind, demo / "models" / kind
        recipe, strategy = Path(f"pipeline/recipes/demo-{kind}.yaml"), Path("ds_configs/zero3.json")
        command = ("deepspeed", "--num_gpus", "2", "--master_port", PORT, "pipeline/train.py")
        command += ("--config", str(recipe), "--deepspeed_config", str(strategy), "--output_dir", str(run))
        command += ("--data.shards", str(train), "--data.validation", str(validation))
        needs = ("shards-train", "shards-validation")
        if kind == "sllm":
            command += ("--model.vae.path", str(demo / "models" / "vae"))
            needs += ("export-vae",)
        reads = (*recipe_files(recipe), strategy)
        found.append(Step(f"train-{kind}", command, run, needs, reads, resumes=True))
        export = ("sllm", "export", str(run), "--output", str(model))
        found.append(Step(f"export-{kind}", export, model, needs=(f"train-{kind}",)))
    for kind in KINDS:
        model = ("--model", str(demo / "models" / kind), "--json")
        command = ("sllm", "evaluate", *model, "--data", str(validation))
        output, needs = measured / f"evaluate-{kind}.json", (f"export-{kind}", "shards-validation")
        found.append(Step(f"evaluate-{kind}", command, output, needs, captures=True))
    for kind in KINDS:
        command = ("sllm", "check", "--model", str(demo / "models" / kind), "--json")
        output = measured / f"check-{kind}.json"
        found.append(Step(f"check-{kind}", command, output, needs=(f"export-{kind}",), captures=True))
    for number, (prompt, options) in enumerate(SAMPLES, start=1):
        command = ("sllm", "generate", "--model", str(demo / "models" / "sllm"), "--prompt", prompt)
        command += ("--max-sentences", "12", *options, "--json")
        output = measured / f"sample-{number}.json"
        found.append(Step(f"generate-{number}", command, output, needs=("export-sllm",), captures=True))
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


def describe_machine(project: Path) -> dict[str, str]:
    """The machine and the versions, for the report."""
    known = machine(PACKAGES)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=project, capture_output=True, text=True
    ).stdout.strip()
    return {
        "processor": known["cpu"],
        "cores": str(known["cores"]),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "processes": "2, one thread each, exchanging by gloo",
        "project": commit or "not a git checkout",
        "Python": platform.python_version(),
        **known["packages"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo.run",
        description="Run the whole line on a small corpus and write a report.",
        epilog="example:\n  python -m tools.demo.run --output demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", default="demo", metavar="DIR", help="folder for everything (default demo)"
    )
    demo = Path(parser.parse_args(argv).output)
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
            machine.write_text(json.dumps(describe_machine(PROJECT), indent=1) + "\n")
    build_report(PROJECT / demo)
    say(f"all done in {time.monotonic() - begin:.0f} s; the report: {demo}/report.md and {demo}/report.html")
    return 0


def console() -> int:
    # TERM ends like Ctrl-C, so that a stopped demo leaves no training process behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_main("demo", main)


if __name__ == "__main__":
    sys.exit(console())
