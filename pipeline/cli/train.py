"""`sllm train`: one training run, in this process or in several ranks of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Annotated

from cyclopts import App, Parameter

from data_prep.common.command_line import Many, Positive
from data_prep.common.errors import UserError
from pipeline.cli.options import Overrides
from pipeline.config.keys import as_text
from pipeline.config.schema import KEYS

FORWARDED = (signal.SIGUSR1, signal.SIGTERM)


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
) -> int:
    """One training run; every recipe key may follow, as --section.key VALUE.

    Args:
        recipe: recipe file, or the name of one that ships with the package
        deepspeed_config: a DeepSpeed JSON file or the name of one in ds_configs/, and any that add to it
        ranks: processes on this machine (default: this process alone, or one rank of srun or torchrun)
    """
    words = ["--recipe", recipe, "--deepspeed-config", *deepspeed_config, *overrides]
    if ranks is not None:
        return launch(ranks, words)
    from pipeline.training.main import main

    return main(words)


def launch(ranks: int, words: list[str]) -> int:
    """Train in `ranks` processes of this machine, started by DeepSpeed's launcher; returns its exit status.

    USR1 and TERM are passed on to the ranks, which save and stop. The launcher itself would not do that.
    """
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        raise UserError("--ranks: this process is a rank of a launcher already; start it without --ranks")
    from pipeline.parallel.ranks import free_port

    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    module = ["--num_gpus", str(ranks), *address, "--module", "pipeline.train"]
    launcher = subprocess.Popen([sys.executable, "-m", "deepspeed.launcher.runner", *module, *words])
    for number in FORWARDED:
        signal.signal(number, lambda number, _: _signal_ranks(launcher.pid, number))
    return launcher.wait()


def _signal_ranks(launcher: int, number: int) -> None:
    import psutil

    for process in psutil.Process(launcher).children(recursive=True):
        try:
            if "LOCAL_RANK" in process.environ():
                process.send_signal(number)
        except psutil.Error:
            continue
