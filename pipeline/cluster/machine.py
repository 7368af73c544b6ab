"""What `sllm doctor` finds on one machine: versions, code, shards, disks, GPUs.

Each function returns plain JSON with a list `problems` of lines that do not name the machine. No torch here.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError, counted, describe

PACKAGES = (
    "sentence-llm",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "numpy",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
SAMPLED = 2  # shards verified on each machine when not all are
WRITE_BYTES = 32 << 20
SLOW_DISK = 20e6  # bytes/s; less is worth a warning
VISIBLE_SECONDS = 10.0  # how long a shared file system may take to show a new file elsewhere
BUSY_GPU = 0.1  # of its memory, before the job starts


def versions() -> dict[str, str | None]:
    """Python, the packages that the ranks of one run must share, and a hash of this project's own code."""
    from data_prep.common.environment import code_version, package_versions

    found = {"python": platform.python_version(), **package_versions(PACKAGES)}
    return found | {"the project's code": code_version()}


def shards(folder: str, machine: int, machines: int, part: int, parts: int, deep: bool) -> dict[str, Any]:
    """Every file is there in full size and can be read at both ends; some shards are read whole and compared
    with the manifest's sha256: by `deep` all of them, shared out over the `parts` processes of a machine,
    else a few, others on every one of the `machines`."""
    from data_prep.common.files import file_sha256
    from data_prep.shards.reader import ShardSet

    facts: dict[str, Any] = {"folder": folder, "fingerprint": None, "problems": []}
    try:
        entries = ShardSet.open(folder).manifest["shards"]
        facts["fingerprint"] = ShardSet.open(folder).fingerprint
    except (UserError, OSError) as error:
        return facts | {"problems": [f"shards: {describe(error)}"]}
    if deep:
        chosen = set(range(part, len(entries), parts))
    elif part or not entries:
        chosen = set()
    else:
        chosen = {n % len(entries) for n in range(machine, machine + SAMPLED * machines, machines)}
    facts |= {"shards": len(entries), "bytes": sum(entry["size"] for entry in entries), "verified": []}
    for number, entry in enumerate(entries):
        for name, size, sha256 in (
            (entry["file"], entry["size"], entry["sha256"]),
            (entry["index"], None, entry["index_sha256"]),
        ):
            path = Path(folder) / name
            try:
                if number in chosen:
                    if file_sha256(path) != sha256:
                        facts["problems"].append(
                            f"shard {path} is not what the manifest says (its sha256 differs)"
                        )
                    elif size is not None:
                        facts["verified"].append(number)
                elif not part:
                    _read_ends(path, size)
            except (UserError, OSError) as error:
                facts["problems"].append(f"shard cannot be read: {describe(error)}")
    return facts


def _read_ends(path: Path, size: int | None) -> None:
    with open(path, "rb") as stream:
        found = os.fstat(stream.fileno()).st_size
        if size is not None and found != size:
            raise UserError(f"{path} has {counted(found, 'byte')}, the manifest says {size:,}")
        stream.read(4096)
        stream.seek(max(0, found - 4096))
        stream.read(4096)


def disk(folder: str, needed: float) -> dict[str, Any]:
    """Free bytes (at least `needed`) and bytes/s of writing, flushed, in a folder; the folder is made if it
    is missing."""
    facts: dict[str, Any] = {"folder": folder, "free": None, "write": None, "problems": []}
    probe = Path(folder) / f".doctor-{os.uname().nodename}-{os.getpid()}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        facts["free"] = shutil.disk_usage(folder).free
        if facts["free"] < needed:
            facts["problems"].append(
                f"disk of {folder}: {_gb(facts['free'])} free, {_gb(needed)} are needed: make room, or name "
                "another folder"
            )
        block, began = os.urandom(1 << 20), time.monotonic()
        with open(probe, "wb", buffering=0) as stream:
            for _ in range(WRITE_BYTES // len(block)):
                _write_all(stream.fileno(), block)
            os.fsync(stream.fileno())
        facts["write"] = WRITE_BYTES / (time.monotonic() - began)
    except OSError as error:
        facts["problems"].append(f"cannot write to {folder}: {error.strerror}")
    finally:
        try:
            probe.unlink(missing_ok=True)
        except OSError:
            pass
    return facts


def _write_all(handle: int, block: bytes) -> None:
    """A disk that is nearly full takes part of a block and says nothing."""
    while block:
        block = block[os.write(handle, block) :]


def is_visible(path: str, content: str) -> bool:
    """Whether a file that another machine has written can be read here, after a while if need be."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            if Path(path).read_text() == content:
                return True
            os.listdir(Path(path).parent)  # makes an NFS client look again
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def gpus(tasks: int) -> dict[str, Any]:
    """The GPUs that the driver reports, none where there is no driver.

    tasks: ranks on this machine; each needs a GPU unless DS_ACCELERATOR is `cpu`.
    """
    import pynvml

    facts: dict[str, Any] = {"gpus": [], "problems": []}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return facts
    except pynvml.NVMLError as error:
        return facts | {"problems": [f"the NVIDIA driver fails: {error}"]}
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                gpu = _gpu(index)
            except pynvml.NVMLError as error:
                facts["problems"].append(f"GPU {index} fails: {error}")
                continue
            facts["gpus"].append(gpu)
            facts["problems"] += _gpu_problems(gpu)
    finally:
        pynvml.nvmlShutdown()
    if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and len(facts["gpus"]) < tasks:
        facts["problems"].append(f"{counted(len(facts['gpus']), 'GPU')} for {counted(tasks, 'task')}")
    return facts


def _gpu(index: int) -> dict[str, Any]:
    """Memory is in MiB, temperature in degrees Celsius; None: this kind of GPU does not report it."""
    import pynvml as nvml

    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(handle, *arguments)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            return None

    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    # Version 2 does not count what the driver reserves as used.
    memory = ask(nvml.nvmlDeviceGetMemoryInfo, nvml.nvmlMemory_v2)
    uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return {
        "index": index,
        "name": nvml.nvmlDeviceGetName(handle),
        "driver_version": nvml.nvmlSystemGetDriverVersion(),
        "memory.total": memory and memory.total >> 20,
        "memory.used": memory and memory.used >> 20,
        "temperature.gpu": ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "ecc.errors.uncorrected.volatile.total": ask(nvml.nvmlDeviceGetTotalEccErrors, *uncorrected),
        "retired_pages.pending": ask(nvml.nvmlDeviceGetRetiredPagesPendingStatus),
    }


def _gpu_problems(gpu: dict[str, Any]) -> Iterator[str]:
    name, used, total = f"GPU {gpu['index']} ({gpu['name']})", gpu["memory.used"], gpu["memory.total"]
    if total and used > BUSY_GPU * total:
        yield f"{name}: {used} of {total} MiB are in use by another process"
    if errors := gpu["ecc.errors.uncorrected.volatile.total"]:
        yield f"{name}: {errors} uncorrected memory errors since the last start"
    if gpu["retired_pages.pending"]:
        yield f"{name}: memory pages wait to be retired: the machine must be restarted"


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
