"""One step of generation through transformer layers, in as few calls as it takes.

A small model's step costs what its calls cost, not what they compute. So a layer's weights are looked up
once, when a state is made, and a step calls torch's functions on them directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.segments import LANES
from pipeline.models.folders import model_config
from pipeline.models.kv_cache import RollingCache
from pipeline.models.layers import (
    Rotation,
    SentenceMemory,
    TokenEmbedding,
    TransformerLayer,
    rotation,
    sinusoids,
)
from pipeline.models.products import least_rows, widened

Apply = Callable[[Tensor], Tensor]


def linear(*modules: Any) -> Apply:
    """The outputs of linear layers of one input, side by side: one product if `join` has laid them out."""
    if not all(isinstance(module, nn.Linear) for module in modules):
        return modules[0] if len(modules) == 1 else lambda x: torch.cat([one(x) for one in modules], -1)
    weight, bias = modules[0].weight, modules[0].bias
    product = vars(modules[0]).get("product" if len(modules) == 1 else "joined_product")
    if product is not None:
        return product
    if len(modules) > 1:
        whole = _joined([module.weight for module in modules])
        biases = [module.bias for module in modules]
        if whole is None:
            parts = [linear(module) for module in modules]
            return lambda x: torch.cat([part(x) for part in parts], -1)
        weight, bias = whole, None if biases[0] is None else torch.cat(biases)
    return lambda x: F.linear(x, weight, bias)


def logits(head: nn.Module) -> Apply:
    """A vocabulary head without its loss: float32 [n, V]."""
    apply = linear(head)
    return lambda x: apply(x).float()


def _joined(weights: list[Tensor]) -> Tensor | None:
    """The matrix whose consecutive rows the weights are, if their storage is so."""
    first, rows = weights[0], 0
    for weight in weights:
        place = first.storage_offset() + rows * first.stride(0)
        alike = weight.stride() == first.stride() and weight.storage_offset() == place
        if not alike or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        rows += len(weight)
    return torch.as_strided(first, (rows, first.shape[1]), first.stride(), first.storage_offset())


def join(modules: list[nn.Linear], columns: bool) -> None:
    """Lay out the weights of linear layers of one input as one matrix, by columns if asked for. Values,
    shapes and names stay."""
    whole = torch.cat([module.weight.data for module in modules])
    whole = whole.t().contiguous().t() if columns else whole
    for module, part in zip(modules, whole.split([len(module.weight) for module in modules]), strict=True):
        module.weight.data = part
        module.register_state_dict_post_hook(_weight_by_itself)


def _weight_by_itself(module: nn.Module, state: dict, prefix: str, _: Any) -> None:
    """Files hold each weight as a separate matrix."""
    state[prefix + "weight"] = state[prefix + "weight"].contiguous()


def joined_layers(model: nn.Module) -> list[list[nn.Linear]]:
    """Linear layers of one input in Hugging Face's decoders: queries, keys and values; gate and up."""
    names = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    found = [[getattr(module, name, None) for name in group] for module in model.modules() for group in names]
    return [group for group in found if all(isinstance(one, nn.Linear) for one in group)]


def norm(module: Any) -> Apply:
    """A LayerNorm, Hugging Face's RMSNorm, or nothing."""
    if module is None:
        return lambda x: x
    weight = module.weight
    if isinstance(module, nn.LayerNorm):
        shape, bias, eps = module.normalized_shape, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    shape, eps = tuple(weight.shape), module.variance_epsilon
    return lambda x: torch.rms_norm(x, shape, weight, eps)


@dataclass
class LayerStep:
    """x + attention(norm x), + condition, + ffn(norm x), or with the norms behind the sums (`post_norm`).

    queries, keys: norms of each head (Qwen3). window: rows that a row sees, itself included."""

    number: int
    heads: int
    key_heads: int
    project: Apply
    out: Apply
    ffn: Apply
    attention_norm: Apply
    ffn_norm: Apply
    condition_norm: Apply | None = None
    post_norm: bool = False
    queries: Apply | None = None
    keys: Apply | None = None
    scale: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        self.least = least_rows(self.project, self.out)

    def __call__(
        self,
        x: Tensor,
        attend: Callable[..., Tensor],
        turn: Rotation | None = None,
        condition: Tensor | None = None,
        real: int | None = None,
    ) -> Tensor:
        """New rows [n, d] → [at least n, d]. attend: of a layout with a cache. turn: cosines and signed
        sines, [n or 1, 1, d_head] each. real: how many rows are not repeated ones, which attend to nothing
        (`widened`)."""
        heads, shared, real = self.heads, self.key_heads, real or x.shape[0]
        if x.shape[0] < self.least:
            x = widened(x, self.least)
        if (rows := x.shape[0]) > real:
            if turn is not None and len(turn[0]) > 1:
                turn = widened(turn[0], rows), widened(turn[1], rows)
            if condition is not None and len(condition) > 1:
                condition = widened(condition, rows)
        qkv = self.project(x if self.post_norm else self.attention_norm(x)).view(rows, heads + 2 * shared, -1)
        if self.queries is not None and self.keys is not None:
            q, k, v = qkv.split_with_sizes((heads, shared, shared), 1)
            qkv = torch.cat([self.queries(q), self.keys(k), v], 1)
        if turn is None:
            q, k, v = qkv.split_with_sizes((heads, shared, shared), 1)
        else:
            both, v = qkv.split_with_sizes((heads + shared, shared), 1)  # queries and keys rotate alike
            both = torch.addcmul(both * turn[0], both.roll(both.shape[2] // 2, -1), turn[1])
            q, k = both.split_with_sizes((heads, shared), 1)
        if rows > real:
            q, k, v = q[:real], k[:real], v[:real]
        attended = attend(self.number, q, k, v, self.scale, self.window).reshape(real, -1)
        added = self.out(attended if rows == real else widened(attended, rows))
        if self.post_norm:
            x = self.attention_norm(added.add_(x))
            if condition is not None and self.condition_norm is not None:
                x = self.condition_norm(x + condition)
            return self.ffn_norm(self.ffn(x).add_(x))
        x = added.add_(x)
        if condition is not None:
            x.add_(condition)
        return self.ffn(self.ffn_norm(x)).add_(x)


def gelu(x: Tensor) -> Tensor:
    """torch's, on a CPU without oneDNN, whose kernel takes 6 µs to start; but where a row is no multiple of a
    vector, torch's own computes its end otherwise."""
    if x.device.type != "cpu" or x.shape[-1] % LANES:
        return F.gelu(x)
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.gelu(x)
    finally:
        torch._C._set_mkldnn_enabled(before)


def token_layer(layer: TransformerLayer, number: int) -> LayerStep:
    """A layer of the sentence decoder or of a stack's token layers, in evaluation mode."""
    attention, into, out = layer.attention, linear(layer.ffn_in), linear(layer.ffn_out)
    activation = F.relu if layer.post_norm else gelu
    return LayerStep(
        number,
        attention.heads,
        attention.heads,
        linear(attention.qkv),
        linear(attention.out),
        lambda x: out(activation(into(x))),
        norm(layer.attention_norm),
        norm(layer.ffn_norm),
        condition_norm=norm(layer.condition_norm),
        post_norm=layer.post_norm,
        window=attention.window,
    )


class MemoryStep:
    """x + attention to the last backbone outputs of each row's document."""

    def __init__(self, part: SentenceMemory, number: int):
        self._number, self._heads = number, part.heads
        self._norm, self._query, self._out = norm(part.norm), linear(part.query), linear(part.out)

    def __call__(
        self,
        x: Tensor,
        cache: RollingCache,
        attend: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor],
        turn: Rotation,
        rows: int,
    ) -> Tensor:
        """New rows, of which the first `rows` are real. attend: (q [n, H, 1, d_head], a layer's storage) → as
        q."""
        q = self._query(self._norm(x)).view(len(x), self._heads, -1)[:rows]
        q = torch.addcmul(q * turn[0], q.roll(q.shape[2] // 2, -1), turn[1])
        attended = attend(q[:, :, None], cache.layer(self._number, q))
        return x + self._out(widened(attended.flatten(1), len(x)))


def embedded(module: TokenEmbedding, symbols: Sequence[int] | Tensor, at: slice | Tensor) -> Tensor:
    """Embeddings [n, d] of symbols at positions: an index of a table by position."""
    weight = module.token.weight
    if len(symbols) == 1 and not isinstance(symbols, Tensor):
        x = weight.narrow(0, symbols[0], 1)
    else:
        x = F.embedding(torch.as_tensor(symbols, device=weight.device), weight)
    if module.project is not None:
        x = module.project(x)
    if module.kind == "rotary":
        return x
    if module.position is not None:
        return x + module.position.weight[at]
    waves = sinusoids(module.positions, module.width, x.device).to(x.dtype)
    return x * math.sqrt(module.width) + waves[at]


def turns(module: TokenEmbedding, heads: int, at: slice | Tensor, below: int) -> Rotation | None:
    """The rotations at positions below a bound, from a table; None unless they are rotary."""
    if module.kind != "rotary":
        return None
    cos, sin = flat_table(below, module.width // heads, module.token.weight.device, module.token.weight.dtype)
    return cos[at], sin[at]


@lru_cache(maxsize=8)
def flat_table(positions: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Rotation:
    """`rotation` of all positions below `positions`, [positions, 1, d_head] each."""
    with torch.inference_mode(False):  # later calls reuse it, maybe outside inference mode
        cos, sin = rotation(torch.arange(positions, device=device), head_dim)
        return cos[:, 0].to(dtype), sin[:, 0].to(dtype)


class BackboneStep:
    """One more position of each of some documents, through an OPT, Llama, Mistral or Qwen."""

    def __init__(self, model: nn.Module):
        config, decoder = model_config(model), cast(Any, model)
        self._opt = config.model_type == "opt"
        self._model = decoder = decoder.decoder if self._opt else decoder
        make = self._opt_layer if self._opt else self._llama_layer
        self._layers = [make(layer, number, config) for number, layer in enumerate(decoder.layers)]
        last = decoder.final_layer_norm if self._opt else decoder.norm
        self._norm = norm(last)
        self._into, self._out = (
            linear(part) if (part := getattr(decoder, name, None)) is not None else None
            for name in ("project_in", "project_out")
        )
        self._table: Rotation | None = None

    @staticmethod
    def known(model: nn.Module) -> bool:
        """Whether this class runs it as Hugging Face does."""
        config = model_config(model)
        if config.model_type not in ("opt", "llama", "mistral", "qwen2", "qwen3"):
            return False
        rope = getattr(config, "rope_parameters", None) or {}
        return rope.get("partial_rotary_factor", 1.0) == 1.0

    def _opt_layer(self, layer: Any, number: int, config: Any) -> LayerStep:
        attention, into, out = layer.self_attn, linear(layer.fc1), linear(layer.fc2)
        return LayerStep(
            number,
            attention.num_heads,
            attention.num_heads,
            linear(attention.q_proj, attention.k_proj, attention.v_proj),
            linear(attention.out_proj),
            lambda x: out(layer.activation_fn(into(x))),
            norm(layer.self_attn_layer_norm),
            norm(layer.final_layer_norm),
            post_norm=not layer.do_layer_norm_before,
            scale=attention.scaling,
        )

    def _llama_layer(self, layer: Any, number: int, config: Any) -> LayerStep:
        attention, mlp = layer.self_attn, layer.mlp
        wide, down = linear(mlp.gate_proj, mlp.up_proj), linear(mlp.down_proj)

        def ffn(x: Tensor) -> Tensor:
            gate, up = wide(x).chunk(2, -1)
            return down(mlp.act_fn(gate) * up)

        everywhere = config.sliding_window if config.model_type == "mistral" else None
        return LayerStep(
            number,
            config.num_attention_heads,
            config.num_key_value_heads,
            linear(attention.q_proj, attention.k_proj, attention.v_proj),
            linear(attention.o_proj),
            ffn,
            norm(layer.input_layernorm),
            norm(layer.post_attention_layernorm),
            queries=norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            keys=norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            scale=attention.scaling,
            window=getattr(attention, "sliding_window", everywhere),
        )

    def _turn(self, x: Tensor, at: slice | Tensor, places: int) -> Rotation:
        """From a table of the backbone's own rotations, for `places` at least."""
        if self._table is None or len(self._table[0]) < places or self._table[0].dtype != x.dtype:
            cos, sin = self._model.rotary_emb(x, torch.arange(places, device=x.device)[None])
            half = cos.shape[-1] // 2
            signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
            self._table = cos[0, :, None], signed[:, None]
        return self._table[0][at], self._table[1][at]

    def __call__(self, x: Tensor, step: Any, places: int) -> Tensor:
        """Inputs [n, d_vector] → outputs. step: a layout with a cache of `places`."""
        if self._into is not None:
            x = self._into(x)
        turn = None
        if self._opt:
            table = self._model.embed_positions
            x = x + table.weight[table.offset :][step.at]
        else:
            turn = self._turn(x, step.at, places + 1)
        real = len(x)
        for layer in self._layers:
            x = layer(x, step.attend, turn, None, real)
        x = self._norm(x)
        return (x if self._out is None else self._out(x))[:real]
