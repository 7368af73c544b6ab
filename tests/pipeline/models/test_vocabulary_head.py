"""The vocabulary head and its loss: exact whatever the chunks, plain cross-entropy reported always, never all
logits at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import opt_config, random_batch, small_lm, small_sllm, small_vae
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.costs.inspect import _Memory
from pipeline.models import vocabulary_head as head_module
from pipeline.models.vocabulary_head import VocabularyHead

ROWS, WIDTH, VOCABULARY = 20, 16, 97
LOSSES = [
    {},
    {"focal_gamma": 2.0},
    {"focal_gamma": 1.0},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"focal_gamma": 2.0, "label_smoothing": 0.2, "z_loss": 0.05},
]


def data(dtype: torch.dtype = torch.float64) -> tuple[VocabularyHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = VocabularyHead(WIDTH, VOCABULARY).to(dtype)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    return head, hidden, torch.randint(0, VOCABULARY, (ROWS,))


def textbook(
    logits: torch.Tensor, targets: torch.Tensor, focal_gamma=0.0, label_smoothing=0.0, z_loss=0.0
) -> torch.Tensor:
    """The loss as vocabulary_head.py defines it, from whole logits, by torch's own parts and autograd."""
    nll = F.cross_entropy(logits, targets, reduction="none")
    focal = (1 - torch.exp(-nll)) ** focal_gamma * nll
    even = F.cross_entropy(logits, targets, reduction="none", label_smoothing=1.0)
    log_z = logits.logsumexp(-1)
    return ((1 - label_smoothing) * focal + label_smoothing * even + z_loss * log_z**2).sum()


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
def test_loss_and_gradients_are_the_textbooks(loss, rows_at_once, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", rows_at_once * VOCABULARY)
    head, hidden, targets = data()
    inputs = (hidden, head.weight, head.bias)
    objective, nll, correct = head(hidden, targets, want_correct=True, **loss)
    got = torch.autograd.grad(objective * 0.37, inputs)
    logits = F.linear(*inputs)
    expected = textbook(logits, targets, **loss)
    torch.testing.assert_close(objective, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(got, torch.autograd.grad(expected * 0.37, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nll, plain.detach(), rtol=1e-10, atol=1e-10)
    assert not nll.requires_grad
    assert torch.equal(correct, logits.argmax(-1) == targets)


def test_label_smoothing_is_torchs():
    head, hidden, targets = data()
    objective, *_ = head(hidden, targets, label_smoothing=0.1)
    expected = F.cross_entropy(
        F.linear(hidden, head.weight, head.bias), targets, reduction="sum", label_smoothing=0.1
    )
    torch.testing.assert_close(objective, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradients_by_finite_differences(loss, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    head, hidden, targets = data()
    inputs = (hidden, head.weight, head.bias)
    gradients = torch.autograd.grad(head(hidden, targets, **loss)[0], inputs)
    step = 1e-6
    for x, gradient in zip(inputs, gradients, strict=True):
        way = torch.randn_like(x)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                x.add_(way, alpha=sign * step)
                ends.append(head(hidden, targets, **loss)[0].item())
                x.sub_(way, alpha=sign * step)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient * way).sum().item(), rel=1e-6)


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_targets_of_no_measurable_probability_cost_what_they_cost(scale):
    head, hidden, targets = data(torch.float32)
    with torch.no_grad():
        logits = F.linear(hidden.double() * scale, head.weight.double(), head.bias.double())
        expected = F.cross_entropy(logits, targets, reduction="none")
        objective, nll, _ = head(hidden * scale, targets)
    assert expected.max() > 90, "exp(-90) is 0 in float32: the case that is meant"
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-4)
    assert objective.item() == pytest.approx(expected.sum().item(), rel=1e-5)


def test_half_precision_sums_in_float32():
    head, hidden, targets = data(torch.float32)
    objective, nll, _ = head(hidden, targets)
    objective.backward()
    expected = [hidden.grad, head.weight.grad, head.bias.grad]
    low = VocabularyHead(WIDTH, VOCABULARY).to(torch.bfloat16)
    low.load_state_dict(head.state_dict())
    low_hidden = hidden.detach().bfloat16().requires_grad_()
    low_objective, low_nll, _ = low(low_hidden, targets)
    low_objective.backward()
    assert (low_objective.dtype, low_nll.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(low_nll, nll, rtol=0.02, atol=0.02)
    for got, want in zip([low_hidden.grad, low.weight.grad, low.bias.grad], expected, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.02)


def test_no_rows_are_no_loss():
    head, hidden, targets = data()
    objective, nll, correct = head(hidden[:0], targets[:0], want_correct=True)
    objective.backward()
    assert objective.item() == 0 and len(nll) == len(correct) == 0
    assert head.weight.grad.abs().max() == 0


@pytest.mark.parametrize("make", [small_vae, small_sllm], ids=["vae", "sllm"])
def test_every_objective_reports_plain_cross_entropy(make):
    batch = random_batch(13)
    plain = make()(batch)
    for loss in LOSSES[1:]:
        other = make(**loss)(batch)
        torch.testing.assert_close(other.target_nll_N, plain.target_nll_N)
        assert other.token_nll.item() == pytest.approx(plain.token_nll.item(), rel=1e-6)
        assert abs(other.objective.item() - plain.objective.item()) > 0.1


def test_the_token_model_takes_the_same_losses():
    batch, model = random_batch(13), small_lm()
    hidden, targets, _ = model.hidden(batch)
    model.focal_gamma, model.label_smoothing, model.z_loss = 2.0, 0.2, 0.05
    head = model.model.get_output_embeddings()
    assert model(batch).objective.item() == pytest.approx(
        textbook(head(hidden), targets, 2.0, 0.2, 0.05).item(), rel=1e-5
    )


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_no_tensor_of_all_logits_ever_exists(loss, dtype, train, monkeypatch):
    rows, vocabulary, at_once = 60, 4099, 7
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", at_once * vocabulary)
    head = VocabularyHead(WIDTH // 4, vocabulary).to(dtype)
    hidden = torch.randn(rows, WIDTH // 4, dtype=dtype, requires_grad=train)
    targets = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, rows))
    with torch.set_grad_enabled(train), _Largest() as largest:
        objective, *_ = head(hidden, targets, want_correct=True, **loss)
        if train:
            objective.backward()
    # One chunk of logits; a weight's gradient [V, d] is smaller still here.
    assert largest.elements == at_once * vocabulary
    with _Largest() as largest:
        head(hidden)
    assert largest.elements == rows * vocabulary, "the measure sees whole logits where they exist"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_one_chunk_is_freed_before_the_next_is_made(loss, dtype, monkeypatch):
    """The most memory of five chunks is that of one."""
    vocabulary, at_once = 4099, 16
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", at_once * vocabulary)
    head = VocabularyHead(4, vocabulary).to(dtype)

    def most(rows: int) -> int:
        memory = _Memory()
        hidden = torch.randn(rows, 4, dtype=dtype, requires_grad=True)
        with memory:
            head(hidden, torch.zeros(rows, dtype=torch.long), **loss)[0].backward()
        return memory.peak({})

    chunk = at_once * vocabulary * (4 if dtype == torch.float32 else 2)
    assert most(5 * at_once) - most(at_once) < chunk / 2


def test_a_training_step_of_each_model_holds_no_tensor_of_all_logits(monkeypatch):
    vocabulary = 1999  # above every other width, so that logits are the largest tensor there could be
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 5 * vocabulary)
    models = (
        small_vae(vocab_size=vocabulary),
        small_sllm(vocab_size=vocabulary),
        small_lm(config=opt_config(vocab_size=vocabulary)),
    )
    for model in models:
        batch = random_batch(3, documents=40)
        with _Largest() as largest:
            model(batch).objective.backward()
        assert largest.elements < batch.tokens * vocabulary / 4


def test_a_gpu_takes_fewer_chunks_of_bounded_size():
    meta = torch.device("meta")
    assert head_module.chunk_rows(50272, meta) == 4096 and head_module.chunk_rows(8192, meta) > 16384
    for vocabulary in (50272, 250_000, 10**9):
        assert head_module.chunk_rows(vocabulary) <= head_module.chunk_rows(vocabulary, meta)
        assert head_module.chunk_rows(vocabulary, meta) * vocabulary <= max(vocabulary, 4096 * 50272)
