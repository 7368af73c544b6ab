"""Attention paths: one result, forward and backward, on every path that a device has; and which path runs."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
from helpers.models import random_batch, random_spans, small_lm, small_sllm

from data_prep.common.errors import UserError
from pipeline.data.segments import SegmentLayout
from pipeline.models import attention
from pipeline.models.attention import KERNELS, PATHS, attention_path, choose_path, packed_attention, why_not

CPU = torch.device("cpu")
LAYOUT = SegmentLayout([2, 3])
# One row; one segment; short ones; some longer than every exact bucket; rows beyond one flex tile.
LENGTHS = {
    "one row": [1],
    "one segment": [37],
    "clauses": np.random.default_rng(0).integers(1, 25, 40),
    "long": np.random.default_rng(1).integers(1, 150, 12),
    "mixed": [1, 200, 3, 3, 90, 128, 1, 129],
    "at the borders of tiles": [127, 1, 128, 1, 127, 129, 127],
}


def by_hand(q, k, v, lengths, causal, scale=None, window=None):
    """Softmax attention, segment by segment, written out: [T, H, d] in float64."""
    outs = []
    for qs, ks, vs in zip(*(x.double().split(list(map(int, lengths))) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", qs, ks) * (scale or q.shape[-1] ** -0.5)
        if causal:
            scores = scores.masked_fill(torch.ones(len(qs), len(qs)).triu(1).bool(), -torch.inf)
        if window:
            scores = scores.masked_fill(torch.ones(len(qs), len(qs)).tril(-window).bool(), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vs))
    return torch.cat(outs)


def run(
    path,
    lengths,
    causal,
    scale=None,
    device="cpu",
    dtype=torch.float32,
    heads=4,
    width=16,
    rounded=None,
    window=None,
):
    """(output, dq, dk, dv) on `path`, for inputs and an output gradient that depend on the lengths only
    (`rounded`: the inputs take the values that this dtype has)."""
    layout = SegmentLayout(lengths, device)
    draw = torch.Generator().manual_seed(layout.rows)
    q, k, v, weight = (torch.randn(layout.rows, heads, width, generator=draw) for _ in range(4))
    q, k, v = (x.to(device, rounded or dtype).to(dtype).requires_grad_() for x in (q, k, v))
    if path == "by hand":
        out = by_hand(q, k, v, lengths, causal, scale, window)
    else:
        with attention_path(path):
            out = packed_attention(q, k, v, layout, causal, scale, window=window)
    (out * weight.to(device)).sum().backward()
    return [x.detach().float().cpu() for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("path", PATHS)
def test_a_path_gives_the_values_and_gradients_of_attention_by_hand(path, name, causal):
    for scale in (None, 0.4):
        expected = run("by hand", LENGTHS[name], causal, scale)
        for a, b in zip(run(path, LENGTHS[name], causal, scale), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


WINDOWS = (1, 5, 16, 37, 64, 199, 200)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("path", PATHS)
def test_a_window_hides_what_is_further_back(path, window):
    for lengths in LENGTHS.values():
        expected = run("by hand", lengths, True, window=window)
        for a, b in zip(run(path, lengths, True, window=window), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [5, 64, 300])
def test_flex_attention_has_windows_and_only_their_tiles(window):
    from torch.nn.attention.flex_attention import create_block_mask

    layout = SegmentLayout([300, 20, 520, 1])
    q, k, v = torch.randn(3, layout.rows, 2, 16, generator=torch.Generator().manual_seed(0))
    with attention_path("flex"):
        out = packed_attention(q, k, v, layout, True, window=window)
    expected = by_hand(q, k, v, layout.lengths, True, window=window)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    ours = layout.flex_mask(True, window)
    theirs = create_block_mask(ours.mask_mod, None, None, layout.rows, layout.rows, device="cpu")
    # Contiguous tiles: one that lies before a window may be among them, none may be missing.
    assert (ours.to_dense() >= theirs.to_dense()).all()
    assert ours.to_dense().sum() <= theirs.to_dense().sum() + 3


def test_a_window_needs_causal_attention():
    q = torch.randn(9, 2, 16)
    with pytest.raises(ValueError, match="needs causal"):
        packed_attention(q, q, q, SegmentLayout([9]), False, window=3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_flex_attention_gives_the_values_of_attention_by_hand(name, causal):
    lengths = LENGTHS[name]
    layout = SegmentLayout(lengths)
    q, k, v = torch.randn(3, layout.rows, 2, 16, generator=torch.Generator().manual_seed(0))
    with attention_path("flex"):
        out = packed_attention(q, k, v, layout, causal, 0.3)
    torch.testing.assert_close(out, by_hand(q, k, v, lengths, causal, 0.3).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_flex_tiles_are_those_that_torch_finds_by_looking_at_every_pair(name, causal):
    from torch.nn.attention.flex_attention import create_block_mask

    layout = SegmentLayout(LENGTHS[name])
    ours = layout.flex_mask(causal)
    theirs = create_block_mask(ours.mask_mod, None, None, layout.rows, layout.rows, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[127, 1, 128, 1, 128], [128, 1], [64, 65, 3, 60, 1]])
def test_tiles_give_the_values_and_gradients_of_attention_by_hand(lengths, causal):
    assert SegmentLayout(lengths).fits_tiles
    for window in (None, 1, 50) if causal else (None,):
        expected = run("by hand", lengths, causal, window=window)
        for a, b in zip(run("tiles", lengths, causal, window=window), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_tiles_hold_whole_segments_one_after_another():
    layout = SegmentLayout(np.random.default_rng(3).integers(1, 65, 500))
    plan, tile = layout.tiles, np.repeat(np.arange(len(layout.tiles.source) // 128), 128)
    assert torch.equal(plan.source[plan.restore], torch.arange(layout.rows))
    tile_of_row = tile[plan.restore.numpy()]
    for start, end in itertools.pairwise(layout.starts):
        assert len(set(tile_of_row[start:end])) == 1
    assert plan.slots <= 1.4 * layout.rows


def kernels(dtype: torch.dtype) -> list[str]:
    return [path for path in KERNELS if why_not(path, torch.device("cuda"), dtype, 64, True) is None]


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_kernels_agree_with_the_masked_path(dtype, name, causal):
    paths = kernels(dtype)
    assert "varlen" in paths, "torch on CUDA should bring varlen attention"
    for scale in (None, 0.2):
        settings = {"scale": scale, "device": "cuda", "heads": 12, "width": 64}
        for window in (None, 37) if causal else (None,):
            how = LENGTHS[name], causal
            # Computed in float32.
            expected = run("masked", *how, rounded=dtype, window=window, **settings)
            for path in [*PATHS, *paths]:
                found = run(path, *how, dtype=dtype, window=window, **settings)
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b, atol=4e-2, rtol=4e-2)


@pytest.mark.cuda
def test_cuda_takes_a_kernel_in_half_precision_and_the_exact_path_in_full():
    long = SegmentLayout([300, 20], "cuda")
    assert choose_path(long, torch.bfloat16, 64, True) == "varlen"
    assert choose_path(long, torch.float32, 64, True) == "bucketed"


@pytest.mark.parametrize(
    ("lengths", "path"),
    [([11] * 100, "tiles"), ([60] * 3, "varlen"), ([11] * 100 + [129], "varlen"), ([40] * 90, "tiles")],
)
def test_a_gpu_takes_packed_tiles_for_many_short_segments(lengths, path):
    layout = SegmentLayout(lengths, "meta")  # as a GPU, but of shapes only
    if path == "varlen" and attention._varlen_attn() is None:
        path = "bucketed"  # torch before 2.11
    assert choose_path(layout, torch.bfloat16, 64, True) == path
    assert choose_path(SegmentLayout(lengths), torch.bfloat16, 64, True) == "bucketed"
    with attention_path("masked"):
        assert choose_path(layout, torch.bfloat16, 64, True) == "masked"


@pytest.mark.parametrize("path", ["varlen", "flash_attn"])
def test_flash_kernels_say_that_they_need_cuda(path):
    assert why_not(path, torch.device("cpu"), torch.bfloat16, 64, True).endswith("runs on CUDA devices only")


@pytest.mark.cuda
@pytest.mark.parametrize("model", [small_sllm, small_lm])
def test_cuda_models_give_the_same_loss_and_gradients_on_every_path(model):
    batch = random_batch(3, documents=6).to("cuda")
    results = {}
    for path in ("masked", *kernels(torch.bfloat16)):
        if why_not(path, batch.device, torch.bfloat16, 8, True):
            continue  # the small models' heads of 8 are too small for flex attention
        network = model().to("cuda", torch.bfloat16)
        with attention_path(path):
            sums = network(batch)
            sums.objective.backward()
        norm = torch.stack([p.grad.float().norm() for p in network.parameters() if p.grad is not None]).norm()
        results[path] = sums.objective.item(), norm.item()
    assert len(results) > 1
    for loss, norm in results.values():
        assert loss == pytest.approx(results["masked"][0], rel=1e-2)
        assert norm == pytest.approx(results["masked"][1], rel=5e-2)


# --- which path -----------------------------------------------------------------------------------


def test_cpus_take_the_bucketed_path():
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_path(LAYOUT, dtype, 64, True) == "bucketed"
        assert choose_path(LAYOUT, dtype, 64, False, dropout=0.1) == "bucketed"


@pytest.mark.parametrize("path", ["varlen", "flash_attn"])
def test_a_forced_path_that_cannot_serve_is_refused(path):
    q = torch.randn(5, 2, 16)
    with attention_path(path), pytest.raises(UserError, match=f"path {path} cannot be used here"):
        packed_attention(q, q, q, SegmentLayout([2, 3]), True)


def test_flex_attention_is_refused_for_gradients_on_a_cpu_and_for_dropout():
    q = torch.randn(5, 2, 16, requires_grad=True)
    with attention_path("flex"):
        with pytest.raises(UserError, match="no backward on CPUs"):
            packed_attention(q, q, q, SegmentLayout([2, 3]), True)
        with pytest.raises(UserError, match="no dropout"):
            packed_attention(q.detach(), q.detach(), q.detach(), SegmentLayout([2, 3]), True, dropout=0.1)


def test_the_environment_can_name_the_path_and_a_with_block_wins(monkeypatch):
    monkeypatch.setenv("SLLM_ATTENTION", "masked")
    assert choose_path(LAYOUT, torch.float32, 64, True) == "masked"
    with attention_path("bucketed"):
        assert choose_path(LAYOUT, torch.float32, 64, True) == "bucketed"
    monkeypatch.setenv("SLLM_ATTENTION", "flash")
    with pytest.raises(UserError, match="SLLM_ATTENTION=flash"):
        choose_path(LAYOUT, torch.float32, 64, True)
    with pytest.raises(ValueError, match="not one of"), attention_path("flash"):
        pass


def test_dropout_acts_on_every_path_that_has_it():
    q = torch.ones(64, 2, 8)
    for path, lengths in itertools.product(PATHS, ([30, 34], [64])):
        torch.manual_seed(0)
        with attention_path(path):
            out = packed_attention(q, q, q, SegmentLayout(lengths), False, dropout=0.5)
        assert out.std() > 0.05 and out.mean() == pytest.approx(1, abs=0.1)


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("segments", "most_blocks", "most_padding"), [(40, 16, 0.25), (50_000, 40, 0.04)])
def test_blocks_hold_every_row_with_little_padding(segments, most_blocks, most_padding):
    layout = SegmentLayout(np.random.default_rng(3).integers(1, 65, segments))
    plan = layout.blocks
    assert torch.equal(plan.source[plan.restore], torch.arange(layout.rows))
    assert plan.slots == sum(n * length for n, length in plan.shapes) == layout.rows + len(plan.padded)
    assert layout.rows < plan.slots <= (1 + most_padding) * layout.rows
    assert set(plan.restore.tolist()).isdisjoint(plan.padded.tolist())
    assert len(plan.shapes) <= most_blocks
    own = np.split(plan.source.numpy(), np.cumsum([n * length for n, length in plan.shapes])[:-1])
    for (n, length), rows, mask in zip(plan.shapes, own, plan.key_masks, strict=True):
        assert (mask is None) == (len(set(rows.tolist())) == n * length)


def test_many_sentences_of_usual_length_are_not_padded():
    blocks = SegmentLayout(np.repeat([5, 12, 24], 1000)).blocks
    assert blocks.shapes == [(1000, 5), (1000, 12), (1000, 24)] and len(blocks.padded) == 0


def test_pairs_are_counted_with_and_without_padding():
    layout = SegmentLayout([3, 3, 131, 132, 133])  # two blocks: the short ones, and the others
    assert layout.pairs == 9 + 9 + 131**2 + 132**2 + 133**2
    blocks = {path: layout.computed_pairs(path) for path in PATHS + KERNELS}
    assert {real for real, _ in blocks.values()} == {layout.pairs}
    assert SegmentLayout([3, 3, 125]).computed_pairs("tiles") == (131 * 128, 2 * 128**2)
    assert {path: computed for path, (_, computed) in blocks.items()} == {
        "bucketed": 2 * 9 + 3 * 133**2,
        "tiles": 2 * 9 + 3 * 133**2,  # bucketed: a segment is longer than a tile
        "masked": 402**2,
        "varlen": layout.pairs,
        "flash_attn": layout.pairs,
        "flex": layout.pairs,
    }


def test_pairs_under_a_window_are_counted_one_by_one():
    layout = SegmentLayout([3, 70, 131])
    for window in (1, 2, 40, 70, 130, 131, 500):
        seen = sum(min(row + 1, window) for length in layout.lengths for row in range(length))
        assert layout.needed_pairs(True, window) == seen
        assert layout.computed_pairs("varlen", window)[1] == (seen if window < 131 else layout.pairs)
    # Blocks of 20 rows see 60: 1 + 4 + 7 of them.
    assert layout.computed_pairs("bucketed", 40) == (204 * 60, 12 * 20 * 60)
    assert layout.bands(40).mask.shape == (12, 1, 20, 60)


def test_varlen_offsets_are_int32_as_the_kernels_want_them():
    layout = SegmentLayout([3, 1, 5])
    assert layout.cu_rows.dtype == torch.int32 and layout.cu_rows.tolist() == [0, 3, 4, 9]
    assert layout.longest == 5 and isinstance(layout.longest, int)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_a_layout_without_rows_is_refused(lengths):
    with pytest.raises(ValueError, match="at least one"):
        SegmentLayout(lengths)


# --- inside Hugging Face models -------------------------------------------------------------------


def test_grouped_queries_read_their_own_heads():
    layout = SegmentLayout([4, 3])
    q, kv = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    out, _ = attention._hf_attention(None, q, kv, kv, None, layout=layout)
    rows = [x[0].transpose(0, 1) for x in (q, kv[:, [0, 0, 1, 1]], kv[:, [0, 0, 1, 1]])]
    torch.testing.assert_close(out[0], by_hand(*rows, [4, 3], True).float(), atol=1e-5, rtol=1e-5)


def test_layouts_of_a_batch_cover_its_rows():
    spans = random_spans(4, documents=5)
    batch = random_batch(4, documents=5)
    tokens = sum(len(span.tokens) for span in spans)
    sentences = sum(len(span.sentence_lengths) for span in spans)
    rows = [
        layout.rows
        for layout in (
            batch.sentence_layout,
            batch.decoder_layout,
            batch.backbone_layout,
            batch.token_model_layout,
        )
    ]
    assert rows == [tokens, tokens + sentences, sentences + 5, tokens + 5]


# --- the kernels of CUDA, by their arguments ---


def kernel_by_hand(q, k, v, cu_q, cu_k, max_q, max_k, scale, left, right):
    """What a variable-length kernel documents: row i of a segment sees i - left to i + right; -1: all."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k)
    lengths = np.diff(cu_q.numpy())
    assert max_q == max_k == lengths.max()
    outs = []
    for qs, ks, vs in zip(*(x.double().split(lengths.tolist()) for x in (q, k, v)), strict=True):
        distance = torch.arange(len(qs)) - torch.arange(len(qs))[:, None]  # of the key from the query
        hidden = torch.zeros_like(distance).bool()
        hidden |= (distance > right) if right >= 0 else hidden
        hidden |= (-distance > left) if left >= 0 else hidden
        scores = torch.einsum("qhd,khd->hqk", qs, ks) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), vs))
    return torch.cat(outs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("path", ["varlen", "flash_attn"])
def test_kernels_of_cuda_are_called_for_what_the_layout_says(path, causal, monkeypatch):
    """The kernels need a GPU: functions with their signatures and documented meaning replace them."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return kernel_by_hand(q, k, v, cu_q, cu_k, max_q, max_k, scale, *window_size)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        assert dropout_p == 0
        left, right = window_size
        return kernel_by_hand(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, left, 0 if causal else right)

    monkeypatch.setattr(attention, "_torch_varlen", lambda: varlen_attn)
    monkeypatch.setattr(attention, "_flash_attn_varlen", lambda: flash_attn_varlen_func)
    torch.manual_seed(0)
    lengths = np.array([5, 1, 9])
    q, k, v = torch.randn(3, 15, 2, 8)
    for window in (None, 4) if causal else (None,):
        out = attention._COMPUTE[path](q, k, v, SegmentLayout(lengths, CPU), causal, 0.3, 0.0, window)
        torch.testing.assert_close(out, by_hand(q, k, v, lengths, causal, 0.3, window))


def test_torchs_kernel_has_the_arguments_that_we_give():
    """On meta tensors, where torch has the kernel at all: the call is accepted, and its shape is right."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(parameters)
    assert parameters["window_size"].default == (-1, -1)  # (-1, 0) is causal, as its documentation says
    assert "(-1, 0)" in varlen_attn.__doc__
