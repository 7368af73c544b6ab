"""One rank of a training on made-up batches: what its steps send, how long they take, what memory they need.

JOB of `python -m tools.benchmarks.measured_steps JOB OUT` is a file with the fields of `Job`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.common.measuring import memory_field
from pipeline.config.deepspeed_config import complete_strategy, read_strategy
from pipeline.config.schema import Recipe
from pipeline.costs.benchmark import reset_peak, resident
from pipeline.costs.inspect import made_up_batch
from pipeline.costs.sized_recipe import Vocabulary, sized_recipe
from pipeline.data.loader import Step
from pipeline.data.plan import Position
from pipeline.models.factory import new_model
from pipeline.parallel.ranks import find_ranks, join, leave
from pipeline.training.engine import Engine

# A collective by its name in torch.distributed: what a rank of a ring of n sends, by the bytes of the whole
# tensor, and the place of that tensor among the arguments.
RING: dict[str, tuple[Callable[[int], float], int]] = {
    "all_reduce": (lambda n: 2 * (n - 1) / n, 0),
    "all_gather_into_tensor": (lambda n: (n - 1) / n, 0),
    "reduce_scatter_tensor": (lambda n: (n - 1) / n, 1),
}
OTHERS = ("all_gather", "reduce_scatter", "reduce", "all_to_all", "all_to_all_single", "gather", "scatter")


@dataclasses.dataclass
class Job:
    """What is to be run. zero: changes of the strategy's `zero_optimization`; config: of its other keys.
    dtype: bf16 as on GPUs, or fp32."""

    recipe: str
    strategy: Sequence[str]
    accumulation: int = 1
    dtype: str = "fp32"
    tokens: int = 512
    steps: int = 3
    vocab_size: int | None = None
    checkpointing: bool = False
    zero: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


def measure(job: Job) -> list[dict[str, Any]]:
    """Run the steps on this rank, which a launcher's environment describes. One dict for each step:

    seconds; collectives: those of them in DeepSpeed's collectives; sent: bytes by collective in a ring; wire:
    bytes that left this network namespace; peak: bytes of memory above what the process had before the model
    was made.
    """
    ranks = find_ranks()
    sent: Counter[str] = Counter()
    _count_collectives(sent, ranks.world)
    device = join(ranks)
    sized = sized_recipe(job.recipe)
    sized.data.bins_per_step = ranks.world * job.accumulation
    sized.training.activation_checkpointing = job.checkpointing
    _warm_up(sized, job, ranks.world, device)
    sent.clear()
    torch.manual_seed(sized.seed)
    config = complete_strategy(read_strategy(*job.strategy), sized, ranks.world, job.dtype == "bf16")
    config |= job.config | {"zero_optimization": config["zero_optimization"] | job.zero}
    before = resident()
    model = new_model(sized, Vocabulary(job.vocab_size or Vocabulary().vocab_size), {})
    engine = Engine(model, sized, config, device)
    found = []
    for _ in range(job.steps):
        dist.barrier()
        sent.clear()
        reset_peak()
        engine.collectives.take()
        wire, began = _wire_bytes(), time.perf_counter()
        _step(engine, sized, job.tokens, job.accumulation)
        dist.barrier()
        seconds = time.perf_counter() - began
        wire, peak = _wire_bytes() - wire, memory_field("VmHWM") - before
        row = {"seconds": seconds, "collectives": engine.collectives.take(), "sent": dict(sent)}
        found.append({**row, "wire": wire, "peak": peak})
    leave()
    return found


def _step(engine: Engine, recipe: Recipe, tokens: int, count: int) -> None:
    window = min(recipe.data.window_tokens, tokens)
    batch = made_up_batch(window, tokens, 10.9, recipe.reading_part.get("max_sentence_tokens") or 64)
    targets = dist.get_world_size() * count * (batch.tokens + batch.sentences)
    engine.compute(Step([batch] * count, [1] * count, 0, 0, targets, 0, [], Position((), ())))
    engine.update(1.0)


def _warm_up(recipe: Recipe, job: Job, world: int, device: torch.device) -> None:
    """A step of a tiny model: what is imported and loaded in it is no memory of the real one."""
    tiny = recipe.model_copy(deep=True)
    tiny.data.bins_per_step, tiny.optimizer.parts = world, {}
    sizes = {"hidden_size": 16, "heads": 2, "layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 1, "ffn_dim": 16, "intermediate_size": 16, "word_embed_proj_dim": 16}
    for part in (tiny.model.vae, tiny.model.backbone):
        part |= {key: size for key, size in sizes.items() if key in part}
        part.pop("ffn_size", None)
    config = complete_strategy(read_strategy(*job.strategy), tiny, world, job.dtype == "bf16")
    _step(Engine(new_model(tiny, Vocabulary(64), {}), tiny, config, device), tiny, 64, 1)


def _count_collectives(sent: Counter[str], world: int) -> None:
    """Let every collective of torch.distributed add what it sends; those that are not in `RING` fail."""
    for name, (share, place) in RING.items():
        setattr(dist, name, _counted(getattr(dist, name), name, share(world), place, sent))
    for name in OTHERS:
        setattr(dist, name, _refused(name))


def _counted(call: Callable, name: str, share: float, place: int, sent: Counter[str]) -> Callable:
    def counted(*arguments: Any, **named: Any) -> Any:
        tensor = ([*arguments, *named.values()])[place]
        sent[name] += round(share * tensor.nbytes)
        return call(*arguments, **named)

    return counted


def _refused(name: str) -> Callable:
    def refused(*_arguments: Any, **_named: Any) -> Any:
        raise RuntimeError(f"{name} is not counted")

    return refused


def _wire_bytes() -> int:
    """Bytes that have left this network namespace, without those on its loopback interface."""
    rows = [line.split(":") for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]]
    return sum(int(figures.split()[8]) for name, figures in rows if name.strip() != "lo")


if __name__ == "__main__":
    steps = measure(Job(**json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(steps))
