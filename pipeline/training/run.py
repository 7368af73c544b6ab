"""The parts of one training run, put together: data, model, engine, log and state.

In: a checked recipe, a DeepSpeed strategy and this process's rank. Out: the run directory. Every rank makes
one `TrainingRun` and calls the same methods in the same order, because most of them contain collective
operations.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch

from data_prep.common.errors import UserError, say
from data_prep.common.files import write_atomically
from data_prep.shards.reader import ShardSet
from pipeline.checkpoints import loading, saving, store
from pipeline.checkpoints.store import Meta
from pipeline.config.deepspeed_config import COMMS, complete_strategy, zero_stage
from pipeline.config.schema import Recipe
from pipeline.data.loader import Step, StepLoader
from pipeline.data.plan import BinPlan, Consumed, Position
from pipeline.models.factory import new_model
from pipeline.models.flops import TRAINING_FACTOR, StepArithmetic, utilisation
from pipeline.models.losses import bits_per_byte
from pipeline.parallel.agreement import AgreedError, agree, do_and_agree, facts, require_agreement
from pipeline.parallel.ranks import Ranks, join, leave
from pipeline.training.engine import Engine
from pipeline.training.health import Guard, Speeds
from pipeline.training.profiler import StepProfiler
from pipeline.training.provenance import PROVENANCE, provenance
from pipeline.training.run_log import RunLog
from pipeline.training.validation import Validation
from pipeline.training.warm_start import initialise
from pipeline.training.watchdog import STACKS, STACKS_BEFORE, Watchdog

VALIDATION_SEED = 0  # every run looks at the same sample of a validation set


@dataclass
class State:
    """Where a run stands: what a checkpoint brings back beside weights and optimizer."""

    position: Position  # of the stream's next bin
    consumed: Consumed
    step: int = 0
    tokens: int = 0
    best: dict[str, Any] | None = None
    guard: Guard = field(default_factory=Guard)


@dataclass
class Totals:
    """One step's sums over all ranks, and the agreement on whether to stop after it."""

    objective: float
    token_nll: float
    end_nll: float
    stop_nll: float
    kl: float
    text_bytes: float
    sentences: float
    padding: float  # multiply-adds spent on padded slots, and all of them (`padding.py`)
    computed: float
    bins: float  # scored batches, and the sum of their digests: exact, being whole and below 2^53
    bins_digest: float
    wait_seconds: list[float]  # by rank
    operation_seconds: list[float]  # by rank, of the step before: its own time per multiply-add, 0: unknown
    stop: bool


class TrainingRun:
    """Everything one rank holds during a run; a context manager that ends its threads, files and group."""

    def __init__(self, recipe: Recipe, strategy: dict[str, Any], ranks: Ranks):
        self.recipe, self.ranks = recipe, ranks
        self.run_dir = Path(recipe.output_dir)
        self._profiler: StepProfiler | None = None
        self._abandoned: set[str] = set()  # names of later checkpoints that we did not go on from
        with ExitStack() as opened:  # what is open when one of these steps fails is closed again
            self._open = opened
            self._put_together(strategy)
            self._open = opened.pop_all()

    def _put_together(self, strategy: dict[str, Any]) -> None:
        recipe, ranks, data = self.recipe, self.ranks, self.recipe.data
        shard_sets = open_shards(data.shards)
        self.tokenizer = shard_sets[0].tokenizer()
        validation_sets = open_shards([data.validation], shard_sets[0]) if data.validation else []
        self.shards = [shard_set.fingerprint for shard_set in shard_sets]
        self.validation_shards = validation_sets[0].fingerprint if validation_sets else None

        self._watchdog = self._open.enter_context(
            Watchdog(self.run_dir, ranks.rank, recipe.health.hang_seconds)
        )
        device = join(ranks)
        self._open.callback(leave)
        self._watchdog.beat("the ranks' meeting")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.provenance = provenance(shard_sets, validation_sets, name)
        hosts = require_agreement(ranks, facts(recipe.to_dict(), strategy, self.provenance))
        self._speeds, self._time_per_operation = Speeds(hosts), 0.0
        torch.manual_seed(recipe.seed)
        model = new_model(recipe, self.tokenizer, shard_sets[0].settings.to_dict())
        if recipe.init_from:
            # By rank 0's answer: one that does not see the run's disk must not go another way than the rest.
            begun = ranks.rank == 0 and bool(store.listed(self.run_dir)[0])
            if not agree(None, begun)[0]:
                initialise(model, recipe.init_from, self.tokenizer, ranks)
                self._watchdog.beat("the reading of init_from")
        self.model_config = json.loads(model.config.to_json_string(use_diff=False))
        self._arithmetic = StepArithmetic(model)
        self.config = complete_strategy(strategy, recipe, ranks.world, on_gpu=device.type == "cuda")
        self.engine = Engine(model, recipe, self.config, device)
        self.plan = BinPlan(shard_sets, data.window_tokens, data.bin_tokens, recipe.seed, data.weights)
        self.state = State(self.plan.start(), Consumed(self.plan.sources))
        self._watchdog.beat("the model's making")
        self.validation = None
        if validation_sets:
            sample = BinPlan(validation_sets, data.window_tokens, data.bin_tokens, VALIDATION_SEED)
            self.validation = Validation(
                sample, recipe.training.eval_bins, ranks, self.tokenizer.byte_lengths
            )

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._watchdog.beat("the training")
        self._open.__exit__(*raised)

    @property
    def finished(self) -> bool:
        return self.recipe.training.progress(self.state.step, self.state.tokens) >= 1

    @property
    def evaluation_due(self) -> bool:
        due = self.finished or self.state.step % self.recipe.training.eval_every == 0
        return due and self.validation is not None

    @property
    def save_due(self) -> bool:
        is_best = self.state.best is not None and self.state.best["step"] == self.state.step
        if self.finished or is_best:
            return True
        # After a skipped step the weights may be what is wrong: the checkpoint before stays the last one.
        return self.state.step % self.recipe.training.save_every == 0 and not self.state.guard.in_row

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one; another number of ranks and another ZeRO
        stage than those that wrote it will do. UserError when it is of another model or data order."""
        found = loading.agree_on_newest_whole(self.run_dir)
        if not found:
            return
        checkpoint, saved, damage = found
        self._abandoned = store.beyond(self.run_dir, checkpoint)
        ours = self._meta()
        store.require_same_run(saved, checkpoint, ours)
        if self.ranks.rank == 0:
            if damage:
                say(damage)
            if (saved.world, saved.zero_stage) != (ours.world, ours.zero_stage):
                say(
                    f"{checkpoint.name} was written by {saved.world} rank(s) with ZeRO {saved.zero_stage}: "
                    f"its parts are put together anew for {ours.world} rank(s) with ZeRO {ours.zero_stage}"
                )
        loading.restore(self.engine.deepspeed, checkpoint, saved, ours.world, ours.zero_stage)
        self._watchdog.beat("the resuming")
        self.state = State(
            position=Position.from_json(saved.position),
            consumed=Consumed.from_json(saved.consumed),
            step=saved.step,
            tokens=saved.tokens,
            best=saved.best,
            guard=Guard(**saved.guard),
        )
        was, now = ((meta.validation, meta.recipe["training"]["eval_bins"]) for meta in (saved, ours))
        if saved.best and was != now:
            self.state.best = None
            if self.ranks.rank == 0:
                say(
                    "the validation sample is another than before: the best checkpoint so far "
                    f"(step {saved.best['step']}) no longer counts as best"
                )

    def begin(self) -> None:
        """Write down what this run is, open its log and start loading data."""
        do_and_agree(self._open_log)
        self._loader = self._open.enter_context(
            StepLoader(
                self.plan,
                self.recipe.objective,
                self.recipe.data.bins_per_step,
                self.ranks,
                self.tokenizer.byte_lengths,
                self.state.position,
            )
        )
        self._open.push(self._write_comms)
        self.log.start(self._start())
        wanted = self.recipe.log
        if wanted.profile and self.ranks.rank in wanted.profile_ranks:
            steps, folder = wanted.profile_steps(), self.run_dir / "profile"
            self._profiler = self._open.enter_context(StepProfiler(steps, folder, self.ranks.rank))
        self.log.say(self._description())
        self._watchdog.beat("the loading")
        self._clock = time.perf_counter()

    def _open_log(self) -> None:
        if self.ranks.rank == 0:
            self._write_settings()
        log = RunLog(self.run_dir, self.recipe, self.ranks.rank, self.state.step)
        self.log = self._open.enter_context(log)

    def _write_settings(self) -> None:
        """The files that say what this run is (rank 0 only)."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        store.remove_unfinished(self.run_dir)
        stacks = self.run_dir / STACKS
        if stacks.is_dir():  # of a start before this one: they must not be taken for this one's
            shutil.rmtree(self.run_dir / STACKS_BEFORE, ignore_errors=True)
            stacks.rename(self.run_dir / STACKS_BEFORE)
        write_atomically(self.run_dir / "recipe.yaml", self.recipe.to_yaml().encode())
        for name, values in (("ds_config.json", self.config), (PROVENANCE, self.provenance)):
            write_atomically(self.run_dir / name, (json.dumps(values, indent=1) + "\n").encode())
        self.tokenizer.save(self.run_dir / "tokenizer")

    def next_step(self) -> Step:
        if self._profiler:
            self._profiler.begin(self.state.step + 1)
        return self._loader.next_step()

    def compute(self, step: Step, stop_wanted: bool) -> Totals:
        """Forward and backward, then the step's one all-reduce of figures and of the wish to stop. Every rank
        gets the same totals. Raises AgreedError on every rank alike when one could not write its records or
        its trace of the step before.
        """
        sums = self.engine.compute(step)
        scored = [batch for batch in step.batches if batch.scored]
        counts = [self._arithmetic.count(batch) for batch in scored]
        computed = sum(one for _, one in counts)
        rest = [
            step.text_bytes,
            sum(batch.sentences for batch in scored),
            sum(padding for padding, _ in counts),
            computed,
            len(scored),
            step.digest,
            float(stop_wanted),
            float(self._unwritten is not None),
        ]
        # Every rank's own figures, each in a place of its own, ride along in the same sum.
        world, rank = self.ranks.world, self.ranks.rank
        own = [0.0] * (2 * world)
        own[rank], own[world + rank] = step.wait_seconds, self._time_per_operation
        rest += own
        everything = torch.cat([sums, self.engine.device_tensor(rest)])
        dist.all_reduce(everything)
        *figures, stop, unwritten = everything[: -2 * world].tolist()
        if unwritten:  # all know that it is so; this says whose it is, and why
            says = f"after step {self.state.step}: rank {{rank}} cannot write its log or trace: {{message}}; "
            says += "checkpoints are whole: make room and start the same command again"
            agree(self._unwritten, says=says)
        by_rank = everything[-2 * world :].tolist()
        seconds = self.engine.own_seconds()
        self._time_per_operation = seconds / computed if seconds and computed else 0.0
        return Totals(*figures, by_rank[:world], by_rank[world:], stop=stop > 0)

    def update(self, step: Step, totals: Totals) -> None:
        """Apply the gradients, move on, and log the step.

        A step that the guard finds bad is not applied, on any rank; its data counts as consumed. Raises
        AgreedError on every rank alike after `health.max_skips` such steps in a row.
        """
        state, health = self.state, self.recipe.health
        loss = totals.objective / step.targets_all
        progress = self.recipe.training.progress(state.step + 1, state.tokens + step.tokens_all)
        grad_norm, lr, skipped = self.engine.update(
            self.recipe.schedule.factor(progress),
            state.guard.bad_loss(loss, health),
            state.guard.norm_limit(health),
        )
        # With dynamic loss scaling gradients overflow by design: DeepSpeed skips and lowers the scale.
        rescaled = self.engine.scales_loss and math.isfinite(loss) and not math.isfinite(grad_norm)
        if not rescaled:
            state.guard.record(loss, grad_norm, skipped, health)
        state.step += 1
        state.tokens += step.tokens_all
        state.position = step.position
        state.consumed.add(step.bins_all)
        before, self._clock = self._clock, time.perf_counter()
        seconds = self._clock - before
        needed = TRAINING_FACTOR * (totals.computed - totals.padding) / self.ranks.world  # of one device
        nats = totals.token_nll + totals.end_nll + totals.stop_nll
        waits, slowest = totals.wait_seconds, self._speeds.note(totals.operation_seconds)
        self.log.step(
            {
                "step": state.step,
                "epoch": max(place.epoch for place in state.position.places),
                "tokens": state.tokens,
                "loss": loss,
                "bits_per_byte": bits_per_byte(nats, totals.text_bytes),
                "token_nll": totals.token_nll,
                "end_nll": totals.end_nll,
                "stop_nll": totals.stop_nll,
                **({"kl": totals.kl / totals.sentences} if totals.kl else {}),  # variational only
                "targets": step.targets_all,
                "bytes": int(totals.text_bytes),
                "bins": int(totals.bins),
                "bins_digest": int(totals.bins_digest),
                "tokens_per_second": step.tokens_all / seconds,
                "padding_share": totals.padding / totals.computed,
                "data_wait_seconds": sum(waits) / len(waits),
                "data_wait_max_seconds": max(waits),
                "data_wait_rank": waits.index(max(waits)),
                **({"slowest_rank": slowest[0], "slowest_ratio": slowest[1]} if slowest else {}),
                "grad_norm": grad_norm,
                "lr": lr,
                "skips": state.guard.skips,
                **({"skipped": skipped} if skipped else {}),
                "memory_bytes": self._memory_bytes(),
                "operations": int(TRAINING_FACTOR * totals.computed),
                "mfu": utilisation(needed, seconds, self.engine.device),
                "seconds": seconds,
                "time": time.time(),
            }
        )
        if self._profiler:
            self._profiler.end(state.step)
        self._watchdog.beat(f"step {state.step}")
        if warning := self._speeds.warning():
            self.log.say(warning)
        if skipped and not rescaled:
            self.log.say(f"step {state.step:>7}  skipped on all ranks: {skipped}")
            if state.guard.in_row >= health.max_skips:
                latest = store.newest_whole(self.run_dir)
                raise AgreedError(
                    f"step {state.step}: {skipped}; {state.guard.in_row} steps in a row were skipped "
                    f"(health.max_skips); last checkpoint: {latest[0].name if latest else 'none'}; start "
                    "again from there with a lower --optimizer.lr"
                )

    def evaluate(self) -> None:
        """Measure on the validation sample, log it, and remember the best."""
        figures = self.validation.run(self.engine)
        best = self.state.best
        measured = figures["bits_per_byte"]
        is_best = math.isfinite(measured) and (best is None or measured < best["bits_per_byte"])
        if is_best:
            self.state.best = {"step": self.state.step, "bits_per_byte": measured}
        seconds = time.perf_counter() - self._clock
        self.log.evaluation({"step": self.state.step, **figures, "best": is_best, "seconds": seconds})
        self._watchdog.beat("an evaluation")
        self._clock = time.perf_counter()  # not part of the next step's time

    def save(self) -> None:
        """Write a checkpoint, make it current, drop the oldest."""
        before = time.perf_counter()
        keep = self.recipe.training.keep
        saving.save(
            self.engine.deepspeed, self.run_dir, self._meta(), keep, self.log.flush_to_disk, self._abandoned
        )
        self._abandoned.discard(store.step_name(self.state.step))
        self.log.save({"step": self.state.step, "save_seconds": time.perf_counter() - before})
        self._watchdog.beat("a save")
        self._clock = time.perf_counter()

    def _meta(self) -> Meta:
        return Meta(
            objective=self.recipe.objective,
            step=self.state.step,
            position=self.state.position.to_json(),
            consumed=self.state.consumed.to_json(),
            tokens=self.state.tokens,
            best=self.state.best,
            guard=dataclasses.asdict(self.state.guard),
            world=self.ranks.world,
            zero_stage=zero_stage(self.config),
            shards=self.shards,
            validation=self.validation_shards,
            tokenizer=self.tokenizer.fingerprint,
            model_config=self.model_config,
            recipe=self.recipe.to_dict(),
        )

    def _start(self) -> dict[str, Any]:
        """What this start runs on; called by every rank."""
        hosts = self.engine.device_tensor([float(self.ranks.local == 0)])
        dist.all_reduce(hosts)
        return {
            "time": time.time(),
            "step": self.state.step,
            "world": self.ranks.world,
            "zero_stage": zero_stage(self.config),
            "hosts": int(hosts.item()),
            "versions": {"python": self.provenance["python"], **self.provenance["packages"]},
        }

    @property
    def _unwritten(self) -> OSError | None:
        """Why this rank could not write its log or its trace, if so."""
        return self.log.error or (self._profiler.error if self._profiler else None)

    def _write_comms(self, kind: type[BaseException] | None, *_: object) -> None:
        """What DeepSpeed's comms logger has counted on rank 0, when it is on. kind: of the error that ends
        the run, if so: it counts for more than one met here."""
        if dist.has_comm_data() and self.ranks.rank == 0:
            summary = dist.comms_logger.log_all(print_log=False, return_dict=True)["summary"]
            try:
                write_atomically(self.run_dir / COMMS, (json.dumps(summary, indent=1) + "\n").encode())
            except OSError:
                if kind is None:
                    raise

    def _memory_bytes(self) -> int:
        """Peak memory of this rank: of its GPU, or resident on the host where it computes on CPUs."""
        if self.engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.engine.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _description(self) -> str:
        state, data = self.state, self.recipe.data
        half = next((name for name in ("bf16", "fp16") if self.config.get(name, {}).get("enabled")), "fp32")
        where = f"going on from step {state.step}" if state.step else "new run"
        return (
            f"{self.run_dir}: {self.recipe.objective}, {self.engine.parameters / 1e6:.1f}M parameters, "
            f"{where}; {self.ranks.world} rank(s) on {self.engine.device.type}, {half}, "
            f"ZeRO {zero_stage(self.config)}, {data.bins_per_step} bins of {data.bin_tokens} tokens a step"
        )


def open_shards(folders: list[str], like: ShardSet | None = None) -> list[ShardSet]:
    """Open shard sets made alike: one tokenizer, segmenter and sentence limit (those of `like` if given).

    Raises: UserError when they differ.
    """
    shard_sets = [ShardSet.open(folder) for folder in folders]
    like = like or shard_sets[0]
    fingerprint = like.tokenizer().fingerprint
    for folder, shard_set in zip(folders, shard_sets, strict=True):
        if shard_set.tokenizer().fingerprint != fingerprint:
            raise UserError(
                f"shards {folder} were made with another tokenizer than the training shards: make them anew"
            )
        for name in ("segmenter", "max_tokens"):
            ours, theirs = getattr(shard_set.settings, name), getattr(like.settings, name)
            if ours != theirs:
                raise UserError(
                    f"shards {folder} were made with {name} {ours}, the training shards with {theirs}: "
                    "make them anew"
                )
    return shard_sets
