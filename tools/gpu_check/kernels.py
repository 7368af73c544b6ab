"""The machine's ceilings, and the attention paths."""

from __future__ import annotations

import itertools
import shutil
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.costs.benchmark_training import Bins
from pipeline.data.segments import SegmentLayout
from pipeline.models.attention import KERNELS, PATHS, attention_path, packed_attention, why_not
from pipeline.parallel import ranks
from tools.gpu_check.bench import Bench

HEADS, HEAD_DIM = (12, 32), 64  # of 125M and of 1.3B
KERNELS_IN_A_GRAPH = 256


def machine(bench: Bench) -> None:
    """What all later figures are measured against."""
    if bench.on_gpu:
        card = torch.cuda.get_device_properties(0)
        about = {"name": card.name, "memory_gb": card.total_memory / 1e9}
        bench.fact(**about, multiprocessors=card.multi_processor_count, cuda=torch.version.cuda)
    bench.fact(nvcc=shutil.which("nvcc"), compiler=shutil.which("g++") or shutil.which("clang++"))
    size = 512 if bench.small else 8192
    x, y = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    bench.fact(gemm_tflops=2e-12 * size**3 / bench.seconds(lambda: x @ y, runs=10))
    source = torch.empty(1 << (20 if bench.small else 30), device=bench.device)
    target = torch.empty_like(source)
    bench.fact(copy_gb_s=2e-9 * source.nbytes / bench.seconds(lambda: target.copy_(source)))
    tiny = torch.zeros(1, device=bench.device)

    def many() -> None:
        for _ in range(KERNELS_IN_A_GRAPH):
            tiny.add_(1)

    bench.fact(launch_us=1e6 * bench.seconds(many) / KERNELS_IN_A_GRAPH)
    if bench.on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        bench.fact(kernel_in_graph_us=1e6 * bench.seconds(graph.replay) / KERNELS_IN_A_GRAPH)
        for name, host in (("pageable", torch.arange(16384)), ("pinned", torch.arange(16384).pin_memory())):
            seconds = bench.seconds(partial(host.to, bench.device, non_blocking=True), runs=20)
            bench.fact(upload_of_131_kb=name, us=1e6 * seconds)
    device = ranks.join(ranks.find_ranks())
    total = torch.ones(3, device=device)
    torch.distributed.all_reduce(total)
    assert total.tolist() == [1.0] * 3
    bench.fact(process_group=torch.distributed.get_backend(), world=torch.distributed.get_world_size())
    ranks.leave()


def attention(bench: Bench) -> None:
    """Every path that can be used here against the plain definition in fp32, then time and memory."""
    usable = [
        path
        for path in (*PATHS, *KERNELS)
        if path != "masked" and why_not(path, bench.device, bench.dtype, HEAD_DIM, True) is None
    ]
    usable.sort(key=lambda path: path == "flex")  # compiles for long
    for path in usable:
        with bench.trial(path):
            worst, allowed = _difference(bench, path), 2e-2 if bench.on_gpu else 1e-4
            bench.fact(path=path, relative_difference=worst, allowed=allowed)
            assert worst <= allowed, f"differs from the plain definition by {worst:.1e}"
    _, batch = Bins(bench.shards(), bench.sized("sllm-125m-h1"), bench.tokens)[0]
    batch = batch.to(bench.device)
    parts = {
        "encoder": (batch.sentence_layout, False, None),
        "decoder": (batch.decoder_layout, True, None),
        "backbone": (batch.backbone_layout, True, None),
        "stack": (batch.token_model_layout, True, 32),
    }
    heads = (2,) if bench.small else HEADS
    for path, part, count in itertools.product(usable, parts, heads):
        with bench.trial(f"{path}, {part}, {count} heads"):
            layout, causal, window = parts[part]
            rows = _rows(bench, layout, count, 4)

            def both(path=path, rows=rows, form=parts[part]) -> None:
                _gradients(path, rows, bench.dtype, *form)

            both()
            with bench.peak() as memory:
                both()
            milliseconds = 1e3 * bench.seconds(both, runs=3 if bench.small else 10)
            sizes = {"rows": layout.rows, "segments": len(layout.lengths), "heads": count}
            figures = {"forward_backward_ms": milliseconds, "peak_gb": memory["gb"]}
            bench.fact(path=path, part=part, **sizes, **figures)


def _difference(bench: Bench, path: str) -> float:
    """Largest relative difference of output and gradients from the path `masked` in fp32."""
    rng, worst = np.random.default_rng(0), 0.0
    lengths = (rng.integers(1, 25, 200), rng.integers(1, 150, 30), np.array([1, 200, 3, 90, 128, 1, 129]))
    forms = ((False, None), (True, None), (True, 32))
    for heads, sizes, form in itertools.product((2,) if bench.small else HEADS, lengths, forms):
        layout = SegmentLayout(sizes, bench.device)
        rows = _rows(bench, layout, heads, 4)
        found = _gradients(path, rows, bench.dtype, layout, *form)
        exact = _gradients("masked", rows, torch.float32, layout, *form)
        both = zip(found, exact, strict=True)
        worst = max(worst, *(float((x.float() - y).norm() / y.norm()) for x, y in both))
    return worst


def _rows(bench: Bench, layout: SegmentLayout, heads: int, count: int) -> list[Tensor]:
    shape = (layout.rows, heads, HEAD_DIM)
    return [torch.randn(shape, device=bench.device).to(bench.dtype) for _ in range(count)]


def _gradients(
    path: str, rows: list[Tensor], dtype: torch.dtype, layout: SegmentLayout, causal: bool, window: int | None
) -> list[Tensor]:
    """Output, and gradients of q, k and v, under the last of `rows` as gradient of the output."""
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in rows[:3])
    with attention_path(path):
        out = packed_attention(q, k, v, layout, causal, window=window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), rows[3].to(dtype))]
