"""What the two benchmarks share: their conditions, published sizes of OPT, memory of this process (Linux)."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from data_prep.common.environment import header, require_folder
from data_prep.common.errors import UserError
from data_prep.common.measuring import memory_field
from pipeline.costs.options import Benchmark
from pipeline.parallel.device import choose_device

PACKAGES = ("numpy", "torch", "transformers", "deepspeed")
OPT_VOCABULARY = 50272
# As published (arXiv 2205.01068, table 1; 350M's post-norm and 512-wide embedding as in its config).
OPT_SIZES: dict[str, dict[str, Any]] = {
    "opt-125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072},
    "opt-350m": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "ffn_dim": 4096,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "opt-1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192},
}


def published_opt(name: str, vocab_size: int = OPT_VOCABULARY) -> OPTForCausalLM:
    """An OPT of a published size with random weights."""
    torch.manual_seed(0)
    sizes = {**OPT_SIZES[name], "vocab_size": vocab_size, "attn_implementation": "sdpa"}
    return OPTForCausalLM(OPTConfig(**sizes))


def start(options: Benchmark) -> torch.device:
    """The device, with its threads set. Raises: UserError for a missing device or output folder."""
    if options.device == "cuda":
        choose_device("cuda")
    require_folder(options.output)
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    return torch.device(options.device)


def conditions(options: Benchmark) -> dict[str, Any]:
    """The first part of a result: the machine, and what both sides were measured under."""
    return {
        **header(PACKAGES),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "runs": options.runs,
    }


def resident() -> int:
    """Bytes resident now, without freed memory that the C library keeps."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # only glibc has it
        pass
    return memory_field("VmRSS")


def reset_peak() -> None:
    """Reset VmHWM to what is resident now. Raises: UserError if Linux's /proc is missing or not writable."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise UserError(f"memory cannot be measured on this system ({error}): use --no-memory") from None


def reading_rate(device: torch.device) -> float:
    """Bytes per second that products of a large matrix and a vector read, with this process's threads."""
    matrix, vector = torch.ones(8192, 8192, device=device), torch.ones(8192, device=device)
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        torch.mv(matrix, vector)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return matrix.nbytes / statistics.median(seconds)
