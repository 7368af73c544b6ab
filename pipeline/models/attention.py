"""Attention within the segments of a packed row: the tokens of a sentence, the positions of a window.

No padding is projected, normalised or fed forward. Hugging Face decoders (the SLLM's backbone, the
token-level baseline) use it through the hook at the end of this file. All paths give the same result and are
tested against each other in values and gradients; `choose_path` picks one:

  bucketed    any device: segments of equal or similar length form [n, L] blocks for torch's SDPA; only the
              attention core sees the few padded slots
  tiles       any device: whole segments packed into blocks of 128 rows, for SDPA with a mask; bucketed where
              a segment is longer
  masked      any device: one [T, T] block mask, the plain definition, for tests and checks
  varlen      CUDA, half precision: torch's own variable-length flash attention (torch.nn.attention.varlen)
  flash_attn  CUDA, half precision: the flash-attn package's, where it is installed
  flex        CUDA: torch's flex attention, compiled, with a block mask made from the segments; on CPUs it
              runs uncompiled and forward only, for tests

ZeRO-3 needs a fixed number of calls of every submodule, whatever the batch holds. No path has parameters, so
the paths may make as many kernel calls as they like.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from data_prep.common.errors import UserError
from pipeline.data.segments import Band, BandPlan, SegmentLayout

PATHS = ("bucketed", "tiles", "masked")  # on every device, in every precision
KERNELS = ("varlen", "flash_attn", "flex")  # where device, precision and installation allow them
PATH_VARIABLE = "SLLM_ATTENTION"  # environment: the path of the whole process
_HALF = (torch.float16, torch.bfloat16)
_path: str | None = None


@contextmanager
def attention_path(name: str) -> Iterator[None]:
    """Use one of PATHS or KERNELS inside the `with` block (tests, `sllm check`), whatever the device."""
    global _path
    if name not in PATHS + KERNELS:
        raise ValueError(f"attention path {name!r} is not one of {PATHS + KERNELS}")
    before, _path = _path, name
    try:
        yield
    finally:
        _path = before


def forced_path() -> str | None:
    """The path that `attention_path`, or else the environment's SLLM_ATTENTION, asks for.

    Raises: UserError when the environment names no path.
    """
    name = _path or os.environ.get(PATH_VARIABLE) or None
    if name not in (None, *PATHS, *KERNELS):
        raise UserError(f"{PATH_VARIABLE}={name}: it must be one of {', '.join(PATHS + KERNELS)}, or unset")
    return name


def choose_path(
    layout: SegmentLayout, dtype: torch.dtype, head_dim: int, requires_grad: bool, dropout: float = 0.0
) -> str:
    """The path for tensors of this kind on the layout's device: the forced one, or

    - `bucketed` on CPUs: the only exact path there that does not pad the whole row;
    - `bucketed` in full precision on a GPU: flash kernels are half precision only, and full precision on a
      GPU is for checks, where exactness without a compiler matters more than speed;
    - `tiles` in half precision on a GPU for short segments (`SegmentLayout.suits_tiles`): flash kernels start
      a tile of 128 rows for each segment, also in the memory of their backward pass;
    - else in half precision on a GPU the first usable one of `varlen` (part of torch, nothing to install or
      compile), `flash_attn` (has attention dropout, torch's does not), `flex` (needs Triton); else
      `bucketed`.

    Raises: UserError when a forced path cannot be used; it is never replaced by another one.
    """
    device = layout.device
    if forced := forced_path():
        if reason := why_not(forced, device, dtype, head_dim, requires_grad, dropout):
            raise UserError(f"attention path {forced} cannot be used here: {reason}")
        return forced
    if device.type != "cpu" and dtype in _HALF:
        if layout.suits_tiles:
            return "tiles"
        for path in KERNELS:
            if why_not(path, device, dtype, head_dim, requires_grad, dropout) is None:
                return path
    return "bucketed"


def why_not(
    path: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    requires_grad: bool,
    dropout: float = 0.0,
) -> str | None:
    """Why a path cannot be used for such tensors; None if it can. Every path takes any scale."""
    if path in PATHS:
        return None
    if device.type == "meta":  # shapes only, as on a GPU (costs/counts.py)
        return None if path == "varlen" and _varlen_attn() else f"{path} attention needs a device"
    if path == "flex":
        if dropout:
            return "flex attention has no dropout"
        if device.type == "cpu":
            return "flex attention has no backward on CPUs" if requires_grad else None
        if importlib.util.find_spec("triton") is None:
            return "flex attention needs Triton"
        return None if head_dim >= 16 else f"flex attention needs heads of at least 16, not {head_dim}"
    if device.type != "cuda":
        return "a flash kernel, which runs on CUDA devices only"
    if dtype not in _HALF:
        return f"a flash kernel, which takes float16 and bfloat16 only, not {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"a flash kernel, whose heads are multiples of 8 up to 256, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a flash kernel, which needs compute capability 8.0 or newer"
    if path == "varlen":
        if dropout:
            return "torch's varlen attention has no dropout"
        if _torch_varlen() is None:
            return "this build of torch has no varlen attention"
    if path == "flash_attn" and _flash_attn_varlen() is None:
        return "the flash-attn package is not installed"
    return None


@cache
def _torch_varlen() -> Callable | None:
    return _varlen_attn() if torch.backends.cuda.is_flash_attention_available() else None


@cache
def _varlen_attn() -> Callable | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # Earlier releases have another argument for causality.
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


@cache
def _flash_attn_varlen() -> Callable | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def _flex_attention(compiled: bool) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    attend: Callable = flex_attention
    return torch.compile(attend, dynamic=True) if compiled else attend


# --- the paths ------------------------------------------------------------------------------------


@torch.compiler.disable  # host arithmetic on layouts, and kernels that a compiler cannot improve
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SegmentLayout,
    causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Scaled dot-product attention within the layout's segments, on the path that `choose_path` gives.

    Args:
        q, k, v: [T, H, d_head], T = layout.rows, one dtype.
        causal: rows see only rows of their segment up to themselves.
        scale: factor of q·k; None is 1/sqrt(d_head).
        dropout: of attention weights.
        window: with `causal`, a row sees the last `window` rows only, itself included (Hugging Face's
            `sliding_window`).
    Returns: [T, H, d_head].
    Raises: UserError when a forced path cannot be used.
    """
    if not layout.limits(window):
        window = None
    elif not causal:
        raise ValueError("an attention window needs causal attention")
    requires_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    path = choose_path(layout, q.dtype, q.shape[-1], requires_grad, dropout)
    return _COMPUTE[path](q, k, v, layout, causal, scale, dropout, window)


def _masked(q, k, v, layout, causal, scale, dropout, window=None):
    mask = layout.block_mask
    if causal:
        mask = mask & torch.ones_like(mask).tril()
    if window:
        mask = mask & torch.ones_like(mask).triu(1 - window)
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*rows, mask, dropout, scale=scale).squeeze(0).transpose(0, 1)


def _bucketed(q, k, v, layout, causal, scale, dropout, window=None):
    if window:
        return _banded(q, k, v, layout.bands(window), scale, dropout)
    if len(layout.lengths) == 1 and not layout.steady:  # one block as it stands: nothing to gather
        block = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*block, None, dropout, is_causal=causal, scale=scale)
        return out.squeeze(0).transpose(0, 1)
    plan = layout.blocks
    sizes = [n * length for n, length in plan.shapes]
    # `split`: its backward joins the parts once; slicing would add up one full-sized gradient per block.
    parts = zip(*(_IntoBlocks.apply(x, plan).split(sizes) for x in (q, k, v)), strict=True)
    outs = []
    for (n, length), mask, qkv in zip(plan.shapes, plan.key_masks, parts, strict=True):
        blocks = (x.view(n, length, *x.shape[1:]).transpose(1, 2) for x in qkv)  # [n, H, L, d_head]
        # Padding is at the end, so a causal block needs no key mask: no real row attends to it.
        key_mask = None if causal else mask
        out = F.scaled_dot_product_attention(*blocks, key_mask, dropout, is_causal=causal, scale=scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return _OutOfBlocks.apply(torch.cat(outs), plan)


def _tiles(q, k, v, layout, causal, scale, dropout, window=None):
    if not layout.fits_tiles:
        return _bucketed(q, k, v, layout, causal, scale, dropout, window)
    return _banded(q, k, v, BandPlan(layout.tiles, 0, layout.tile_mask(causal, window)), scale, dropout)


def _banded(q, k, v, band, scale, dropout):
    n, length = band.plan.shapes[0]
    q, k, v = (_IntoBlocks.apply(x, band.plan).view(n, length, *x.shape[1:]) for x in (q, k, v))
    # The blocks before each one; those of another segment are masked.
    if band.back:
        k, v = (torch.cat([x.roll(j, 0) for j in range(band.back, -1, -1)], 1) for x in (k, v))
    blocks = (x.transpose(1, 2) for x in (q, k, v))  # [n, H, L, d_head]
    out = F.scaled_dot_product_attention(*blocks, band.mask, dropout, scale=scale)
    return _OutOfBlocks.apply(out.transpose(1, 2).flatten(0, 1), band.plan)


@torch.compiler.disable
def bands_attention(q: Tensor, k: Tensor, v: Tensor, bands: Sequence[Band]) -> Tensor:
    """`band_attention` of consecutive queries, by one band after the other."""
    parts = zip(q.split([band.rows for band in bands]), bands, strict=True)
    return torch.cat([band_attention(part, k, v, band) for part, band in parts])


@torch.compiler.disable
def band_attention(q: Tensor, k: Tensor, v: Tensor, band: Band) -> Tensor:
    """Queries [R, H, d_head] attend to keys and values [N, H, d_head] of other rows, each to its range.

    By blocks on every device; under the path `masked` with one [R, N] mask. Returns: [R, H, d_head]."""
    if forced_path() == "masked":
        end = band.whole_mask.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k[:end], v[:end]))
        return F.scaled_dot_product_attention(q, k, v, band.whole_mask).squeeze(0).transpose(0, 1)
    k, v = (x.index_select(0, band.source).unflatten(0, (band.blocks, -1)) for x in (k, v))
    padded = F.pad(q, (0, 0, 0, 0, 0, band.blocks * band.block - band.rows))
    q, k, v = (x.transpose(1, 2) for x in (padded.unflatten(0, (band.blocks, -1)), k, v))  # [n, H, …, d_head]
    out = F.scaled_dot_product_attention(q, k, v, band.mask)
    return out.transpose(1, 2).flatten(0, 1)[: band.rows]


class _IntoBlocks(torch.autograd.Function):
    """[T, …] → [slots, …] by `plan.source`.

    The gradient of a padded place is zero (a dropped query, a masked key), so the backward is a gather too.
    Indexing's own backward would add row by row into zeros.
    """

    @staticmethod
    def forward(ctx, x, plan):
        ctx.plan = plan
        return x.index_select(0, plan.source)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.plan.restore), None


class _OutOfBlocks(torch.autograd.Function):
    """[slots, …] → [T, …] by `plan.restore`; padded places get a gradient of zero."""

    @staticmethod
    def forward(ctx, x, plan):
        ctx.plan = plan
        return x.index_select(0, plan.restore)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.plan.source)
        return grad.index_fill_(0, ctx.plan.padded, 0), None


def _varlen(q, k, v, layout, causal, scale, dropout, window=None):
    seen = (window - 1 if window else -1, 0 if causal else -1)
    cu, longest = layout.cu_rows, layout.longest
    attend = (_varlen_attn if q.device.type == "meta" else _torch_varlen)()
    return attend(q, k, v, cu, cu, longest, longest, scale=scale, window_size=seen)


def _flash_attn(q, k, v, layout, causal, scale, dropout, window=None):
    cu, longest = layout.cu_rows, layout.longest
    settings = {"dropout_p": dropout, "softmax_scale": scale, "causal": causal}
    if window:
        settings["window_size"] = (window - 1, 0)
    return _flash_attn_varlen()(q, k, v, cu, cu, longest, longest, **settings)


def _flex(q, k, v, layout, causal, scale, dropout, window=None):
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, d_head]
    attend = _flex_attention(q.device.type == "cuda")
    return attend(*rows, block_mask=layout.flex_mask(causal, window), scale=scale).squeeze(0).transpose(0, 1)


_COMPUTE = {
    "bucketed": _bucketed,
    "tiles": _tiles,
    "masked": _masked,
    "varlen": _varlen,
    "flash_attn": _flash_attn,
    "flex": _flex,
}

# --- the hook for Hugging Face models -------------------------------------------------------------
HF_ATTENTION = "sllm_packed"


def _hf_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    layout=None,
    sliding_window=None,
    **kwargs,
):
    """Hugging Face's attention interface: q, k, v [1, H, T, d_head] → ([1, T, H, d_head], None).

    `layout`: a `SegmentLayout` or a layout with a cache (kv_cache.py). Without one (a model called by itself)
    this is Hugging Face's own SDPA, whose mask has the window.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if hasattr(layout, "attend"):
        return layout.attend(module.layer_idx, q, k, v, scaling, sliding_window)[None], None
    k, v = repeat_heads(k, v, q.shape[1])
    out = packed_attention(q, k, v, layout, True, scaling, dropout, sliding_window)
    return out[None], None


def repeat_heads(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values [T, H_kv, d_head] → [T, heads, d_head], for grouped queries."""
    groups = heads // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


AttentionInterface.register(HF_ATTENTION, _hf_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(HF_ATTENTION, sdpa_mask)
