"""Adapters: what learns, and that a merged model computes the same."""

from __future__ import annotations

import pytest
import torch
from helpers.model_folders import STACK, small_model
from helpers.models import random_spans

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.config.schema import OptimizerRecipe, load_recipe
from pipeline.data.batch import build_batch
from pipeline.models.anchor_lm import AnchorConfig, AnchorLM
from pipeline.models.lora import add_lora, merge_lora
from pipeline.training.optimizer import parameter_groups


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(params=["lm", "sllm", "stack", "anchors"])
def model(request, tokenizer):
    if request.param != "anchors":
        stack = STACK if request.param == "stack" else None
        return small_model("sllm" if stack else request.param, tokenizer, stack=stack)
    plain = small_model("lm", tokenizer)
    return AnchorLM(AnchorConfig(plain.config, attention_window=9, first_tokens=2), plain.model).eval()


@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj"]])
def test_adapters_learn_alone_and_merge_into_the_weights(model, targets) -> None:
    batch = build_batch(random_spans(3))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    loss = model(batch).objective.item()
    add_lora(model, {"rank": 2, "alpha": 8.0, "targets": targets})
    assert model(batch).objective.item() == pytest.approx(loss, rel=1e-6)  # they start from nothing
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    pretrained = [name for name in learning if ".lora_" not in name and ("layers." in name)]
    assert not [name for name in pretrained if name.startswith(("backbone", "model", "tokens.model"))]
    grouped = {id(p) for group in parameter_groups(model, OptimizerRecipe()) for p in group["params"]}
    assert grouped == {id(dict(model.named_parameters())[name]) for name in learning}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    loss = model(batch).objective.item()
    merge_lora(model)
    assert model(batch).objective.item() == pytest.approx(loss, rel=1e-5)
    after = model.state_dict()
    assert list(after) == list(before) and all(p.requires_grad for p in model.parameters())
    changed = {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(targets or ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])


@pytest.mark.parametrize("parts", [{"backbone": {"freeze": True}}, {"backbone": {"lr_scale": 0.1}}])
def test_a_part_with_adapters_names_its_weights_alone(tokenizer, parts) -> None:
    model = small_model("sllm", tokenizer)
    add_lora(model, {"rank": 2})
    adapters = {id(weight) for name, weight in model.named_parameters() if ".lora_" in name}
    first = {id(w) for name, w in model.named_parameters() if ".lora_" in name and "layers.0." in name}
    others = {id(w) for name, w in model.named_parameters() if not name.startswith("backbone")}

    def scales(**more: dict) -> dict[int, float]:
        groups = parameter_groups(model, OptimizerRecipe(parts=parts | more))
        return {id(weight): group["lr_scale"] for group in groups for weight in group["params"]}

    assert scales() == dict.fromkeys(adapters | others, 1.0)
    assert scales(lora={"lr_scale": 3.0}) == dict.fromkeys(others, 1.0) | dict.fromkeys(adapters, 3.0)
    expected = dict.fromkeys(adapters | others, 1.0) | dict.fromkeys(first, 3.0)
    assert scales(**{"lora.backbone.decoder.layers.0-0": {"lr_scale": 3.0}}) == expected
    with pytest.raises(UserError, match="lorra is no part of this model: did you mean lora"):
        scales(lorra={"lr_scale": 3.0})
    assert scales(lora={"freeze": True}) == dict.fromkeys(others, 1.0)


def test_targets_that_are_no_layers_are_refused(tokenizer) -> None:
    with pytest.raises(UserError, match=r"model.lora.targets \['nothing'\]: .*nothing"):
        add_lora(small_model("lm", tokenizer), {"targets": ["nothing"]})


def test_adapters_need_a_pretrained_model() -> None:
    with pytest.raises(UserError, match="model.lora needs model.backbone.path"):
        load_recipe("small-lm", ["--data.shards", "x", "--model.lora.rank", "4"])
