"""Every backbone family passes what OPT passes: causal, packed = single, cached = uncached, paths agree, the
model that Hugging Face defines, a gradient for every parameter, and refusals of what packing cannot give."""

from __future__ import annotations

import pytest
import torch
import yaml
from helpers import ranks, run_checks
from helpers.backbone_families import CONFIGS, MAKERS, ROTARY, family_lm, family_sllm, rotary_config
from helpers.models import (
    FORWARD_PATHS,
    IDS,
    VOCABULARY,
    _wake,
    opt_config,
    plain_nll,
    post_norm_opt_config,
    random_batch,
    random_spans,
    small_vae,
)
from helpers.paths import REPOSITORY
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GemmaConfig,
    OPTForCausalLM,
)

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.config.schema import BACKBONES, load_recipe
from pipeline.data.batch import build_batch, empty_batch
from pipeline.data.segments import SegmentLayout
from pipeline.evaluation.self_check import Checker
from pipeline.generation.api import generate
from pipeline.generation.results import POSITIONS_EXHAUSTED
from pipeline.models.attention import PATHS, attention_path
from pipeline.models.backbone import backbone_config, load_backbone, run_packed
from pipeline.models.factory import build_model, load_model
from pipeline.models.sllm import SLLM, SLLMConfig

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

# One stack has what differs between families in its backbone only.
STACKS = ("opt", "opt-wide", "llama", "qwen3-narrow", "gpt_neox")
BOTH = [(kind, name) for kind in MAKERS for name in CONFIGS if kind != "stack" or name in STACKS]


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_causal_packed_cached_and_alike_on_every_path(kind, name):
    findings = Checker(MAKERS[kind](name), documents=4, tolerance=1e-5).run()
    assert [f.check for f in findings].count("causal") == len(PATHS)
    assert {"packed = single", "paths agree", "cached = uncached"} <= {f.check for f in findings}
    for finding in findings:
        assert finding.passed, finding
        assert finding.compared > 50
        if finding.check == "causal":
            assert finding.changed > 1e-3, "the change was not seen at all"


@pytest.mark.parametrize("path", FORWARD_PATHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_backbone_is_the_plain_model_on_each_window(name, path):
    """Against Hugging Face's eager attention, alone, with its own positions: covers grouped queries and
    positions that restart."""
    model, spans = family_sllm(name), random_spans(21, documents=5)
    plain = AutoModel.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    lacking = plain.load_state_dict(model.backbone.state_dict(), strict=False)
    assert all("embed_" in key for key in lacking.missing_keys) and not lacking.unexpected_keys
    with torch.no_grad(), attention_path(path):
        packed = model.contextualise(build_batch(spans))
        at = 0
        for span in spans:
            x = torch.cat([model.start.weight, model.vae.encode(build_batch([span]))])
            alone = plain(inputs_embeds=model._into(x)[None]).last_hidden_state[0]
            torch.testing.assert_close(packed[at : at + len(x)], alone, atol=1e-5, rtol=1e-5)
            at += len(x)
        assert at == len(packed)


@pytest.mark.parametrize("path", FORWARD_PATHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_token_model_is_the_plain_model(name, path):
    wrapped, spans = family_lm(name), random_spans(22)
    with torch.no_grad(), attention_path(path):
        sums = wrapped(build_batch(spans))
    plain = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    plain.load_state_dict(wrapped.model.state_dict())
    torch.testing.assert_close(sums.target_nll_N, plain_nll(plain, spans), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_positions_restart_in_every_window(name):
    """Rotary attention does not feel a shift, so this looks at the positions that the model gets."""
    model, batch = family_sllm(name), random_batch(23)
    seen = []
    model.backbone.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    model(batch)
    assert len(seen) == 1 and torch.equal(seen[0][0], batch.backbone_layout.position_of_row)
    assert (seen[0] == 0).sum() == batch.documents
    rows = torch.randn(batch.backbone_layout.rows, model.config.backbone.hidden_size)
    with torch.no_grad():
        right = run_packed(model.backbone, batch.backbone_layout, inputs_embeds=rows)
        stretched = SegmentLayout(batch.backbone_layout.lengths)
        stretched.__dict__["position_of_row"] = 3 * batch.backbone_layout.position_of_row
        wrong = run_packed(model.backbone, stretched, inputs_embeds=rows)
    assert (right - wrong).abs().max() > 1e-3, "positions are not used at all"


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_every_parameter_gets_a_gradient_also_from_the_empty_batch(kind, name):
    model = MAKERS[kind](name)
    model(empty_batch()).objective.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() == 0.0, key
    model.zero_grad()
    model(random_batch(24)).objective.backward()
    for key, p in model.named_parameters():
        assert p.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", [name for name in CONFIGS if "-" in name])
def test_backbones_of_another_width_get_adapters(name):
    model = family_sllm(name)
    vector = model.stop_head.in_features
    assert vector != model.config.vae.hidden_size
    assert model.to_backbone.weight.shape == (vector, model.config.vae.hidden_size)
    assert model.from_backbone.weight.shape == (model.config.vae.hidden_size, vector)


@pytest.mark.parametrize("name", ROTARY)
def test_no_mask_of_all_rows_is_built(name):
    """Hugging Face would build a [rows, rows] mask on every call for positions that restart."""
    model, seen = family_lm(name), []
    parts = dict(model.model.base_model.layers[0].named_children())
    parts["attention" if name == "gpt_neox" else "self_attn"].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(random_batch(25))
    assert len(seen) == 1 and seen[0].numel() == 1


def test_one_dtype_whatever_a_backbones_config_was_saved_with():
    config = rotary_config("llama", dtype="bfloat16")
    assert {p.dtype for p in SLLM(SLLMConfig(small_vae().config, config, **IDS)).parameters()} == {
        torch.float32
    }


def test_a_model_with_another_attention_is_not_run_packed():
    model, batch = family_sllm("llama"), random_batch(26)
    model.backbone.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="a packed run needs"):
        model(batch)


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BACKBONES)
def test_positions_are_a_limit_in_every_family(family, tiny_tokenizer):
    settings = {"max_position_embeddings": 6, **IDS}
    config = opt_config(**settings) if family == "opt" else rotary_config(family, **settings)
    tokenizer = load_tokenizer(tiny_tokenizer)
    text = {"segmenter": "clause", "language": "en", "max_tokens": 16}
    sizes = {"hidden_size": 32, "layers": 1, "heads": 4}
    backbone = {**config.to_dict(), "model_type": family, "vocab_size": tokenizer.vocab_size}
    for objective in ("sllm", "lm"):
        with pytest.raises(UserError, match="need 7 positions, but the backbone has 6"):
            build_model(objective, sizes, backbone, tokenizer, text, 6)
    model = _wake(build_model("sllm", sizes, backbone, tokenizer, text, 5))
    rows = torch.randn(8, 32)
    with pytest.raises(UserError, match="7 positions is longer than the model's 6"):
        run_packed(model.backbone, SegmentLayout([1, 7]), inputs_embeds=rows)
    state = model.begin()
    for _ in range(5):
        model.append(state, [5, 6])
    with pytest.raises(ValueError, match="context is full: the backbone takes 5"):
        model.append(state, [5, 6])
    torch.nn.init.constant_(model.stop_head.bias, -1000.0)
    run = generate(model, tokenizer, max_sentences=20)
    assert len(list(run)) == 6 and run.stopped == POSITIONS_EXHAUSTED


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 32}, "layers of chunked attention"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type dynamic",
        ),
        ({"model_type": "opt", "layerdrop": 0.1}, "layerdrop 0.1 is not supported"),
        (
            {"model_type": "qwen2", "num_attention_heads": 4},
            "num_key_value_heads 32 .* does not divide the num_attention_heads 4",
        ),
        ({"model_type": "gemma"}, "model_type 'gemma' is not one of opt, llama, mistral, qwen2, qwen3"),
        ({"model_type": "bloom"}, "model_type 'bloom' is not one of"),
    ],
)
def test_what_packing_cannot_give_is_refused(settings, says):
    with pytest.raises(UserError, match=says) as refused:
        backbone_config(settings)
    assert "\n" not in str(refused.value)


def test_a_sliding_window_that_is_off_or_never_reached_is_accepted():
    assert backbone_config({"model_type": "qwen2", "use_sliding_window": False}).sliding_window is None
    backbone_config({"model_type": "qwen3", "use_sliding_window": True, "num_hidden_layers": 4})


def test_folders_of_untested_families_are_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GemmaConfig(vocab_size=50, num_key_value_heads=1, head_dim=8, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    chunked = rotary_config("qwen2", layer_types=["chunked_attention", "full_attention"])
    model = AutoModelForCausalLM.from_config(rotary_config("qwen2"))
    model.save_pretrained(tmp_path / "chunked")
    chunked.save_pretrained(tmp_path / "chunked")
    for load in (load_backbone, load_model):
        with pytest.raises(UserError, match="gemma.* is not one of"):
            load(tmp_path / "gemma")
        with pytest.raises(UserError, match="layers of chunked attention are not supported"):
            load(tmp_path / "chunked")


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BACKBONES)
def test_recipe_keys_are_keys_of_the_familys_config(family):
    known = AutoConfig.for_model(family).to_dict()
    assert set(BACKBONES[family].model_fields) - {"path"} <= set(known) | {"model_type"}


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        ({"model_type": "llama", "intermediate": 3}, "did you mean 'model.backbone.intermediate_size'?"),
        ({"model_type": "llama", "ffn_dim": 3}, "unknown recipe key 'model.backbone.ffn_dim'"),
        ({"model_type": "qwen2", "num_kv_heads": 3}, "did you mean 'model.backbone.num_key_value_heads'?"),
        ({"model_type": "qwen3", "word_embed_proj_dim": 3}, "unknown recipe key"),
        ({"model_type": "opt", "num_key_value_heads": 3}, "unknown recipe key"),
        ({"model_type": "llama", "sliding_window": 3}, "unknown recipe key 'model.backbone.sliding_window'"),
        ({"model_type": "qwen2", "sliding_window": 64}, "sliding_window needs model.backbone.use_sl"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 64},
            "needs model.backbone.max_window",
        ),
        (
            {"model_type": "lama"},
            "must be one of opt, llama, mistral, qwen2, qwen3, gpt_neox, not 'lama': did you mean llama?",
        ),
        ({"model_type": "mamba"}, "must be one of opt, llama, mistral, qwen2, qwen3, gpt_neox, not 'mamba'"),
    ],
)
def test_recipe_keys_of_another_family_are_refused(backbone, says, tmp_path):
    recipe = {"objective": "lm", "output_dir": "x", "data": {"shards": ["a"]}, "training": {"max_steps": 1}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "model": {"backbone": backbone}}), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_recipe(path)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_rotary_base_reaches_the_model(tmp_path):
    recipe = {"objective": "lm", "output_dir": "x", "data": {"shards": ["a"]}, "training": {"max_steps": 1}}
    backbone = {"model_type": "llama", "hidden_size": 32, "rope_parameters": {"rope_theta": 500.0}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "model": {"backbone": backbone}}), encoding="utf-8")
    config = backbone_config(load_recipe(path).model.backbone)
    assert config.rope_parameters["rope_theta"] == 500.0 and config.rope_parameters["rope_type"] == "default"


# --- OPT as its authors' files have it ------------------------------------------------------------


@pytest.mark.parametrize("config", [opt_config, post_norm_opt_config])
def test_a_saved_opt_gives_its_very_hidden_states_layer_by_layer(config, tiny_tokenizer, tmp_path):
    """A folder by transformers itself → SLLM; fed with that OPT's own token embeddings, layer by layer."""
    torch.manual_seed(0)
    original = _wake(OPTForCausalLM(config(vocab_size=VOCABULARY)))
    original.save_pretrained(tmp_path)
    text = {"segmenter": "clause", "language": "en", "max_tokens": 16}
    sizes = {"hidden_size": 32, "layers": 1, "heads": 4}
    tokenizer = load_tokenizer(tiny_tokenizer)
    sllm = build_model("sllm", sizes, {"path": str(tmp_path)}, tokenizer, text, 100).eval()
    ids = torch.randint(4, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        embeddings = original.get_input_embeddings()(ids)
        expected = original.model(ids, output_hidden_states=True)
        plain = sllm.backbone(inputs_embeds=embeddings, output_hidden_states=True)
        # Packed: the same text after another window of 7 positions.
        layout = SegmentLayout([7, 40])
        layers = _outputs_of_layers(sllm.backbone.decoder.layers)
        packed = run_packed(
            sllm.backbone, layout, inputs_embeds=torch.cat([embeddings[0, :7], embeddings[0]])
        )
    assert len(plain.hidden_states) == len(expected.hidden_states) == 3
    for ours, theirs in zip(plain.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(plain.last_hidden_state, expected.last_hidden_state, atol=1e-6, rtol=0)
    for ours, theirs in zip(layers[:-1], expected.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(ours[0, 7:], theirs[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(packed[7:], expected.last_hidden_state[0], atol=1e-6, rtol=0)


def _outputs_of_layers(layers) -> list[torch.Tensor]:
    outputs = []
    for layer in layers:
        layer.register_forward_hook(
            lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    return outputs


RECIPES = REPOSITORY / "pipeline" / "recipes"


@pytest.mark.parametrize("size", ["125m", "350m", "1.3b"])
def test_published_backbones_are_built_as_the_model_defines_itself(size):
    from pipeline.models.sentence_vae import SentenceVAEConfig

    config = backbone_config(load_recipe(RECIPES / f"sllm-{size}-h1.yaml").model.backbone)
    width = {"125m": 768, "350m": 1024, "1.3b": 2048}[size]
    with torch.device("meta"):
        model = SLLM(SLLMConfig(SentenceVAEConfig(hidden_size=width, heads=16), config))
    decoder = model.backbone.decoder
    post_norm = size == "350m"
    assert all(layer.do_layer_norm_before is not post_norm for layer in decoder.layers)
    assert (decoder.final_layer_norm is None) is post_norm
    assert (decoder.project_in is None) is (decoder.project_out is None) is not post_norm
    assert (model.to_backbone is None) is not post_norm
    shape = {"125m": (12, 768, 3072, 12), "350m": (24, 1024, 4096, 16), "1.3b": (24, 2048, 8192, 32)}[size]
    fc1 = decoder.layers[0].fc1
    assert shape == (
        len(decoder.layers), fc1.in_features, fc1.out_features, decoder.layers[0].self_attn.num_heads
    )  # fmt: skip
    assert decoder.embed_positions.weight.shape == (2050, width)
    assert config.activation_function == "relu"


# --- training -------------------------------------------------------------------------------------


def test_a_token_models_pad_id_costs_no_real_token_its_gradient(tiny_tokenizer):
    """OPT's config says that id 1 is padding; in another vocabulary it may be a word."""
    text = {"segmenter": "clause", "language": "en", "max_tokens": 16}
    sizes = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
    model = build_model(
        "lm", {}, sizes | {"tie_word_embeddings": False}, load_tokenizer(tiny_tokenizer), text, 50
    )
    batch = random_batch(27)
    batch.tokens_T.fill_(1)
    model(batch).objective.backward()
    assert model.model.get_input_embeddings().weight.grad[1].abs().max() > 0


@pytest.mark.parametrize(("objective", "family"), [("sllm", "llama"), ("lm", "qwen3")])
def test_partitioned_over_two_ranks_they_train_as_on_one(
    objective, family, tiny_shards, tiny_valid_shards, tmp_path
):
    import json

    config = rotary_config(family, max_position_embeddings=256).to_dict()
    backbone = {key: config[key] for key in BACKBONES[family].model_fields if config.get(key) is not None}
    backbone.pop("vocab_size")
    recipe = {
        "objective": objective,
        "output_dir": "set below",
        "data": {"shards": [str(tiny_shards)], "validation": str(tiny_valid_shards), "window_tokens": 128},
        "model": {"vae": {"hidden_size": 48, "layers": 1, "heads": 4}, "backbone": backbone},
        "optimizer": {"lr": 5.0e-3},
        "training": {"max_steps": 4, "eval_every": 4, "eval_bins": 2},
        "log": {"tensorboard": False},
    }
    recipe["data"] |= {"bin_tokens": 256, "bins_per_step": 3}
    if objective == "lm":
        del recipe["model"]["vae"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    pool, losses = ranks.RankPool(), {}
    try:
        for world, strategy in ((1, "zero0"), (2, "zero3")):
            run = tmp_path / strategy
            arguments = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(run)]
            arguments += ["--deepspeed_config", str(RECIPES.parents[1] / "ds_configs" / f"{strategy}.json")]
            assert pool.run(world, ranks.train, arguments) == [0] * world
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses[world] = [record["loss"] for record in records]
        [(kind, measured)] = pool.run(
            1, run_checks.export_and_measure, str(tmp_path / "zero3"), str(tmp_path / "model"), "last"
        )
    finally:
        pool.close()
    assert losses[2] == pytest.approx(losses[1], abs=1e-4) and len(losses[1]) == 4
    assert losses[1][-1] < losses[1][0] - 0.1, "it learns nothing: comparing losses would say nothing"
    evaluation = json.loads((tmp_path / "zero3" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert kind == {"sllm": "SLLM", "lm": "TokenLM"}[objective]
    assert measured == pytest.approx(evaluation["bits_per_byte"], abs=1e-5)
