"""What `sllm doctor` is asked to check. Imports nothing heavy: the fields are options of the command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from data_prep.common.command_line import Amount, Many


@dataclass(frozen=True, kw_only=True)
class Checks:
    """The folders of a run, and the limits that its machines must keep.

    Args:
        data: shard folders of the run
        output_dir: run directory: shared, writable, with space left
        local_dir: node-local folder with room for the shards
        free_gb: space that the run directory must have, in GB
        min_gbps: least Gbit/s of a pair (0: no limit)
        timeout: seconds to wait for a rank
        deep: sha256 of every shard, not of a few
    """

    data: Annotated[Many, Parameter(alias="--shards")] = ()
    output_dir: Annotated[str | None, Parameter(alias="--output_dir")] = None
    local_dir: Annotated[str | None, Parameter(alias="--local_dir")] = None
    free_gb: Annotated[Amount, Parameter(alias="--free_gb")] = 1.0
    min_gbps: Annotated[Amount, Parameter(alias="--min_gbps")] = 0.0
    timeout: Amount = 120.0
    deep: bool = False
