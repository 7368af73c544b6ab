"""One training run: data, model, engine, log and state.

Every rank makes one `TrainingRun` and calls the same methods in the same order: most of them contain
collectives.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch

from data_prep.common.errors import counted, say
from data_prep.common.files import write_atomically
from pipeline.checkpoints import loading, store
from pipeline.checkpoints.mirror import Mirror
from pipeline.checkpoints.saving import Saver
from pipeline.checkpoints.store import Meta
from pipeline.config.deepspeed_config import (
    COMMS,
    DEEPSPEED_CONFIG,
    complete_strategy,
    zero_stage,
)
from pipeline.config.schema import Recipe
from pipeline.data.loader import Step, StepLoader
from pipeline.data.plan import BinPlan, Consumed, Position
from pipeline.data.shard_sets import open_shards
from pipeline.models.factory import new_model
from pipeline.models.flops import TRAINING_FACTOR, StepArithmetic, utilisation
from pipeline.models.lora import add_lora
from pipeline.models.losses import bits_per_byte
from pipeline.parallel.agreement import AgreedError, agree, do_and_agree, facts, require_agreement
from pipeline.parallel.deepspeed_compat import require_valid
from pipeline.parallel.ranks import Ranks, join, leave
from pipeline.parallel.reduction import sum_over_ranks
from pipeline.training.changes import changes_since, regrouping
from pipeline.training.engine import NATS, Engine, Update
from pipeline.training.health import SPEEDS, Guard, Speeds
from pipeline.training.outlook import Outlook
from pipeline.training.profiler import StepProfiler
from pipeline.training.provenance import PROVENANCE, provenance
from pipeline.training.records import StepRecord, StepSums
from pipeline.training.run_lock import locked
from pipeline.training.run_log import RunLog
from pipeline.training.validation import Validation
from pipeline.training.warm_start import initialise
from pipeline.training.watchdog import STACKS, STACKS_BEFORE, Watchdog

VALIDATION_SEED = 0  # all runs share the same sample of a validation set


@dataclass
class State:
    """A run's progress: what a checkpoint restores beside weights and optimizer."""

    position: Position  # of the stream's next bin
    consumed: Consumed
    step: int = 0
    tokens: int = 0
    best: dict[str, Any] | None = None
    guard: Guard = field(default_factory=Guard)


class TrainingRun:
    """What one rank holds during a run. Use as a context manager: it closes threads, files and the group."""

    def __init__(
        self,
        recipe: Recipe,
        strategy: dict[str, Any],
        ranks: Ranks,
        joined: Callable[[], None] = lambda: None,
    ):
        """joined: called when all ranks are there, before the first collective."""
        self.recipe, self.ranks = recipe, ranks
        self.run_dir = Path(recipe.output_dir)
        self._profiler: StepProfiler | None = None
        self._unmeasured = False  # the last evaluation was not finite
        self._abandoned: set[str] = set()  # names of later checkpoints that this run did not resume from
        with ExitStack() as opened:  # closes what is open if one of these steps fails
            self._open = opened
            self._build(strategy, joined)
            self._open = opened.pop_all()

    def _build(self, strategy: dict[str, Any], joined: Callable[[], None]) -> None:
        recipe, ranks, data = self.recipe, self.ranks, self.recipe.data
        shard_sets = open_shards(data.shards)
        self._shard_sets, self.tokenizer = shard_sets, shard_sets[0].tokenizer()
        validation_sets = open_shards([data.validation], shard_sets[0]) if data.validation else []
        self.shards = [shard_set.fingerprint for shard_set in shard_sets]
        self.validation_shards = validation_sets[0].fingerprint if validation_sets else None

        self._watchdog = self._open.enter_context(
            Watchdog(self.run_dir, ranks.rank, recipe.health.hang_seconds)
        )
        device = join(ranks, recipe.health.hang_seconds)
        joined()
        self._open.callback(leave)
        do_and_agree(lambda: self._open.enter_context(locked(self.run_dir)) if ranks.rank == 0 else None)
        self._mirror: Mirror | None = None  # rank 0's
        if recipe.checkpoints.upload:
            do_and_agree(lambda: self._open_mirror() if ranks.rank == 0 else None)
        self._watchdog.heartbeat("the process group's start")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.provenance = provenance(shard_sets, validation_sets, name)
        hosts = require_agreement(facts(recipe.to_dict(), strategy, self.provenance))
        self._speeds, self._last_step = Speeds(hosts), dict.fromkeys(SPEEDS, 0.0)
        torch.manual_seed(recipe.seed)
        model = new_model(recipe, self.tokenizer, shard_sets[0].settings.to_dict())
        if recipe.init_from:
            # Rank 0 decides: a rank that does not see the run's disk must take the same branch.
            resumes = ranks.rank == 0 and bool(store.listed(self.run_dir)[0])
            if not agree(None, resumes)[0]:
                initialise(model, recipe.init_from, self.tokenizer, ranks)
                self._watchdog.heartbeat("reading init_from")
        add_lora(model, recipe.model.lora)
        config: Any = model.config
        self.model_config = json.loads(config.to_json_string(use_diff=False))
        self._arithmetic = StepArithmetic(model)
        self.config = complete_strategy(strategy, recipe, ranks.world, on_gpu=device.type == "cuda")
        require_valid(self.config)
        self.engine = Engine(model, recipe, self.config, device)
        background, on_gpu = recipe.checkpoints.background, device.type == "cuda"
        held = self._mirror.held if self._mirror else tuple
        self._saver = Saver(self.run_dir, recipe.training.keep, background, on_gpu, self._published, held)
        by_rule = recipe.model.ends == "rule"
        sizes = data.window_tokens, data.bin_tokens
        self.plan = BinPlan(shard_sets, *sizes, recipe.seed, data.weights, by_rule=by_rule)
        self.state = State(self.plan.start(), Consumed(self.plan.sources))
        self._watchdog.heartbeat("building the model")
        self.validation = None
        if validation_sets:
            sample = BinPlan(validation_sets, *sizes, VALIDATION_SEED, by_rule=by_rule)
            self.validation = Validation(
                sample, recipe.training.eval_bins, ranks, self.tokenizer.byte_lengths
            )

    def _open_mirror(self) -> None:
        self._mirror = Mirror(self.recipe.checkpoints.upload, self.run_dir, lambda text: self.log.say(text))
        if line := self._mirror.fetch():
            say(line)

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._watchdog.heartbeat("the training")
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
        # After a skipped step the weights may be bad: keep the checkpoint before as the last one.
        doubtful = self.state.guard.in_row or self._unmeasured
        return self.state.step % self.recipe.training.save_every == 0 and not doubtful

    def resume(self) -> None:
        """Resume from the newest whole checkpoint, if any, also with another number of ranks or ZeRO stage.
        Raises UserError when it is of another model or data order."""
        found = loading.agree_on_newest_whole(self.run_dir)
        if not found:
            return
        checkpoint, saved, damage = found
        self._abandoned = store.beyond(self.run_dir, checkpoint)
        ours = self._meta()
        store.require_same_run(saved, checkpoint, ours)
        if self.ranks.rank == 0:
            changed = changes_since(saved, self.recipe, self.run_dir, self.config)
            for line in (damage, *changed, regrouping(saved, ours)):
                if line:
                    say(line)
        # It was read by the first start; recipe.yaml claims nothing else.
        self.recipe = self.recipe.model_copy(update={"init_from": saved.recipe.get("init_from")})
        loading.restore(self.engine.deepspeed, checkpoint, saved, ours.world, ours.zero_stage)
        self._watchdog.heartbeat("resuming")
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

    def start(self) -> None:
        """Write the run's settings, open its log and start loading data."""
        do_and_agree(self._open_log)
        self._loader = self._open.enter_context(
            StepLoader(
                self.plan,
                self.recipe.counted_as,
                self.recipe.data.bins_per_step,
                self.ranks,
                self.tokenizer.byte_lengths,
                self.state.position,
                sentence_ends=self.recipe.data.sentence_ends,
                uploader=self.engine.uploader,
            )
        )
        self._open.push(self._write_comms)
        self.log.start(self._start_record())
        if self._mirror and self.state.step:
            self._mirror.add_earlier(store.step_name(self.state.step))
        wanted = self.recipe.log
        if wanted.profile and self.ranks.rank in wanted.profile_ranks:
            steps, folder = wanted.profile_steps(), self.run_dir / "profile"
            self._profiler = self._open.enter_context(StepProfiler(steps, folder, self.ranks.rank))
        self.log.say(self._description())
        if wanted.profile and not set(wanted.profile_ranks) & set(range(self.ranks.world)):
            there = counted(self.ranks.world, "rank")
            self.log.say(f"log.profile_ranks {wanted.profile_ranks} of {there}: no trace is written")
        self._outlook = Outlook(self.recipe, self._shard_sets, self.state.step, self.state.tokens)
        self.log.say(self._outlook.amount)
        self._watchdog.heartbeat("starting the loader")
        self._clock = time.perf_counter()

    def _open_log(self) -> None:
        if self.ranks.rank == 0:
            self._write_settings()
        log = RunLog(self.run_dir, self.recipe, self.ranks.rank, self.state.step)
        self.log = self._open.enter_context(log)

    def _write_settings(self) -> None:
        """Write the files that describe this run (rank 0 only)."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        store.remove_unfinished(self.run_dir)
        stacks = self.run_dir / STACKS
        if stacks.is_dir():  # of an earlier start
            shutil.rmtree(self.run_dir / STACKS_BEFORE, ignore_errors=True)
            stacks.rename(self.run_dir / STACKS_BEFORE)
        write_atomically(self.run_dir / "recipe.yaml", self.recipe.to_yaml().encode())
        for name, values in ((DEEPSPEED_CONFIG, self.config), (PROVENANCE, self.provenance)):
            write_atomically(self.run_dir / name, (json.dumps(values, indent=1) + "\n").encode())
        self.tokenizer.save(self.run_dir / "tokenizer")

    def next_step(self) -> Step:
        if self._profiler:
            self._profiler.begin(self.state.step + 1)
        return self._loader.next_step()

    def compute(self, step: Step, stop_wanted: bool) -> StepSums:
        """Forward and backward, then the step's one all-reduce of figures, of the request to stop, of write
        errors and of checkpoints in flight. Every rank gets the same sums, by name.

        Raises AgreedError on every rank when one could not write its records or trace of the step before, or
        its part of a checkpoint.
        """
        nats = self.engine.compute(step)
        scored = [batch for batch in step.batches if batch.scored]
        counts = [self._arithmetic.count(batch) for batch in scored]
        computed = sum(all_ for _, all_ in counts)
        figures = {
            "text_bytes": step.text_bytes,
            "sentences": sum(batch.sentences for batch in scored),
            "padding": sum(padding for padding, _ in counts),
            "computed": computed,
            "bins": len(scored),
            "bins_digest": step.digest,
            "stop": stop_wanted,
            "saving": self._saver.busy,
            "unwritten": self._unwritten is not None,
        }
        by_rank = {"wait_seconds": step.wait_seconds, **self._last_step}
        sums = StepSums(**sum_over_ranks(self.ranks, NATS, nats, figures, by_rank))
        if sums.unwritten:  # every rank knows that there is an error; `agree` says whose and which
            says = f"after step {self.state.step}: rank {{rank}} cannot write its log or trace: {{message}}; "
            says += "checkpoints are whole: make room and start the same command again"
            self._saver.finish()
            agree(self._unwritten, says=says)
        if self._saver.in_flight and not sums.saving:
            self._saver.proceed()
        own = step.wait_seconds + self.engine.own_seconds()
        self._last_step = dict(zip(SPEEDS, (own, computed, self.engine.collectives.take()), strict=True))
        return sums

    def update(self, step: Step, sums: StepSums) -> None:
        """Apply the gradients, advance the state, and log the step.

        A step that the guard rejects is not applied, on any rank; its data counts as consumed. Raises
        AgreedError on every rank after `health.max_skips` such steps in a row.
        """
        state, health = self.state, self.recipe.health
        loss = sums.objective / step.targets_all
        progress = self.recipe.training.progress(state.step + 1, state.tokens + step.tokens_all)
        update = self.engine.update(
            self.recipe.schedule.factor(progress),
            state.guard.bad_loss(loss, health),
            state.guard.norm_limit(health),
        )
        # With dynamic loss scaling gradients overflow by design: DeepSpeed skips and lowers the scale.
        rescaled = self.engine.scales_loss and math.isfinite(loss) and not math.isfinite(update.grad_norm)
        if not rescaled:
            state.guard.record(loss, update.grad_norm, update.skipped, health)
        state.step += 1
        state.tokens += step.tokens_all
        state.position = step.position
        state.consumed.add(step.bins_all)
        before, self._clock = self._clock, time.perf_counter()
        record = self._step_record(step, sums, loss, update, self._clock - before)
        self.log.step(record)
        if line := self._outlook.after(state.step, state.tokens):
            self.log.say(line)
        if self._profiler:
            self._profiler.end(state.step)
        self._watchdog.heartbeat(f"step {state.step}")
        if record.slow:
            self.log.say(record.slow)
        if update.skipped and not rescaled:
            self.log.say(f"step {state.step:>7}  skipped on all ranks: {update.skipped}")
            if state.guard.in_row >= health.max_skips:
                skips = counted(state.guard.in_row, "step in a row was", "steps in a row were")
                skips += " skipped (health.max_skips)"
                raise self._diverged(f"{update.skipped}; {skips}")

    def _diverged(self, why: str) -> AgreedError:
        """The error that ends a run whose weights are bad. It names the last checkpoint from before them: a
        later step was accepted, or its own evaluation was finite."""
        self._saver.finish()
        state, steps = self.state, store.steps_of_whole(self.run_dir)
        best = state.best["step"] if state.best else None
        good = [step for step in steps if step < state.step - state.guard.in_row or step == best]
        bad = [store.step_name(step) for step in steps if step > max(good, default=-1)]
        advice = "there is no checkpoint: start again"
        if good:
            remove = f"remove the later ones ({', '.join(bad)}) and " if bad else ""
            advice = f"the last good checkpoint is {store.step_name(max(good))}: {remove}start again"
        elif bad:
            advice = f"no checkpoint before it ({', '.join(bad)} may be bad): start another --output_dir"
        return AgreedError(f"step {state.step}: {why}; {advice} with a lower --optimizer.lr")

    def _step_record(
        self, step: Step, sums: StepSums, loss: float, update: Update, seconds: float
    ) -> StepRecord:
        needed = TRAINING_FACTOR * (sums.computed - sums.padding) / self.ranks.world  # of one device
        waits = sums.wait_seconds
        return StepRecord(
            step=self.state.step,
            epoch=max(place.epoch for place in self.state.position.places),
            tokens=self.state.tokens,
            loss=loss,
            bits_per_byte=bits_per_byte(sums.nats, sums.text_bytes),
            token_nll=sums.token_nll,
            end_nll=sums.end_nll,
            stop_nll=sums.stop_nll,
            kl=sums.kl / sums.sentences if sums.kl else None,
            targets=step.targets_all,
            bytes=int(sums.text_bytes),
            bins=int(sums.bins),
            bins_digest=int(sums.bins_digest),
            tokens_per_second=step.tokens_all / seconds,
            padding_share=sums.padding / sums.computed,
            data_wait_seconds=sum(waits) / len(waits),
            data_wait_max_seconds=max(waits),
            data_wait_rank=waits.index(max(waits)),
            **self._speeds.figures(sums),
            grad_norm=update.grad_norm,
            lr=update.lr,
            skips=self.state.guard.skips,
            skipped=update.skipped,
            memory_bytes=self.engine.memory_bytes(),
            operations=int(TRAINING_FACTOR * sums.computed),
            mfu=utilisation(needed, seconds, self.engine.device),
            seconds=seconds,
            time=time.time(),
        )

    def evaluate(self) -> None:
        """Measure on the validation sample, log the figures, and keep the best."""
        figures, best = self.validation.run(self.engine), self.state.best
        measured = figures["bits_per_byte"]
        self._unmeasured = not math.isfinite(measured)
        is_best = not self._unmeasured and (best is None or measured < best["bits_per_byte"])
        if is_best:
            self.state.best = {"step": self.state.step, "bits_per_byte": measured}
        seconds = time.perf_counter() - self._clock
        self.log.evaluation({"step": self.state.step, **figures, "best": is_best, "seconds": seconds})
        self._watchdog.heartbeat("an evaluation")
        self.engine.collectives.take()  # of no step
        self._clock = time.perf_counter()  # not part of the next step's time

    def save(self, wait: bool) -> None:
        """Start a checkpoint, which will become current; then the oldest is removed. wait: until then.

        Raises AgreedError on every rank when the weights are not finite, or one cannot write.
        """
        if not all(agree(None, self.engine.weights_are_finite())):
            raise self._diverged("the weights are not finite, nothing is saved")
        if self.finished and self._unmeasured:
            raise self._diverged("the validation loss is not finite, nothing is saved")
        self._saver.save(self.engine.deepspeed, self._meta(), self.log.flush_to_disk, self._abandoned)
        self._abandoned.discard(store.step_name(self.state.step))
        if wait:
            self._saver.finish()
        self._watchdog.heartbeat("a save")
        self.engine.collectives.take()
        self._clock = time.perf_counter()

    def _published(self, step: int, stall: float, seconds: float) -> None:
        self.log.save({"step": step, "save_seconds": stall, "write_seconds": seconds})
        if self._mirror:
            self._mirror.add(store.step_name(step))

    def finish_uploads(self, seconds: float = math.inf) -> None:
        """Wait until the checkpoints are uploaded, and log which are not. A collective."""
        end = time.monotonic() + seconds
        while self.recipe.checkpoints.upload:
            done = self._mirror is None or self._mirror.wait(5.0) or time.monotonic() > end
            self._watchdog.heartbeat("a look at the uploads")
            if all(agree(None, done)):
                break
        if self._mirror and (line := self._mirror.missing()):
            self.log.say(line)

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

    def _start_record(self) -> dict[str, Any]:
        """The line of starts.jsonl (a collective)."""
        return {
            "time": time.time(),
            "step": self.state.step,
            "world": self.ranks.world,
            "zero_stage": zero_stage(self.config),
            "hosts": sum(agree(None, self.ranks.local == 0)),
            "versions": {"python": self.provenance["python"], **self.provenance["packages"]},
        }

    @property
    def _unwritten(self) -> OSError | None:
        """The error that kept this rank from writing its log or trace."""
        return self.log.error or (self._profiler.error if self._profiler else None)

    def _write_comms(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what DeepSpeed's comms logger has counted on rank 0, if it is on. kind: of the error that
        ends the run; it takes precedence over an error of writing."""
        if dist.has_comm_data() and self.ranks.rank == 0:
            summary = dist.comms_logger.log_all(print_log=False, return_dict=True)["summary"]
            try:
                write_atomically(self.run_dir / COMMS, (json.dumps(summary, indent=1) + "\n").encode())
            except OSError:
                if kind is None:
                    raise

    def _description(self) -> str:
        state, data = self.state, self.recipe.data
        half = next((name for name in ("bf16", "fp16") if self.config.get(name, {}).get("enabled")), "fp32")
        where = f"resuming at step {state.step}" if state.step else "new run"
        muon = self.engine.by_muon
        return (
            f"{self.run_dir}: {self.recipe.objective}, {self.engine.parameters / 1e6:.1f}M parameters, "
            f"{f'{muon} weights by Muon, ' if muon else ''}{where}; "
            f"{counted(self.ranks.world, 'rank')} on {self.engine.device.type}, {half}, "
            f"ZeRO {zero_stage(self.config)}, {counted(data.bins_per_step, 'bin')} of "
            f"{counted(data.bin_tokens, 'token')} a step"
        )
