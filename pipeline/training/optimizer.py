"""AdamW whose steps can be vetoed, and its parameter groups by weight decay and learning rate.

The order of groups depends on model and recipe only, so every rank and every restart makes the same.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from data_prep.common.errors import UserError
from pipeline.config.schema import OptimizerRecipe

EMA = "ema"  # the key of a weight's running average among the optimizer's states


class AdamW(torch.optim.AdamW):
    """torch's AdamW with a veto: a vetoed step changes no weight, moment or step counter.

    DeepSpeed calls `step` once per group and has the gradient's global norm by then. It drops most steps with
    a non-finite norm itself, but does not check the loss or spikes.

    ema: decay of a running average of the weights. It is kept beside the moments (`EMA`), so that it is
    partitioned, offloaded, saved and restored like them.
    """

    def __init__(self, *arguments: Any, ema: float | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self.ema = ema
        self.veto: Callable[[], bool] = lambda: False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        first_weights = {p: p.clone() for p in moving if self.ema is not None and EMA not in self.state[p]}
        if not self.veto():
            self._place_counters()
            answer = super().step(closure)
            for p, weight in first_weights.items():
                self.state[p][EMA] = weight
            for p in moving if self.ema is not None else ():
                self.state[p][EMA].lerp_(p, 1 - self.ema)
            return answer
        # DeepSpeed reads the moments after its first step, applied or not.
        for group in self.param_groups:
            on_device = group["fused"] or group["capturable"]
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    step = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    average = {EMA: first_weights[p]} if p in first_weights else {}
                    self.state[p] = {"step": step, **moments, **average}
        return None

    def _place_counters(self) -> None:
        """The fused update needs the step counter beside the weight, and a checkpoint may give it back on
        the CPU."""
        for group in self.param_groups:
            for p in group["params"] if group["fused"] else ():
                if "step" in self.state[p] and self.state[p]["step"].device != p.device:
                    self.state[p]["step"] = self.state[p]["step"].to(p.device)


def parameter_groups(model: nn.Module, recipe: OptimizerRecipe) -> list[dict[str, Any]]:
    """Groups for AdamW, each with `params`, `weight_decay` and `lr_scale` (a factor of the recipe's rate).

    Weight decay applies to matrices only: not to biases, norms, embeddings or a head tied to one. Frozen
    parameters (`optimizer.parts`) require no gradients and are in no group.

    Raises: UserError when a part is not in the model, or nothing is left to train.
    """
    scales = _scales(model, recipe.parts)
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for scale in dict.fromkeys([1.0, *scales.values()]):
        groups[scale, True], groups[scale, False] = [], []
    for parameter in model.parameters():
        scale = scales.get(id(parameter), 1.0)
        if scale == 0:
            parameter.requires_grad_(False)
        else:
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            groups[scale, decays].append(parameter)
    found = [
        {"params": parameters, "weight_decay": recipe.weight_decay if decays else 0.0, "lr_scale": scale}
        for (scale, decays), parameters in groups.items()
        if parameters
    ]
    if not found:
        raise UserError("recipe: optimizer.parts freezes every parameter: nothing is left to train")
    return found


def _scales(model: nn.Module, parts: dict[str, dict[str, Any]]) -> dict[int, float]:
    """Learning rate scale by id of each parameter that a part names; 0 is frozen. The longest name wins."""
    names = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    scales: dict[int, tuple[float, str]] = {}
    used = {part: False for part in parts}
    for name, parameter in names:
        fitting = [
            (len(prefix), part) for part in parts for prefix in _prefixes(part) if _is_in(name, prefix)
        ]
        for _, part in fitting:
            used[part] = True
        part = max(fitting)[1] if fitting else ""
        settings = parts.get(part, {})
        scale = 0.0 if settings.get("freeze") else float(settings.get("lr_scale", 1.0))
        before, other = scales.setdefault(parameter, (scale, name))
        if before != scale:
            raise UserError(
                f"recipe: optimizer.parts: {other} and {name} are one tied matrix, and get different "
                "settings: name both alike"
            )
    for part, was_used in used.items():
        if not was_used:
            known = {".".join(name.split(".")[:depth]) for name, _ in names for depth in range(1, 9)}
            near = difflib.get_close_matches(part, sorted(known), n=1)
            shortest = sorted({name.split(".")[0] for name, _ in names})
            hint = f"did you mean {near[0]}?" if near else f"its parts are {', '.join(shortest)}"
            raise UserError(f"recipe: optimizer.parts: {part} is no part of this model: {hint}")
    return {parameter: scale for parameter, (scale, _) in scales.items()}


def _prefixes(part: str) -> list[str]:
    """`a.layers.0-2` → `a.layers.0`, `a.layers.1`, `a.layers.2`."""
    ranged = re.fullmatch(r"(.*\.)?(\d+)-(\d+)(\..*)?", part)
    if not ranged:
        return [part]
    front, first, last, rest = ranged.groups(default="")
    return [f"{front}{number}{rest}" for number in range(int(first), int(last) + 1)]


def _is_in(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
