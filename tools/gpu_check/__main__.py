"""`python -m tools.gpu_check`: the acceptance of one GPU in minutes, or of the program itself on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from data_prep import __version__
from data_prep.common.command_line import Many, make_app, parse
from data_prep.common.environment import require_folder, write_result
from data_prep.common.errors import UserError, counted, log, run_main
from tools.gpu_check import bundle as bundles
from tools.gpu_check import page, runner

EXAMPLE = "python -m tools.gpu_check run --output gpu-check --device cpu --small"
CPU_PATIENCE = 8.0  # factor of all limits, which are a GPU's

app = make_app("python -m tools.gpu_check", __version__, __doc__.split("\n")[0], EXAMPLE)


@app.command
def run(
    *,
    output: str,
    device: Literal["cuda", "cpu"] = "cuda",
    small: bool = False,
    inputs: str | None = None,
    only: Many = (),
    patience: Annotated[float | None, Parameter(validator=validators.Number(gt=0))] = None,
) -> int:
    """Run the checks in order. Status 1 if one failed or ran over its limit; the others run all the same.

    Args:
        output: folder for results.jsonl, log.txt and the page; an earlier run's results are kept
        small: small models and few tokens, to try the program: every check, unless --only chooses
        inputs: folder with the shard sets `train` and `valid` (default: made of the demo corpus)
        only: these checks (default: those whose limits sum to 400 s; docs/performance.md names all)
        patience: factor of the time limits (default: 1 on a GPU, 8 on a CPU)
    """
    known = {check.name: check for check in runner.CHECKS}
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only {unknown[0]}: there is no such check; there are {', '.join(known)}")
    chosen = [check for check in runner.CHECKS if check.name in only or (not only and (small or check.usual))]
    folder = Path(inputs or Path(output) / "inputs")
    if not inputs and not (folder / "valid").is_dir():
        bundles.prepare_inputs(folder)
    if missing := [name for name in ("train", "valid") if not (folder / name).is_dir()]:
        raise UserError(f"--inputs {folder}: has no folder {missing[0]}: make it with the command bundle")
    patience = patience or (CPU_PATIENCE if device == "cpu" else 1.0)
    setting = runner.Setting(device, small, str(folder), output, patience)
    ended = runner.run(chosen, setting)
    page.write(runner.read(Path(output) / runner.RESULTS), Path(output))
    bad = [f"{record['check']} ({record['error']})" for record in ended if record["status"] != "ok"]
    said = f": {', '.join(bad)}" if bad else ""
    log(f"{output}/report.html: {counted(len(ended), 'check')}, {len(bad)} not passed{said}")
    return 1 if bad else 0


@app.command
def bundle(*, output: str, python_version: str = "3.12", inputs: str | None = None) -> None:
    """Prepare a folder for a machine with torch and transformers, but no package index: wheels, shards, and
    run.sh, which starts the checks there.

    Args:
        output: folder to write, at most 40 MiB
        python_version: of that machine
        inputs: folder with the shard sets `train` and `valid` (default: made of the demo corpus)
    """
    size = bundles.make(Path(output), python_version, inputs)
    log(f"{output}: {size / 2**20:.1f} MiB; there, in the project's folder: bash {output}/run.sh OUT")


@app.command
def expect(*, results: str | None = None, output: str | None = None) -> None:
    """What an H200 should give by arithmetic, beside the figures of a run if there is one.

    Args:
        results: results.jsonl of a run, whose ceilings are used too
        output: file for the figures, as JSON
    """
    from tools.gpu_check import expected

    require_folder(output)
    records = runner.read(results) if results else []
    found = expected.expected(records)
    write_result(found, output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    raise SystemExit(run_main("gpu_check", lambda: parse(app)()))
