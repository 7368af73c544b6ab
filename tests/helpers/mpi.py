"""Starts `mpirun` in tests."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

MPIRUN = [str(Path(sys.executable).with_name("mpirun")), "-np", "3", "--oversubscribe"]


def mpi_environment(folder: Path) -> dict[str, str]:
    """The environment of one `mpirun`, with a session folder of its own below `folder`.

    Open MPI removes the folder that all `mpirun` of a user share when one ends, so another that starts at
    that moment can fail ("The PMIx server's listener thread failed to start", status 213).
    """
    own = {"TMPDIR": tempfile.mkdtemp(dir=folder, prefix="mpi")}
    return os.environ | own | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
