"""The training engine: the optimizer and DeepSpeed around a model, and one optimizer step over micro-batches.

A step's loss is the sum of the objective over all its bins, divided by its number of targets, both global.
DeepSpeed divides every micro-batch by the number of micro-batches and averages over ranks. Each micro-batch
is multiplied by both first, so that the update does not depend on the number of ranks.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from data_prep.common.errors import UserError, counted
from pipeline.config.deepspeed_config import zero_stage
from pipeline.config.schema import Recipe
from pipeline.data.batch import Batch
from pipeline.data.loader import Step
from pipeline.data.upload import Uploader
from pipeline.models.folders import parameter_count
from pipeline.models.layers import checkpoint_layers, transformer_layers
from pipeline.models.losses import LossSums
from pipeline.parallel.agreement import AgreedError
from pipeline.parallel.deepspeed_compat import (
    fp32_parts,
    norm_before_step,
    silence_timers,
    take_flat_gradients,
    zero_padding,
)
from pipeline.parallel.waiting import Collectives, clock
from pipeline.training.muon import place_matrices
from pipeline.training.optimizer import EMA, new_optimizer

COMPILE_BACKEND = "inductor"  # of torch.compile
NATS = ("objective", "token_nll", "end_nll", "stop_nll", "kl")  # what `Engine.compute` and `evaluate` sum


class Update(NamedTuple):
    """What became of a step."""

    grad_norm: float  # before clipping, of the gradient averaged over all ranks
    lr: float
    skipped: str | None  # why it was not applied


class Engine:
    """A DeepSpeed engine with our optimizer, and the arithmetic of one step."""

    def __init__(self, model: nn.Module, recipe: Recipe, config: dict[str, Any], device: torch.device):
        self.device = device
        self.config = config
        self.objective = recipe.objective
        self.peak_lr = recipe.optimizer.lr
        self.parameters = parameter_count(model)
        # fp16 with dynamic loss scaling overflows by design: DeepSpeed skips the step and lowers the scale.
        self.scales_loss = bool(config.get("fp16", {}).get("enabled"))
        optimizer, self._lr_scales = new_optimizer(model, recipe.optimizer, recipe.training.ema)
        muon = {id(p): group["muon"] for group in optimizer.param_groups for p in group["params"]}
        self.by_muon = sum(count > 0 for count in muon.values())
        if recipe.optimizer.kind == "muon" and not self.by_muon:
            raise AgreedError(
                "optimizer.kind muon: the model has no hidden matrix that is trained: use adamw"
            )
        # DeepSpeed starts its backward pass (timers, swapping from disks) by hooks on output tensors, which
        # it finds in dicts but not in dataclasses.
        model.register_forward_hook(lambda _model, _inputs, losses: vars(losses))
        if config.get("flops_profiler", {}).get("enabled"):
            silence_timers()
        layers = layers_to_compile(model, zero_stage(config)) if recipe.training.compile else []
        with redirect_stdout(None):  # its optimizer for stage 1 in bf16 prints this machine's memory
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        take_flat_gradients(self.deepspeed.optimizer)
        zero_padding(self.deepspeed)
        if self.by_muon and zero_stage(config):
            hidden = {weight: count for weight, count in muon.items() if count}
            optimizer.matrices = place_matrices(fp32_parts(self.deepspeed.optimizer), hidden, device)
        self._optimizer = optimizer
        self.uploader = Uploader(device)
        self.collectives = Collectives(device)
        self._forwards: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._own_seconds = 0.0
        if layers:
            compile_layers(layers)
        if device.type == "cuda":
            for module in _timed_modules(model, zero_stage(config), layers):
                module.forward = self._timed(module.forward)
        if recipe.training.activation_checkpointing:
            checkpoint_layers(model)

    def compute(self, step: Step) -> Tensor:
        """Forward and backward over the step's micro-batches; gradients stay in the engine until `update`.

        Returns float64 [5]: this rank's sums of `NATS`.
        """
        self.deepspeed.train()
        self._forwards.clear()
        began, waited = clock(), self.collectives.seconds
        # DeepSpeed takes means over ranks and micro-batches: undo that, and divide by the step's targets.
        scale = dist.get_world_size() * len(step.batches) / step.targets_all
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        for number, (batch, seed) in enumerate(zip(step.batches, step.seeds, strict=True)):
            batch = step.batches[number] = batch.to(self.device)
            # Dropout depends on the bin alone, so that resumed runs and other world sizes agree.
            torch.manual_seed(seed)
            losses = LossSums(**self.deepspeed(batch))
            self.deepspeed.backward(losses.objective * scale)
            sums += _nats(losses)
            self.uploader.learn(batch)
            if number + 1 < len(step.batches):
                self.deepspeed.step()  # not a boundary: DeepSpeed only counts the micro-batch
        self._own_seconds = clock() - began - (self.collectives.seconds - waited)
        return sums

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            answer = forward(*arguments, **options)
            events[1].record()
            if torch.is_grad_enabled():
                self._forwards.append(events)
            return answer

        return call

    def own_seconds(self) -> float:
        """Seconds that the last `compute` took on this rank, without waiting for others. Call it after the
        device has finished.

        On CPUs all but the collectives. On a GPU the forward passes of the modules that hold no collective
        (`_timed_modules`).
        """
        if self.device.type != "cuda":
            return self._own_seconds
        return sum(start.elapsed_time(end) for start, end in self._forwards) / 1000

    def update(self, lr_factor: float, skip: str | None = None, norm_limit: float = math.inf) -> Update:
        """Apply the step with lr = peak · `lr_factor`, unless it is to be skipped.

        skip: a reason to skip it, whatever its gradient. norm_limit: the largest gradient norm applied.
        All ranks have the same norm and decide alike. A skipped step changes no weight, moment or counter of
        the optimizer; its gradients are dropped.
        """
        lr = self.peak_lr * lr_factor
        for group, scale in zip(self.deepspeed.optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale
        norm = math.nan
        if zero_stage(self.config) == 0:
            # Plain data parallel: in fp32 DeepSpeed clips but does not return the norm.
            gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))

        asked = False  # each look at a norm on a GPU waits for it

        def veto() -> bool:
            nonlocal norm, asked
            if not asked and (known := norm_before_step(self.deepspeed.optimizer)) is not None:
                norm = known
            asked = True
            return skip is not None or not math.isfinite(norm) or norm > norm_limit

        self._optimizer.veto, self._optimizer.orthogonalised = veto, 0
        self.deepspeed.step()
        if not asked and (known := self.deepspeed.get_global_grad_norm()) is not None:
            norm = float(known)
        if skip is None and not math.isfinite(norm):
            skip = f"the gradient's norm is {norm}"
        elif skip is None and norm > norm_limit:
            skip = f"the gradient's norm {norm:.4g} is above {norm_limit:.4g}"
        done = self._optimizer.orthogonalised
        if skip is None and done != self.by_muon and not self.scales_loss:
            raise AgreedError(f"Muon handled {done} of {counted(self.by_muon, 'weight')}")
        return Update(norm, lr, skip)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Tensor:
        """Forward only. Returns the same float64 [5] as `compute`."""
        self.deepspeed.eval()
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        for batch in batches:
            batch = self.uploader.prepare(batch).to(self.device)
            sums += _nats(LossSums(**self.deepspeed(batch)))
        return sums

    @torch.no_grad()
    def weights_are_finite(self) -> bool:
        """Whether this rank's weights are, their fp32 copies and their running averages."""
        module = self.deepspeed.module
        held = [getattr(weight, "ds_tensor", weight) for weight in module.parameters()]
        for weight, state in self._optimizer.state.items():
            held += [weight, state.get(EMA, weight)]
        finite = defaultdict(list)  # by device: each `bool` waits for one
        for tensor in (*held, *module.buffers()):
            finite[tensor.device].append(tensor.isfinite().all())
        return all(bool(torch.stack(flags).all()) for flags in finite.values())

    def memory_bytes(self) -> int:
        """This rank's peak memory: of its GPU, or resident memory on CPUs."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _timed_modules(model: nn.Module, stage: int, compiled: list[nn.Module]) -> list[nn.Module]:
    """Modules whose forward passes show how fast a GPU is: the model; under ZeRO-3, which gathers weights
    between modules, the compiled layers, or all modules with weights and without children."""
    if stage != 3:
        return [model]
    if compiled:
        return compiled
    leaves = (module for module in model.modules() if not any(module.children()))
    return [module for module in leaves if any(True for _ in module.parameters())]


def layers_to_compile(model: nn.Module, stage: int) -> list[nn.Module]:
    """The transformer layers of a model, prepared for DeepSpeed; call it before `deepspeed.initialize`.

    Only these are compiled, each `forward` separately, with dynamic row counts. The rest of a step is the
    loss, attention (outside of the graph) and host arithmetic on a batch's layout, which breaks graphs. Under
    ZeRO-3 every layer becomes a leaf module of DeepSpeed: one hook around the compiled forward gathers all
    its weights, where hooks inside would break the graph. No collective runs in compiled code, so ranks may
    compile at different times.

    Raises: UserError when torch.compile has no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if COMPILE_BACKEND == "inductor" and not (shutil.which(compiler) or shutil.which("clang++")):
        raise UserError(f"training.compile needs a C++ compiler, and there is no {compiler}: install one")
    layers = transformer_layers(model)
    if stage == 3:
        set_z3_leaf_modules(model, sorted({type(layer) for layer in layers}, key=lambda t: t.__name__))
    return layers


def compile_layers(layers: list[nn.Module]) -> None:
    """Compile the `forward` of each layer for any number of rows."""
    # torch counts versions of a function: layers of a class share it. Beyond the limit it runs uncompiled.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(layers))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=COMPILE_BACKEND)


def _nats(losses: LossSums) -> Tensor:
    """float64 [5]: `NATS` of one batch."""
    return torch.stack([getattr(losses, name).detach().double() for name in NATS])
