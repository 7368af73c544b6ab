"""The process of one check: device, sizes, inputs, clocks, and a place for figures."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from data_prep.common.errors import first_line
from data_prep.shards.reader import ShardSet
from pipeline.cli.main import main as sllm
from pipeline.config.schema import Recipe
from pipeline.costs.benchmark import OPT_VOCABULARY
from pipeline.costs.sized_recipe import DTYPES, sized_recipe
from tools.gpu_check.runner import WORK, Setting, append


class Bench:
    """Settings of one check's process."""

    def __init__(self, name: str, setting: Setting):
        self.name, self.setting, self.small = name, setting, setting.small
        self.device = torch.device(setting.device)
        self.on_gpu = self.device.type == "cuda"
        self.precision: Literal["bf16", "fp32"] = "bf16" if self.on_gpu else "fp32"
        self.device_type: Literal["cuda", "cpu"] = "cuda" if self.on_gpu else "cpu"
        self.dtype = DTYPES[self.precision]
        self.tokens = 1024 if self.small else 16384
        self.train, self.valid = (str(Path(setting.inputs).resolve() / part) for part in ("train", "valid"))
        self.work = Path(setting.output).resolve() / WORK / name
        self.work.mkdir(parents=True, exist_ok=True)
        self.failed: list[str] = []

    def fact(self, **values: Any) -> None:
        """Keep figures, at once."""
        append(self.setting.output, {"check": self.name, "fact": values})
        print(json.dumps(values, default=str), flush=True)

    @contextlib.contextmanager
    def trial(self, what: str) -> Iterator[None]:
        """A part of the check: an error in it is kept, and the parts after it run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{what}: {first_line(error)}")
            self.fact(part=what, error=first_line(error))

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], runs: int = 5, warm: int = 2) -> float:
        """Median time of `work`."""
        times = []
        for turn in range(warm + runs):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if turn >= warm:
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    @contextlib.contextmanager
    def peak(self) -> Iterator[dict[str, float | None]]:
        """Gets `gb`: how far the block's memory on the GPU went beyond what was there before."""
        found: dict[str, float | None] = {"gb": None}
        if not self.on_gpu:
            yield found
            return
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        yield found
        found["gb"] = (torch.cuda.max_memory_allocated() - held) / 1e9

    def shards(self) -> ShardSet:
        return ShardSet.open(self.train)

    def sized(self, name: str) -> Recipe:
        """A recipe on this check's shards; where all is small, `small-sllm` in place of it.

        The large ones have OPT's vocabulary, whatever the tokenizer has: the head is a large part of their
        cost."""
        recipe = sized_recipe("small-sllm" if self.small else name)
        recipe.data.shards, recipe.data.validation = [self.train], self.valid
        recipe.data.bin_tokens = self.tokens
        recipe.data.window_tokens = min(recipe.data.window_tokens, self.tokens)
        recipe.log.tensorboard = recipe.log.wandb = False
        if not self.small:
            recipe.reading_part["vocab_size"] = max(OPT_VOCABULARY, self.shards().tokenizer().vocab_size)
        return recipe

    def written(self, recipe: Recipe, name: str = "recipe") -> Path:
        """The recipe as a file."""
        path = self.work / f"{name}.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        return path

    def sllm(self, *words: object) -> dict[str, Any]:
        """What a command of `sllm` prints as JSON; in this process, which has torch loaded."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = sllm([*map(str, words), "--json"])
        assert not status, f"sllm {words[0]}: status {status}: {printed.getvalue()[-500:]}"
        return json.loads(printed.getvalue())


if __name__ == "__main__":
    # An error ends the process with its trace, whose last line goes into the results.
    where, name, given = sys.argv[1:]
    module, function = where.split(":")
    bench = Bench(name, Setting(**json.loads(given)))
    getattr(importlib.import_module(f"tools.gpu_check.{module}"), function)(bench)
    if bench.failed:
        raise SystemExit("; ".join(bench.failed))
