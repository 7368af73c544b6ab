"""Products of linear layers in generation on a CPU: a row has the same bits beside any other rows.

The kernels for one to three rows add in another order than those for more. So small matrices are
multiplied by four rows at least, the last one repeated, and large ones by oneDNN's kernels, which add alike
for any number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_ROWS = 4
NARROW = 16  # outputs up to which kernels differ by rows modulo 4
PACKED = 1 << 17  # entries of a matrix from which a call of oneDNN, 10 µs more, is worth it
LONG = 1024  # inputs above which oneDNN adds otherwise for a single row


def widened(x: Tensor, rows: int) -> Tensor:
    """`x` [n, …] and its last row again, up to `rows` rows."""
    n = len(x)
    if n >= rows:
        return x
    if n == 1:
        return x.expand(rows, *x.shape[1:])
    return torch.cat([x, x[-1:].expand(rows - n, *x.shape[1:])])


class Product:
    """x [..., in] → x · weightᵀ + bias [..., out], float32. least: rows below which it repeats one."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        # Copies: a loaded tensor may be a view of its file.
        self._bias = None if bias is None else bias.detach().clone()
        self._packed: Tensor | None = None
        self._narrow = len(weight) < NARROW
        self.least = LEAST_ROWS
        if weight.numel() >= PACKED and torch.backends.mkldnn.is_available():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            self.least = 1 if weight.shape[1] <= LONG else 2
        else:
            weight = (
                weight.clone()
                if self._narrow
                else weight.t().clone(memory_format=torch.contiguous_format).t()
            )
        self._weight: Any = None if self._packed is not None else weight

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            return self(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        rows = x.shape[0]
        least = -(-rows // LEAST_ROWS) * LEAST_ROWS if self._narrow else self.least
        return self._of(widened(x, least))[:rows] if 0 < rows < least else self._of(x)

    def _of(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return F.linear(x, self._weight, self._bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self._bias, "none", [], "")


def use_product(module: nn.Linear) -> None:
    """Let a layer in evaluation multiply by a `Product`, in place. Its weight stays as it is."""
    product, forward = Product(module.weight.detach(), module.bias), module.forward

    def by_product(x: Tensor, *more: object, **named: object) -> Tensor:
        return forward(x, *more, **named) if more or named else product(x)

    vars(module).update(product=product, forward=by_product)


def use_joined_product(modules: list[nn.Linear]) -> None:
    """The same for layers of one input, side by side, which are called by `step.linear` only."""
    weight = torch.cat([module.weight.detach() for module in modules])
    biases = [module.bias for module in modules]
    bias = None if biases[0] is None else torch.cat([one.detach() for one in biases])
    vars(modules[0])["joined_product"] = Product(weight, bias)


def least_rows(*products: object) -> int:
    """Rows below which one of them repeats a row."""
    return max(getattr(product, "least", 1) for product in products)
