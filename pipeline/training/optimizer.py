"""AdamW and Muon with steps that can be vetoed, and parameter groups by decay, learning rate and rule.

The order of groups depends on model and recipe only, so every rank and every restart makes the same.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.common.errors import UserError
from pipeline.config.schema import OptimizerRecipe
from pipeline.models.lora import is_adapter
from pipeline.training.muon import MOMENTUM, Matrices, hidden_matrices

EMA = "ema"  # the key of a weight's running average among the optimizer's states


class AdamW(torch.optim.AdamW):
    """torch's AdamW with a veto: a vetoed step changes no weight, moment or step counter. Groups whose `muon`
    is not 0 are updated by Muon (`muon.py`) instead.

    DeepSpeed calls `step` once per group and has the gradient's global norm by then. It drops most steps with
    a non-finite norm itself, but does not check the loss or spikes.

    ema: decay of a running average of the weights. It is kept beside the moments (`EMA`), so that it is
    partitioned, offloaded, saved and restored like them. momentum: of Muon.
    """

    def __init__(
        self, *arguments: Any, ema: float | None = None, momentum: float = 0.0, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.ema, self.momentum = ema, momentum
        self.veto: Callable[[], bool] = lambda: False
        # By id of a group's tensor: where its matrices are. Without ZeRO each tensor is a weight.
        self.matrices: dict[int, Matrices] = {}
        self.orthogonalised = 0  # weights that Muon has updated, on all ranks

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        first_weights = {p: p.clone() for p, _ in moving if self.ema is not None and EMA not in self.state[p]}
        if self.veto():
            # DeepSpeed reads the moments after its first step, applied or not.
            for p, group in moving:
                if not self.state[p]:
                    average = {EMA: first_weights[p]} if p in first_weights else {}
                    self.state[p] = {**_first_state(p, group), **average}
            return None
        self._place_counters()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            answer = super().step(closure)
        finally:
            self.param_groups = groups
        for p, group in moving:
            if group.get("muon"):
                self._muon(p, group)
        for p, weight in first_weights.items():
            self.state[p][EMA] = weight
        for p, _ in moving if self.ema is not None else ():
            self.state[p][EMA].lerp_(p, 1 - self.ema)
        return answer

    def _muon(self, p: Tensor, group: dict[str, Any]) -> None:
        gradient, state = p.grad, self.state[p]
        assert gradient is not None
        if MOMENTUM not in state:
            state.update(_first_state(p, group))
        state["step"] += 1
        momentum = state[MOMENTUM].lerp_(gradient, 1 - self.momentum)
        matrices = self.matrices.get(id(p)) or Matrices.whole(p, group["muon"])
        update = matrices.orthogonal(gradient.lerp(momentum, self.momentum))
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        self.orthogonalised += matrices.weights

    def _place_counters(self) -> None:
        """The fused update needs the step counter beside the weight, and a checkpoint may give it back on
        the CPU."""
        for group in self.param_groups:
            for p in group["params"] if group["fused"] else ():
                if "step" in self.state[p] and self.state[p]["step"].device != p.device:
                    self.state[p]["step"] = self.state[p]["step"].to(p.device)


def _first_state(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The states of a weight before its first step."""
    on_device = group["fused"] or group["capturable"]
    step = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
    moments = (MOMENTUM,) if group.get("muon") else ("exp_avg", "exp_avg_sq")
    # torch's AdamW reads the counter of every state that it loads.
    return {"step": step, **{name: torch.zeros_like(p) for name in moments}}


def new_optimizer(
    model: nn.Module, recipe: OptimizerRecipe, ema: float | None = None
) -> tuple[AdamW, list[float]]:
    """The optimizer of a recipe, and each group's factor of its learning rate."""
    groups = parameter_groups(model, recipe)
    scales = [group.pop("lr_scale") for group in groups]
    optimizer = AdamW(
        groups,
        lr=recipe.lr,
        betas=tuple(recipe.betas),
        eps=recipe.eps,
        ema=ema,
        momentum=recipe.momentum,
        fused=True,
    )
    return optimizer, scales


def parameter_groups(model: nn.Module, recipe: OptimizerRecipe) -> list[dict[str, Any]]:
    """Groups, each with `params`, `weight_decay`, `lr_scale` (a factor of the recipe's rate) and `muon`: 0,
    or how many matrices each of its weights is.

    Weight decay applies to matrices only: not to biases, norms, embeddings or a head tied to one. Frozen
    parameters (`optimizer.parts`) require no gradients and are in no group.

    Raises: UserError when a part is not in the model, or nothing is left to train.
    """
    scales = _scales(model, recipe.parts)
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    hidden = hidden_matrices(model) if recipe.kind == "muon" else {}
    kinds = [(True, 0), (False, 0), *((True, count) for count in sorted(set(hidden.values())))]
    groups: dict[tuple[float, bool, int], list[nn.Parameter]] = {
        (scale, *kind): [] for scale in dict.fromkeys([1.0, *scales.values()]) for kind in kinds
    }
    for parameter in model.parameters():
        scale = scales.get(id(parameter), 1.0)
        if scale == 0:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:  # weights with adapters do not learn
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            groups[scale, decays, hidden.get(id(parameter), 0)].append(parameter)
    found = [
        {
            "params": parameters,
            "weight_decay": recipe.weight_decay if decays else 0.0,
            "lr_scale": scale,
            "muon": muon,
        }
        for (scale, decays, muon), parameters in groups.items()
        if parameters
    ]
    if not found:
        raise UserError("recipe: optimizer.parts freezes every parameter: nothing is left to train")
    return found


def _scales(model: nn.Module, parts: dict[str, dict[str, Any]]) -> dict[int, float]:
    """Learning rate scale by id of each parameter that a part names; 0 is frozen. The longest name wins.
    Adapters are parts of `lora`, not of the layers that they are in."""
    found = model.named_parameters(remove_duplicate=False)
    names = [(f"lora.{name}" if is_adapter(name) else name, id(p)) for name, p in found]
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
