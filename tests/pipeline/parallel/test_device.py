"""Devices by the launcher's environment and by option; no GPU is needed."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers.model_folders import save, small_model

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.costs.benchmark import start
from pipeline.costs.options import GenerationBenchmark
from pipeline.evaluation.evaluate import load
from pipeline.models.inference import load_for_generation
from pipeline.parallel.device import choose_device, claim_gpu, require_own_gpu
from pipeline.parallel.ranks import Ranks, find_ranks

MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
MASTER = {"MASTER_ADDR": "n1", "MASTER_PORT": "9"}


@pytest.mark.parametrize("launcher", [MPI, SLURM])
@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 1)])
def test_deepspeed_and_this_project_use_the_same_gpu(launcher: dict, visible: int, index: int) -> None:
    env = launcher | MASTER
    ranks = find_ranks(env)
    assert ranks == Ranks(5, 8, 1)
    assert claim_gpu(ranks, visible, env) == index
    assert env["LOCAL_RANK"] == str(index)  # what DeepSpeed reads
    assert env.get("OMPI_COMM_WORLD_LOCAL_RANK", env["LOCAL_RANK"]) == env["LOCAL_RANK"]
    assert env["RANK"] == "5"


def test_a_rank_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="rank 6 is number 2 of its machine, which has 2 GPUs"):
        claim_gpu(Ranks(6, 8, 2), 2, {})


def with_gpu(monkeypatch: pytest.MonkeyPatch, bf16: bool = True) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)


def test_the_gpu_in_bf16_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch)
    assert choose_device() == (torch.device("cuda"), torch.bfloat16)
    assert choose_device(dtype="fp32") == (torch.device("cuda"), torch.float32)
    assert choose_device("cpu") == (torch.device("cpu"), torch.float32)
    assert choose_device(int8=True) == (torch.device("cpu"), torch.float32)
    with_gpu(monkeypatch, bf16=False)
    assert choose_device() == (torch.device("cuda"), torch.float32)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert choose_device() == (torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="--device cuda"):
        choose_device("cuda")


def test_without_a_gpu_the_cpu_in_fp32() -> None:
    assert choose_device() == (torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="PyTorch finds no CUDA device"):
        choose_device("cuda")


@pytest.mark.parametrize("wrong", [{"device": "cuda"}, {"dtype": "bf16"}])
def test_int8_with_another_device_or_precision_is_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="--int8 computes on the CPU"):
        choose_device(**wrong, int8=True)


def test_int8_is_loaded_for_the_cpu_where_there_is_a_gpu(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    folder = save(small_model("sllm", tokenizer), tmp_path / "m", tokenizer)
    with_gpu(monkeypatch)
    assert load(folder, int8=True).placed() == {"device": "cpu", "dtype": "float32"}
    model, _ = load_for_generation(folder, int8=True)
    assert next(model.parameters()).device.type == "cpu"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert load(folder).placed() == {"device": "cpu", "dtype": "float32"}
    with pytest.raises(UserError, match="DS_ACCELERATOR=cpu is set"):
        start(GenerationBenchmark(recipe="sllm-125m-h1", device="cuda"))


@pytest.mark.parametrize(
    ("settings", "accelerator"),
    [({"device": "cuda", "int8": True}, "cuda"), ({"device": "cpu"}, "cuda"), ({"device": "cuda"}, "cpu")],
)
def test_the_harness_device_is_a_wish(
    settings: dict,
    accelerator: str,
    tiny_tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """lm-evaluation-harness gives `cuda` by default, also with int8 and DS_ACCELERATOR=cpu."""
    from pipeline.interop.lm_eval_model import FolderLM

    tokenizer = load_tokenizer(tiny_tokenizer)
    folder = save(small_model("sllm", tokenizer), tmp_path / "m", tokenizer)
    with_gpu(monkeypatch)
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    weight = next(FolderLM(str(folder), **settings)._model.parameters())
    assert (weight.device.type, weight.dtype) == ("cpu", torch.float32)
    with pytest.raises(UserError, match="--device mps: must be cpu or cuda"):
        FolderLM(str(folder), device="mps")


def test_a_gpu_of_another_rank_is_refused() -> None:
    store = torch.distributed.HashStore()
    for local, gpu in enumerate(("GPU-1", "GPU-2")):
        require_own_gpu(store, Ranks(local, 3, local), gpu)
    with pytest.raises(UserError, match="rank 2 has the same GPU as another rank"):
        require_own_gpu(store, Ranks(2, 3, 2), "GPU-2")


def _timeouts() -> list[timedelta]:
    import torch.distributed as dist

    groups = [dist.group.WORLD, dist.new_group([0])]  # as DeepSpeed makes its own
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_collectives_wait_for_longer_than_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.distributed_c10d as c10d

    from pipeline.parallel.ranks import join, leave

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(c10d, name, timedelta(minutes=1))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    for hang, least in ((3600.0, 3600.0), (None, 600.0)):
        join(find_ranks(), hang)
        try:
            assert min(_timeouts()) >= timedelta(seconds=least)
            assert hang is None or min(_timeouts()) > timedelta(seconds=hang)
        finally:
            leave()
