"""Index arrays of a batch reach the device by one copy, made ahead from what earlier batches needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import opt_config, random_batch, small_lm, small_sllm, small_stack, small_vae

from pipeline.data.upload import Made, Upload, Uploader, make, needs

CPU = torch.device("cpu")
MODELS = {
    "vae": small_vae,
    "published vae": lambda: small_vae(layout="paper"),
    "sllm": small_sllm,
    "sllm with slots and context": lambda: small_sllm(
        condition="prefix", prefix_slots=2, context_sentences=2, positions="rotary"
    ),
    "sllm that pools": lambda: small_sllm(fusion="attention"),
    "stack": small_stack,
    "stack by rule": lambda: small_stack(ends="rule"),
    "lm": small_lm,
    "lm with sentence ends": lambda: small_lm(config=opt_config(sentence_ends=True)),
}


def tensors(made: Made) -> dict[tuple[Any, ...], torch.Tensor]:
    """Every tensor that was made of a batch, by its way there."""
    found: dict[tuple[Any, ...], torch.Tensor] = {}

    def look(value: Any, way: tuple[Any, ...]) -> None:
        if isinstance(value, torch.Tensor):
            found[way] = value
        elif isinstance(value, (list, tuple)):
            for number, one in enumerate(value):
                look(one, (*way, number))
        elif isinstance(value, dict):
            for key, one in value.items():
                look(one, (*way, key))
        elif isinstance(value, Made) or type(value).__name__ in ("BlockPlan", "BandPlan"):
            look(vars(value), way)

    look(made, ())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_prepared_batch_holds_what_the_model_reads_and_nothing_else_is_copied(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]()
    first, second, prepared = random_batch(1), random_batch(2), random_batch(2)
    expected, _ = model(second), model(first)
    upload = Upload(CPU)
    with upload.collecting():
        prepared = prepared.placed(upload)
        make(prepared, needs(first))
    before = tensors(prepared)
    assert upload.start() == 1 and upload.start() == 0
    wanted = tensors(second)
    assert wanted.keys() == before.keys()
    for way, tensor in before.items():
        assert torch.equal(tensor, wanted[way]), way

    def refuse(*_: object) -> None:
        raise AssertionError("a second copy to the device")

    monkeypatch.setattr("pipeline.data.batch.to_device", refuse)
    monkeypatch.setattr("pipeline.data.segments.to_device", refuse)
    found = model(prepared)
    assert torch.equal(found.objective, expected.objective)


def test_an_upload_takes_arrays_of_every_dtype_and_of_more_than_a_buffer() -> None:
    upload, arrays = Upload(CPU), [np.arange(2, dtype=d) for d in (np.int64, np.int32, np.float32, bool)]
    arrays += [np.arange(1 << 20), np.zeros((0, 2)), np.ones((3, 5, 7), dtype=bool)]
    placed = [upload.place(torch.from_numpy(array)) for array in arrays]
    assert upload.start() == 3
    for tensor, array in zip(placed, arrays, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))


def test_nothing_is_prepared_for_a_cpu() -> None:
    uploader, batch = Uploader(CPU), random_batch(0)
    small_sllm()(batch)
    uploader.learn(batch)
    assert uploader.prepare(batch) is batch and not uploader.wanted


def test_the_uploader_learns_from_every_batch() -> None:
    uploader = Uploader(torch.device("meta"))
    one, other = random_batch(0), random_batch(1)
    _ = one.sentence_layout.cu_rows, other.sentence_layout.first_rows
    for batch in (one, other):
        uploader.learn(batch)
    prepared = uploader.prepare(random_batch(2))
    assert (
        prepared.device.type == "meta" and {"cu_rows", "first_rows"} <= vars(prepared.sentence_layout).keys()
    )


@pytest.mark.cuda
def test_a_gpu_reads_a_prepared_batch_without_another_copy() -> None:
    model, uploader = small_sllm().cuda(), Uploader(torch.device("cuda", 0))
    expected = model(random_batch(2).to("cuda")).objective
    uploader.learn(first := uploader.prepare(random_batch(1)))
    uploader.learn(first.to("cuda"))
    model(first)
    uploader.learn(first)
    prepared = uploader.prepare(random_batch(2))
    assert all(host.is_pinned() for host, _ in prepared.upload._buffers)
    prepared = prepared.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = model(prepared).objective
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
