"""What an H200 should give by arithmetic: training and writing, beside what was measured.

Training: one forward and backward pass on tensors without memory. An operator takes the time of its matrix
product or of its passes over memory, whichever is longer; launches overlap with them.

Writing: one call of a part of the model reads its weights once and its cache once, and starts two kernels
for every linear layer and attention (the product, and what is fused into one kernel after it), as in a CUDA
graph. `hosted` adds what the host launches between the graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.costs.benchmark import OPT_VOCABULARY, published_opt
from pipeline.costs.inspect import AsOnCuda, DryRun
from pipeline.costs.sized_recipe import sized_recipe
from pipeline.models import flops

PAIRS = {"sllm-125m-h1": "opt-125m", "sllm-1.3b-h1": "opt-1.3b"}
BATCHES = (1, 64)
CONTEXT, SENTENCE_TOKENS = 256, 11
BYTES = 2  # bf16
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0}  # the place of the left factor
_FREE = ("aten::empty", "aten::new_empty", "prim::", "aten::detach")  # no kernel
_GATHERS = ("aten::index_select", "aten::embedding", "aten::gather")
_SCATTERS = ("aten::scatter_add_", "aten::scatter_", "aten::index_add_", "aten::index_put_")
# Launches by the host: ours in a step of the decoder, its two graphs included, at most (a test holds it); and
# in a step of transformers 5.23's `generate` with a static cache, counted by a dispatch mode on a CPU.
LAUNCHES = {"ours": 20, "static": 38}
# A fact of the check `machine` → the ceiling that it measures, and its unit.
_CEILINGS = {
    "gemm_tflops": ("gemm", 1e12),
    "copy_gb_s": ("copy", 1e9),
    "kernel_in_graph_us": ("kernel", 1e-6),
    "launch_us": ("launch", 1e-6),
}


@dataclass(frozen=True)
class Card:
    """Ceilings: FLOP/s of a matrix product, bytes/s of a copy (read and written), seconds of the smallest
    kernel in a CUDA graph and of a launch by the host; and the published peak, of which MFU is a share."""

    name: str = "H200"
    gemm: float = 790e12
    copy: float = 4.3e12
    kernel: float = 2e-6
    launch: float = 4e-6
    peak: float = 989e12

    @staticmethod
    def measured(facts: Iterable[dict[str, Any]]) -> Card:
        """An H200's ceilings, those that a run has measured in place of the usual ones."""
        found: dict[str, Any] = {}
        for fact in facts:
            for key, (name, factor) in _CEILINGS.items():
                if key in fact:
                    found[name] = fact[key] * factor
        return Card(**found)


class DeviceTime(TorchDispatchMode):
    """Adds up what the operators inside the block would take on a card.

    seconds: by operator. products: of matrix products alone. saved: what one kernel in place of all operators
    on rows of `vocabulary` logits would save; it reads them once and writes their gradient once.
    """

    def __init__(self, card: Card, vocabulary: int = 0):
        super().__init__()
        self.card, self.seconds, self.products = card, Counter[str](), 0.0
        self.saved, self._vocabulary = 0.0, vocabulary

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func.is_view or name.startswith(_FREE):
            return out
        written = _bytes(out)
        if name in _GATHERS:  # reads what it writes, not all of its table
            moved = 2 * written
        elif name in _SCATTERS:  # changes as much as it is given
            moved = 2 * _bytes(args[1:])
        else:
            moved = written + _bytes((args, kwargs))
        seconds = moved / self.card.copy
        logits = any(x.ndim == 2 and x.shape[-1] == self._vocabulary for x in _tensors((args, out)))
        if product := _product(name, args, out):
            self.products += 2 * product / self.card.gemm
            seconds = max(seconds, 2 * product / self.card.gemm)
            if any(x.shape[-1:] == (self._vocabulary,) for x in _tensors(out)):
                self.saved -= 2 * written / self.card.copy
        elif logits:
            self.saved += seconds
        self.seconds[name] += seconds
        return out


def _product(name: str, args: Any, out: Any) -> float:
    """Multiply-adds of a matrix product, or of attention: both products, half of all pairs (causal)."""
    if name in _PRODUCTS:
        return out.numel() * args[_PRODUCTS[name]].shape[-1]
    if "scaled_dot_product" not in name:
        return 0
    backward = "backward" in name
    query, key = args[1:3] if backward else args[:2]
    return query.numel() * key.shape[-2] * (2.5 if backward else 1)


def _tensors(values: Any) -> list[Tensor]:
    return list({id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}.values())


def _bytes(values: Any) -> int:
    return sum(x.numel() * x.element_size() for x in _tensors(values))


def training(name: str, card: Card) -> dict[str, Any]:
    """Forward and backward of a recipe's model on a bin, in bf16."""
    recipe = sized_recipe(name)
    model, batch, step = DryRun(recipe, None, "bf16").step(recipe.data.bin_tokens, False)
    with AsOnCuda(), DeviceTime(card, OPT_VOCABULARY) as time:
        model(batch).objective.backward()
    seconds = sum(time.seconds.values())

    def speed(seconds: float) -> dict[str, float]:
        mfu = 2 * step.training / seconds / card.peak
        return {"tokens_per_second": batch.tokens / seconds, "mfu": mfu}

    return {
        "model": name,
        "multiply_adds_per_token": step.training / batch.tokens,
        "products": speed(time.products),
        "expected": speed(seconds),
        "fused": speed(seconds - time.saved),
        "slowest": dict(time.seconds.most_common(8)),
    }


class Part(NamedTuple):
    """Weights, and kernels, of one call of a part of a model."""

    weights: int
    kernels: int

    def seconds(self, card: Card, batch: int, cached: int = 0) -> float:
        """cached: bytes of caches that the call reads."""
        products = max(2 * self.weights * batch / card.gemm, BYTES * self.weights / card.copy)
        return products + cached / card.copy + self.kernels * card.kernel


def _parts(model: nn.Module) -> dict[str, Part]:
    weights, parts = flops.linear_weights(model), flops.part_of(model)
    sums, calls = Counter[str](), Counter[str]()
    for name, module in model.named_modules():
        attention = "attention" in type(module).__name__.lower()
        sums[parts[name]] += weights.get(name, 0)
        calls[parts[name]] += attention or name in weights
    return {part: Part(sums[part], 2 * calls[part]) for part in sums}


@cache
def _sides(ours: str, theirs: str) -> tuple[dict[str, Part], dict[str, Part], int]:
    """The parts of both models; bytes that OPT caches per token."""
    with FakeTensorMode():
        opt = published_opt(theirs)
    model, _, _ = DryRun(sized_recipe(ours), None, "bf16").step(CONTEXT, False)
    return _parts(model), _parts(opt), 2 * BYTES * opt.config.num_hidden_layers * opt.config.hidden_size


def writing(ours: str, theirs: str, batch: int, card: Card) -> dict[str, Any]:
    """New tokens per second of a recipe's model and of OPT with a static cache; both have one backbone."""
    parts, plain, per_token = _sides(ours, theirs)
    of_opt = batch * CONTEXT * per_token
    of_ours = of_opt // SENTENCE_TOKENS
    token = plain["backbone"].seconds(card, batch, of_opt) + plain["head"].seconds(card, batch)
    symbol = parts["decoder"].seconds(card, batch) + parts["head"].seconds(card, batch)
    sentence = parts["backbone"].seconds(card, batch, of_ours)
    sentence += parts["encoder"].seconds(card, SENTENCE_TOKENS * batch)
    sentence += (SENTENCE_TOKENS + 1) * symbol
    row = {"model": ours, "against": theirs, "batch": batch}
    for name, launch in (("device", 0.0), ("hosted", card.launch)):
        steps = SENTENCE_TOKENS + 2  # the decoder's, with the end symbol, and the backbone's
        speeds = {
            "ours": batch * SENTENCE_TOKENS / (sentence + steps * LAUNCHES["ours"] * launch),
            "static": batch / (token + LAUNCHES["static"] * launch),
        }
        row[name] = {**speeds, "ratio": speeds["ours"] / speeds["static"]}
    return row


def expected(records: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:
    """All rows; `measured` of each is the last such figure of a run on a GPU, or None."""
    facts = [record["fact"] for record in records if "fact" in record]
    card = Card.measured(facts)

    def measured(key: str, **wanted: Any) -> Any:
        found = [
            fact[key] for fact in facts if key in fact and all(fact.get(k) == v for k, v in wanted.items())
        ]
        return found[-1] if found else None

    trained = [training(name, card) for name in PAIRS]
    for row in trained:
        row["measured"] = {
            key: measured(key, model=row["model"], batch=None) for key in ("tokens_per_second", "mfu")
        }
    written = [writing(*pair, batch, card) for pair in PAIRS.items() for batch in BATCHES]
    for row in written:
        names = {"ours": row["model"], "static": f"{row['against']} static"}
        speeds = {
            key: measured("tokens_per_second", model=name, batch=row["batch"]) for key, name in names.items()
        }
        both = all(speeds.values())
        row["measured"] = {**speeds, "ratio": speeds["ours"] / speeds["static"] if both else None}
    return {"card": asdict(card), "training": trained, "writing": written}
