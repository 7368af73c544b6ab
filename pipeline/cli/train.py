"""`sllm train`: one training run, in this process or in several ranks of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from data_prep.common.command_line import Many, Positive
from data_prep.common.errors import REQUEUE, UserError, log
from pipeline.cli.options import Overrides
from pipeline.config.keys import as_text
from pipeline.config.schema import KEYS
from pipeline.parallel.signals import LAUNCHER, STOP_SIGNALS

if TYPE_CHECKING:
    import psutil

POLL_SECONDS = 0.5


EXAMPLE = """\
example:
  sllm train --recipe demo-vae --deepspeed-config zero1 --data.shards shards/train --output_dir runs/vae"""

command = App(
    name="train", help_epilogue=f"{EXAMPLE}\n\nkeys of a recipe, with type and default:\n{as_text(KEYS)}"
)


@command.default
def train(
    *overrides: Overrides,
    recipe: Annotated[str, Parameter(alias="--config")],
    deepspeed_config: Annotated[Many, Parameter(alias="--deepspeed_config")],
    ranks: Positive | None = None,
    launcher_log: Literal["debug", "info", "warning", "error"] = "error",
) -> int:
    """One training run; every recipe key may follow, as --section.key VALUE.

    Args:
        recipe: recipe file, or the name of one that ships with the package
        deepspeed_config: a DeepSpeed JSON file or the name of one in ds_configs/, and any that add to it
        ranks: processes on this machine (default: this process alone, or one rank of srun or torchrun)
        launcher_log: with --ranks, what DeepSpeed's launcher logs
    """
    if ranks is not None:
        return launch(ranks, recipe, deepspeed_config, overrides, launcher_log)
    from pipeline.training.main import start

    return start(recipe, deepspeed_config, overrides)


def launch(
    ranks: int, recipe: str, deepspeed_config: Sequence[str], overrides: Sequence[str], launcher_log: str
) -> int:
    """Train in `ranks` processes of this machine, started by DeepSpeed's launcher; returns its exit status.

    USR1, TERM and a first Ctrl-C are passed on to the ranks, which save and stop: the launcher would not do
    that. A second Ctrl-C ends them at once. Returns when all ranks have ended.

    Raises: UserError for input that the ranks would refuse.
    """
    from pipeline.parallel.ranks import free_port, is_launched

    if is_launched():
        raise UserError("--ranks: this process is a rank of a launcher already; start it without --ranks")
    from data_prep.shards.reader import ShardSet
    from pipeline.config.deepspeed_config import read_strategy, require_compatible
    from pipeline.config.loading import environment_overrides
    from pipeline.config.schema import load_recipe

    checked = load_recipe(recipe, [*overrides, *environment_overrides()])
    require_compatible(read_strategy(*deepspeed_config), checked)
    for folder in (*checked.data.shards, *filter(None, [checked.data.validation])):
        ShardSet.open(folder)
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    module = ["--num_gpus", str(ranks), *address, "--log_level", launcher_log, "--module", "pipeline.train"]
    words = ["--recipe", recipe, "--deepspeed-config", *deepspeed_config, *overrides]
    received: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: received.append(number))
    # In a separate session: the terminal's Ctrl-C is for this process, which passes it on.
    launcher = subprocess.Popen(
        [sys.executable, "-m", "deepspeed.launcher.runner", *module, *words],
        start_new_session=True,
        env=os.environ | {LAUNCHER: str(os.getpid())},
    )
    sent, said = set[tuple[int, int]](), False
    while launcher.poll() is None or _running(launcher.pid):
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=POLL_SECONDS)
        _forward(received, launcher.pid, sent)
        if received.count(signal.SIGINT) > 1:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
            raise KeyboardInterrupt
        if received and not said:
            said = True
            name = signal.Signals(received[0]).name
            log(f"sllm: {name} passed on, waits until the ranks have saved (Ctrl-C again: at once)")
    return launcher.returncode if launcher.returncode >= 0 else REQUEUE


def _running(group: int) -> list[psutil.Process]:
    """The processes of a launcher's group: the launcher and its ranks, also when it has left them."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _forward(received: Sequence[int], launcher: int, sent: set[tuple[int, int]]) -> None:
    """Send each signal once to each rank that has its handlers."""
    import psutil

    for process in _running(launcher) if received else ():
        with suppress(psutil.Error):  # it may have ended by now
            for at, number in enumerate(received):
                if (at, process.pid) not in sent and _is_rank(process) and _listens(process.pid, number):
                    process.send_signal(number)
                    sent.add((at, process.pid))


def _is_rank(process: psutil.Process) -> bool:
    return "LOCAL_RANK" in process.environ()


def _listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; before that, the signal would kill it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) & 1 << (number - 1))
