"""The private parts of DeepSpeed that `pipeline.parallel.deepspeed_compat` uses: a test for each, which names
the part that a release has changed."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import TorchBackend, build_shm_op
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.utils import mixed_precision_linkage
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment
from deepspeed.utils.timer import SynchronizedWallClockTimer

from pipeline.parallel import deepspeed_compat as compat


def changed(name: str) -> str:
    return (
        f"DeepSpeed {deepspeed.__version__} has changed {name}: adapt pipeline/parallel/deepspeed_compat.py"
    )


def test_compatible_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__, changed("ops.__compatible_ops__")
    source = inspect.getsource(build_shm_op)
    assert "deepspeed.ops.__compatible_ops__.get(builder.NAME" in source, changed("comm.torch.build_shm_op")
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {})
    compat.skip_shared_memory_op()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_collectives_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cdb" in vars(deepspeed.comm.comm), changed("comm.comm.cdb")
    for name in compat.COLLECTIVES:
        assert callable(getattr(TorchBackend, name, None)), changed(f"TorchBackend.{name}")

    class Backend:
        pass

    for name in compat.COLLECTIVES:
        setattr(Backend, name, lambda _self, given: given)
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", Backend())
    for more in (1, 2):  # the second replaces the first
        compat.wrap_collectives(lambda collective, more=more: lambda given: collective(given) + more)
        assert deepspeed.comm.comm.cdb.all_reduce(10) == 10 + more


def test_wall_clock_timer_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "log" in vars(SynchronizedWallClockTimer), changed("SynchronizedWallClockTimer.log")
    monkeypatch.setattr(SynchronizedWallClockTimer, "log", SynchronizedWallClockTimer.log)
    compat.silence_timers()
    SynchronizedWallClockTimer().log(["forward"], normalizer=1.0)
    assert capsys.readouterr().out == ""


def test_checkpoint_engine_and_recovery_script() -> None:
    source = inspect.getsource(DeepSpeedEngine)
    assert "self._copy_recovery_script(" in source, changed("DeepSpeedEngine._copy_recovery_script")
    assert "self.checkpoint_engine.save(" in source, changed("DeepSpeedEngine.checkpoint_engine")
    for name in ("makedirs", "save"):  # what `pipeline.checkpoints.saving` overrides
        assert callable(getattr(TorchCheckpointEngine, name, None)), changed(f"TorchCheckpointEngine.{name}")

    class Engine:
        checkpoint_engine = "before"

        def _copy_recovery_script(self, path: str) -> str:
            return path

    engine = Engine()
    with compat.saving_through(engine, "ours"):
        assert engine.checkpoint_engine == "ours" and engine._copy_recovery_script("x") is None
    assert engine.checkpoint_engine == "before" and engine._copy_recovery_script("x") == "x"


def test_hp_mapping() -> None:
    source = inspect.getsource(mixed_precision_linkage)
    assert "._hp_mapping = None" in source, changed("mixed_precision_linkage: _hp_mapping")
    fields = set(inspect.signature(tensor_fragment).parameters)
    assert {"hp_fragment_address", "lp_fragment_address"} <= fields, changed("tensor_fragment")
    here, there = (fragment_address(numel=3, start=start) for start in (10, 20))
    mapping = SimpleNamespace(hp_fragment_address=here, lp_fragment_address=there)
    assert compat.fp32_fragment(SimpleNamespace(_hp_mapping=mapping)) == (slice(10, 13), slice(20, 23))
    assert compat.fp32_fragment(SimpleNamespace(_hp_mapping=None)) == (slice(0, 0), slice(0, 0))


def test_global_grad_norm() -> None:
    for module in (stage_1_and_2, stage3):
        source = inspect.getsource(module)
        assert "self._global_grad_norm = " in source, changed(f"{module.__name__}: _global_grad_norm")
    assert compat.norm_before_step(SimpleNamespace(_global_grad_norm=torch.tensor(2.5))) == 2.5
    assert compat.norm_before_step(SimpleNamespace()) is None


def test_flat_gradients() -> None:
    source = inspect.getsource(bf16_optimizer)
    for part in (
        "self.fp32_groups_actual_gradients_flat.append(",
        "self.get_grads_for_norm(for_clipping=True)",
    ):
        assert part in source, changed(f"bf16_optimizer: {part}")
    assert "non_expert_grads_for_norm, expert_grads_for_norm = self.get_grads_for_norm()" in source
    flat = [torch.ones(3), torch.ones(2)]
    optimizer = SimpleNamespace(fp32_groups_actual_gradients_flat=flat, has_moe_layers=False)
    compat.take_flat_gradients(optimizer)
    assert optimizer.get_grads_for_norm() == (flat, {})
    assert optimizer.get_grads_for_norm(for_clipping=True) is flat
    compat.take_flat_gradients(other := SimpleNamespace())  # of another stage
    assert vars(other) == {}
