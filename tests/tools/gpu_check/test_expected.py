"""`tools.gpu_check expect`: times of operators against a calculation by hand, and measured figures."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tools.gpu_check import expected
from tools.gpu_check.expected import Card, DeviceTime, Part


def test_an_operator_takes_its_product_or_its_passes_over_memory() -> None:
    card = Card(gemm=1e12, copy=1e9)
    with FakeTensorMode(), DeviceTime(card) as time:
        x, y = torch.empty(100, 2000), torch.empty(2000, 300)
        z = x @ y
        assert time.seconds["aten::mm"] == pytest.approx(4 * (100 * 2000 + 2000 * 300 + 100 * 300) / 1e9)
        z.view(300, 100).t()
        z.mul_(2)
        assert time.seconds["aten::mul_"] == pytest.approx(2 * 4 * 30000 / 1e9)
        y.index_select(0, torch.zeros(5, dtype=torch.long))
        assert time.seconds["aten::index_select"] == pytest.approx(2 * 4 * 5 * 300 / 1e9)
        z.scatter_add_(1, torch.zeros(100, 1, dtype=torch.long), torch.ones(100, 1))
        assert time.seconds["aten::scatter_add_"] == pytest.approx(2 * 12 * 100 / 1e9)
    assert time.products == pytest.approx(2 * 100 * 2000 * 300 / 1e12)
    assert set(time.seconds) <= {
        "aten::mm",
        "aten::mul_",
        "aten::index_select",
        "aten::scatter_add_",
        "aten::zeros",
        "aten::ones",
    }
    with FakeTensorMode(), DeviceTime(card, vocabulary=300) as head:
        logits = torch.empty(100, 2000) @ torch.empty(2000, 300)
        logits.exp().sum(-1)
    passes = 3 * 100 * 300 + 100  # exp reads and writes, the sum reads and writes
    assert head.saved == pytest.approx(4 * (passes - 2 * 100 * 300) / 1e9)
    with FakeTensorMode(), DeviceTime(Card(gemm=1e6, copy=1e9)) as slow:
        torch.empty(100, 2000) @ torch.empty(2000, 300)
    assert sum(slow.seconds.values()) == slow.products == pytest.approx(120.0)


def test_a_step_is_slower_than_its_products_and_faster_on_a_faster_card() -> None:
    found = expected.training("small-sllm", Card())
    speeds = [found[key]["tokens_per_second"] for key in ("expected", "fused", "products")]
    assert speeds == sorted(speeds) and found["fused"]["mfu"] < found["products"]["mfu"] < 0.8
    faster = expected.training("small-sllm", Card(copy=8.6e12))
    assert faster["expected"]["tokens_per_second"] > 1.5 * speeds[0]


def test_a_call_reads_weights_and_cache_once_and_starts_its_kernels() -> None:
    card, part = Card(gemm=1e12, copy=1e9, kernel=1e-3), Part(weights=1000, kernels=4)
    assert part.seconds(card, 1) == pytest.approx(2000 / 1e9 + 4e-3)
    assert part.seconds(card, 10_000, cached=500) == pytest.approx(2e7 / 1e12 + 500 / 1e9 + 4e-3)


def test_measured_ceilings_and_speeds_come_from_the_records_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "PAIRS", {"small-sllm": "opt-125m"})
    monkeypatch.setattr(expected, "BATCHES", (1, 64))
    facts = [
        {"gemm_tflops": 700.0},
        {"kernel_in_graph_us": 3.0},
        {"model": "small-sllm", "tokens_per_second": 5.0, "mfu": 0.4},
        {"model": "small-sllm", "batch": 1, "tokens_per_second": 9.0},
        {"model": "small-sllm", "batch": 64, "tokens_per_second": 8.0},
        {"model": "opt-125m", "batch": 64, "tokens_per_second": 1.5},
        {"model": "opt-125m static", "batch": 64, "tokens_per_second": 2.0},
    ]
    records = [{"run": {}}, *({"check": "x", "fact": fact} for fact in facts)]
    found = expected.expected(records)
    assert found["card"]["gemm"] == 700e12 and found["card"]["kernel"] == pytest.approx(3e-6)
    assert found["training"][0]["measured"] == {"tokens_per_second": 5.0, "mfu": 0.4}
    alone, many = found["writing"]
    assert many["measured"] == {"ours": 8.0, "static": 2.0, "ratio": 4.0}
    assert alone["measured"] == {"ours": 9.0, "static": None, "ratio": None}
    for row in (alone, many):
        assert row["device"]["ours"] > row["hosted"]["ours"]
        assert row["device"]["ratio"] == pytest.approx(row["device"]["ours"] / row["device"]["static"])
    assert 10 < many["device"]["ours"] / alone["device"]["ours"] <= 64
