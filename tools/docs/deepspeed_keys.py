"""`python -m tools.docs.deepspeed_keys`: a DeepSpeed config's keys as pipeline/config/deepspeed_keys.json.

They come from the installed DeepSpeed: its pydantic models, its defaults where it has no model, and the keys
that it reads while it builds its config. The file lets a config be checked before DeepSpeed is imported.
"""

from __future__ import annotations

import json
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime import config as runtime
from deepspeed.runtime.activation_checkpointing.config import DeepSpeedActivationCheckpointingConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel

from data_prep.common.files import write_atomically
from pipeline.config.deepspeed_config import KEYS_FILE, RECIPE_DECIDES
from pipeline.config.keys import BOUNDS
from tools.commands import console

FLAG, TEXT = {"kinds": ["boolean"]}, {"kinds": ["string"]}
NAMES = {"kinds": ["array"]}
DTYPE = {"kinds": ["string", "null"], "values": ["bf16", "fp16", "fp32"]}
# Where DeepSpeed has neither a model nor a default of the right type.
BY_HAND: dict[str, Any] = {
    "aio": AIO_DEFAULT_DICT,
    "communication_data_type": DTYPE,
    "data_types": {
        "grad_accum_dtype": DTYPE,
        "param_dtype": DTYPE,
        "buffer_dtype": DTYPE,
        "keep_in_fp32_modules": NAMES,
    },
    "dataloader_drop_last": FLAG,
    "disable_allgather": FLAG,
    "disable_python_gc": FLAG,
    "dump_state": FLAG,
    "gradient_allreduce_op": {"kinds": ["string"], "values": ["mean", "sum"]},
    "gradient_predivide_factor": {"kinds": ["number"], "gt": 0},
    "log_level": TEXT,
    "memory_breakdown": FLAG,
    "prescale_gradients": FLAG,
    "steps_per_print": {"kinds": ["integer", "null"], "ge": 1},
    "torch_autocast": {"enabled": FLAG, "dtype": DTYPE, "lower_precision_safe_modules": NAMES},
    "wall_clock_breakdown": FLAG,
    "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG,
}
MODELS: dict[str, Any] = {
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "fp16": DeepSpeedFP16Config,
    "timers": {"throughput": DeepSpeedThroughputTimerConfig},
    "zero_optimization": DeepSpeedZeroConfig,
}
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", dict: "object"}
KINDS |= {list: "array", type(None): "null"}


class _Recorder(dict):
    """A config that records which of its keys are read."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.read: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Recorder:
        return self


def deepspeed_keys() -> dict[str, Any]:
    """The content of the file. `known`: the keys of a config. `unused`: keys for what this trainer does not
    do."""
    blocks = {
        "activation_checkpointing": vars(DeepSpeedActivationCheckpointingConfig({})),
        "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({})),
    }
    sources = {**BY_HAND, **MODELS, **blocks, **_monitors()}
    known = {name: _block(source) for name, source in sorted(sources.items())}
    recorder = _Recorder({"train_batch_size": 1})
    runtime.DeepSpeedConfig(recorder)
    removed = runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS
    return {
        "known": known,
        "unused": sorted({*recorder.read, *removed} - {*known, *RECIPE_DECIDES, "bfloat16"}),
    }


def _monitors() -> dict[str, Any]:
    return {name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()}


def _block(source: Any) -> dict[str, Any]:
    if isinstance(source, type):
        return _from_type(source)
    if "kinds" in source:
        return source
    keys = {
        name: _block(value) if isinstance(value, (dict, type)) else _from_default(value)
        for name, value in sorted(source.items())
    }
    return {"kinds": ["object"], "keys": keys}


def _from_default(value: Any) -> dict[str, Any]:
    # A default of None says nothing about the type.
    return {} if value is None else {"kinds": [KINDS[type(value)]]}


def _from_type(kind: Any) -> dict[str, Any]:
    """What a value of a type may be, as `deepspeed_config` checks it."""
    choices, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin is typing.Union:
        found = [_from_type(choice) for choice in choices]
        return {**found[0], "kinds": [name for one in found for name in one["kinds"]]}
    if origin is list:
        return {"kinds": ["array"]}
    if isinstance(kind, type) and issubclass(kind, Enum):
        choices, origin = tuple(one.value for one in kind), typing.Literal
    if origin is typing.Literal:
        return {"kinds": [KINDS[type(choices[0])]], "values": [*dict.fromkeys(choices)]}
    if issubclass(kind, BaseModel):
        keys: dict[str, Any] = {}
        for name, field in kind.model_fields.items():
            extra = field.json_schema_extra
            renamed = isinstance(extra, dict) and extra.get("deprecated")
            more = {"renamed": extra["new_param"]} if renamed else {}
            limits = {
                name: getattr(one, name) for one in field.metadata for name in BOUNDS if hasattr(one, name)
            }
            for called in filter(None, (name, field.alias)):
                keys[called] = _from_type(field.annotation) | limits | more
        return {"kinds": ["object"], "keys": dict(sorted(keys.items()))}
    return {"kinds": [KINDS[kind]]}


def write() -> None:
    """Write the keys of the installed DeepSpeed's config as pipeline/config/deepspeed_keys.json."""
    write_atomically(KEYS_FILE, (json.dumps(deepspeed_keys(), indent=1) + "\n").encode())


if __name__ == "__main__":
    raise SystemExit(console("docs.deepspeed_keys", write))
