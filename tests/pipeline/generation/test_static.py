"""Steps with static shapes, which a GPU replays as graphs: the same texts, few launches and waits around
them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import model_folders
from helpers.model_folders import STACK, small_model
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from data_prep.text.tokenizer import Tokenizer, load_tokenizer
from pipeline.generation import choice
from pipeline.generation import replay as replay_module
from pipeline.generation import sampling as sampling_module
from pipeline.generation.replay import Replay, bucket
from pipeline.generation.results import Limits, Request
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter
from pipeline.models import attention as attention_module
from pipeline.models import sentence_decoder, sentence_lm, sllm, stack_state

PROMPTS = ["", "The list is set by hand, and its value is", "One is set.", "It ends. ", "他走了。然后", "a"]
KINDS = {
    "alone": {},
    "context": {"vae": {"positions": "rotary", "context_sentences": 2, "layers": 2}},
    "prefix": {"vae": {"condition": "prefix", "prefix_slots": 2}},
    "stack": {"stack": STACK},
    "by rule": {"stack": {**STACK, "ends": "rule"}},
}
SETTINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=1.2, top_k=20),
    Sampling(temperature=1.0, top_p=0.8, repetition_penalty=1.3),
    Sampling(temperature=1.3, min_p=0.05),
    Sampling(repetition_penalty=1.3),
]
STATIC = (choice, sentence_decoder, sentence_lm, stack_state)
VIEWS = {"view", "_unsafe_view", "t", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze"}
VIEWS |= {
    "alias",
    "detach",
    "split",
    "split_with_sizes",
    "unbind",
    "as_strided",
    "permute",
    "lift_fresh",
    "resolve_conj",
    "resolve_neg",
}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: str) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in STATIC:
        monkeypatch.setattr(module, "static_shapes", lambda device: True)


def model_of(kind: str, tokenizer: Tokenizer) -> Any:
    model = small_model("sllm", tokenizer, seed=5, max_tokens=12, **KINDS[kind])
    with torch.no_grad():
        getattr(model, "vae", model).head.bias[tokenizer.eos_id] += 2
        if model.stop_head is not None:
            model.stop_head.bias -= 1
    return model.eval()


def written(model: Any, tokenizer: Tokenizer, rows: int) -> list[Any]:
    """Texts with settings of their own, in a batch; some prompts repeat."""
    requests = [
        Request(n, prompt, n, SETTINGS[n % len(SETTINGS)], Limits(5, max_tokens=30))
        for n, prompt in enumerate(PROMPTS * 2)
    ]
    writer = BatchWriter(model, tokenizer, Sampling(), Limits(), rows)
    found = {n: event for n, event in writer.run(requests)}
    return [(found[n].text, found[n].stopped) for n in range(len(requests))]


@pytest.mark.parametrize("kind", KINDS)
def test_static_steps_write_the_same_texts(
    kind: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind, tokenizer)
    expected = written(model, tokenizer, 5)
    for module in STATIC:
        monkeypatch.setattr(module, "static_shapes", lambda device: True)
    shapes: set[tuple[int, ...]] = set()
    call = Replay.__call__

    def seen(replay: Replay, inputs: np.ndarray, *more: torch.Tensor, version: Any = 0) -> torch.Tensor:
        shapes.add(inputs.shape)
        return call(replay, inputs, *more, version=version)

    monkeypatch.setattr(Replay, "__call__", seen)
    assert written(model, tokenizer, 5) == expected
    assert len({text for text, _ in expected}) > 6
    assert {n for _, n in shapes} <= {1, 2, 4, 5}


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_graphs_write_what_a_cpu_writes(
    kind: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, replays = model_of(kind, tokenizer), []
    expected, replay = written(model, tokenizer, 5), torch.cuda.CUDAGraph.replay

    def counted(graph: Any) -> None:
        replays.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    assert written(model.cuda(), tokenizer, 5) == expected
    assert len(replays) > len(set(map(id, replays))) > 1


class Launches(TorchDispatchMode):
    """Counts the operators that compute or copy; on a GPU each is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["alone", "stack"])
@pytest.mark.parametrize("settings", [SETTINGS, SETTINGS[:1]], ids=["all controls", "greedy"])
def test_a_step_of_64_rows_is_one_graph_and_few_launches(
    kind: str, settings: list[Sampling], tokenizer: Tokenizer, static: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads count too: from pinned memory each is one copy."""
    model, steps, waits, inside = model_of(kind, tokenizer), [], [], []
    eager, step = Replay.eager, BatchWriter._step

    def without_counting(replay: Replay, *given: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            return eager(replay, *given)

    def counted(writer: BatchWriter) -> Iterator[Any]:
        with Launches() as launches:
            inside.append(True)
            waits.append(0)
            events = list(step(writer))
            inside.clear()
        steps.append(launches.names)
        return iter(events)

    def waiting(name: str) -> Any:
        wait = getattr(torch.Tensor, name)

        def counted_wait(x: torch.Tensor, *arguments: Any) -> Any:
            if inside:
                waits[-1] += 1
            return wait(x, *arguments)

        return counted_wait

    monkeypatch.setattr(Replay, "eager", without_counting)
    monkeypatch.setattr(BatchWriter, "_step", counted)
    for module in (choice, sampling_module):
        monkeypatch.setattr(module, "reads_freely", lambda device: False)
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, waiting(name))
    for module in (replay_module, sllm, stack_state, choice, sampling_module):

        def uploaded(array: np.ndarray, device: torch.device) -> torch.Tensor:
            return torch.from_numpy(np.array(array)).clone()

        monkeypatch.setattr(module, "upload", uploaded)
    requests = [Request(n, "", n, settings[n % len(settings)], Limits(4, max_tokens=40)) for n in range(64)]
    texts = list(BatchWriter(model, tokenizer, Sampling(), Limits(), 64).run(requests))
    monkeypatch.undo()
    assert len(steps) > 5 and len(texts) > 64
    most = max(steps, key=len)
    assert len(most) <= 18 and max(waits) <= 1


def test_buckets() -> None:
    assert [bucket(rows, 48) for rows in (1, 2, 3, 9, 33, 48)] == [1, 2, 4, 16, 48, 48]


@pytest.mark.parametrize("kind", ["alone", "stack"])
def test_64_prompts_are_read_in_few_launches(
    kind: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The depth of SLLM-125M-H1; attention counts once per layer, as a variable-length kernel does."""
    monkeypatch.setattr(model_folders, "BACKBONE", {**model_folders.BACKBONE, "num_hidden_layers": 12})
    model, counts = model_of(kind, tokenizer), []
    read, attention = BatchWriter._read, attention_module.packed_attention

    def counted(writer: BatchWriter, taken: dict) -> Iterator[Any]:
        with Launches() as launches:
            events = list(read(writer, taken))
        counts.append((len(taken), len(launches.names)))
        return iter(events)

    def once(*given: Any, **settings: Any) -> torch.Tensor:
        with _disable_current_modes():
            out = attention(*given, **settings)
        return out.clone()

    monkeypatch.setattr(BatchWriter, "_read", counted)
    for name in ("attention", "kv_cache", "layers", "sentence_encoder", "sentence_decoder", "stack"):
        monkeypatch.setattr(f"pipeline.models.{name}.packed_attention", once)
    requests = [
        Request(n, " ".join(PROMPTS[: 1 + n % 6]), n, None, Limits(1, max_tokens=1)) for n in range(64)
    ]
    list(BatchWriter(model, tokenizer, Sampling(), Limits(), 64).run(requests))
    assert counts[0][0] == 64 and counts[0][1] <= 450
