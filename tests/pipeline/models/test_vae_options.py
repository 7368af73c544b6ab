"""SentenceVAE options: each does what it says, keeps the model contract (causal, packed = single, cached =
uncached, gradients everywhere), survives a round trip through its folder, and wrong values are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import (
    FORWARD_PATHS,
    IDS,
    cached_scores,
    opt_config,
    random_batch,
    random_spans,
    small_sllm,
    small_vae,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, OPTForCausalLM

from data_prep.common.errors import UserError
from data_prep.shards.reader import ShardSet
from pipeline.config.schema import load_recipe
from pipeline.data.batch import build_batch, empty_batch
from pipeline.data.segments import SegmentLayout
from pipeline.data.windows import Span
from pipeline.models.attention import attention_path
from pipeline.models.factory import build_model, load_model, save_model
from pipeline.models.layers import CrossAttention, PostNormLayer, TokenEmbedding, sinusoids
from pipeline.models.losses import LossSums
from pipeline.models.sentence_encoder import AttentionPooling, _sum_rows
from pipeline.models.sentence_vae import SentenceVAE, SentenceVAEConfig

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
VARIANTS = {
    "mean": {"fusion": "mean"},
    "attention": {"fusion": "attention"},
    "paper": {"layout": "paper"},
    "paper-narrow": {"layout": "paper", "embedding_size": 16, "fusion": "attention"},
    "published": {"layout": "paper", "published_inputs": True},
    "variational": {"variational": True, "kl_weight": 0.5, "free_bits": 0.1},
    "noise": {"latent_noise": 0.3},
    "last": {"fusion": "last", "encoder_layers": 1},
    "prefix": {"condition": "prefix", "prefix_slots": 3},
    "context": {"positions": "rotary", "context_sentences": 1},
    "context-3": {"positions": "rotary", "context_sentences": 3, "fusion": "last"},
    "vectors": {"fusion": "attention", "vectors": 2},
    "rotary": {"positions": "rotary"},
    "rotary-prefix": {
        "positions": "rotary",
        "condition": "prefix",
        "prefix_slots": 2,
        "context_sentences": 2,
        "tie_word_embeddings": True,
    },
    "vectors-prefix": {"fusion": "attention", "vectors": 2, "condition": "prefix"},
}


@pytest.fixture(params=VARIANTS)
def variant(request) -> dict:
    return VARIANTS[request.param]


# --- the model contract ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", FORWARD_PATHS)
@pytest.mark.parametrize("make", [small_vae, small_sllm], ids=["vae", "sllm"])
def test_packed_is_single(make, variant, path):
    model, spans = make(**variant), random_spans(7, documents=6)
    with attention_path(path), torch.no_grad():
        together = model(build_batch(spans), want_correct=True)
        apart = [model(build_batch([span]), want_correct=True) for span in spans]
    torch.testing.assert_close(
        together.target_nll_N, torch.cat([x.target_nll_N for x in apart]), atol=2e-5, rtol=1e-5
    )
    assert together.objective.item() == pytest.approx(sum(x.objective.item() for x in apart), rel=1e-5)
    assert together.kl.item() == pytest.approx(sum(x.kl.item() for x in apart), rel=1e-5)


@pytest.mark.parametrize("path", FORWARD_PATHS)
def test_changing_a_sentence_changes_nothing_before_it(variant, path):
    model, spans = small_sllm(**variant), random_spans(5, documents=1, most_sentences=6)
    lengths = spans[0].sentence_lengths
    sentence = len(lengths) // 2
    assert sentence >= 1
    at = int(lengths[:sentence].sum())
    tokens = spans[0].tokens.copy()
    tokens[at] = 4 + (tokens[at] + 7) % 90
    changed = build_batch([Span(tokens, lengths, spans[0].document_end)])
    with attention_path(path), torch.no_grad():
        a, b = model(build_batch(spans)), model(changed)
    difference = (a.target_nll_N - b.target_nll_N).abs()
    assert difference[: at + sentence].max() <= 1e-5
    assert difference[at + sentence :].max() > 1e-3
    stops = (a.stop_nll_S - b.stop_nll_S).abs()
    assert stops[:sentence].max() <= 1e-5 and stops[sentence:].max() > 1e-5
    last = int(lengths[-1]) + 1
    assert difference[-last:].max() > 1e-4, "a later sentence sees the changed one through the backbone"


def test_cached_steps_are_the_uncached_forward(variant):
    model, spans = small_sllm(**variant), random_spans(12, documents=1, most_sentences=7)
    sums = model(build_batch(spans))
    nll, stops = cached_scores(model, spans[0])
    torch.testing.assert_close(nll, sums.target_nll_N, atol=2e-5, rtol=1e-4)
    labels = torch.zeros(len(stops))
    labels[-1] = float(spans[0].document_end)
    expected = F.binary_cross_entropy(stops, labels, reduction="none")
    torch.testing.assert_close(expected, sums.stop_nll_S, atol=1e-4, rtol=1e-3)


def test_a_full_sentence_takes_no_further_symbol(variant):
    model = small_vae(**variant)
    state = model.decode_begin(torch.zeros(1, model.config.vector_size))
    for _ in range(16):
        model.decode_step(state, 5)
    with pytest.raises(ValueError, match="the sentence is full"):
        model.decode_step(state, 5)


def test_every_parameter_gets_a_gradient_also_from_the_empty_batch(variant):
    model = small_vae(**variant).train()
    sums = model(empty_batch())
    sums.objective.backward()
    assert sums.objective.item() == 0 and sums.kl.item() == 0
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() == 0, key
    model.zero_grad()
    model(random_batch(9)).objective.backward()
    for key, p in model.named_parameters():
        grad = p.grad
        if key.endswith(("condition.qkv.weight", "condition.qkv.bias")):
            # Query and key of attention over one vector: in the paper's table, of no use.
            assert grad[:64].abs().max() == 0
            grad = grad[64:]
        assert grad.abs().max() > 0, key


def test_a_folder_keeps_the_options(variant, tmp_path):
    model, batch = small_vae(**variant), random_batch(14)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    for key, value in variant.items():
        assert getattr(loaded.config, key) == getattr(again.config, key) == value
    with torch.no_grad():
        expected = model(batch)
        for other in (loaded, again):
            assert torch.equal(other(batch).target_nll_N, expected.target_nll_N)
            assert torch.equal(other(batch).kl, expected.kl)
    sllm = small_sllm(**variant)
    sllm.save_pretrained(tmp_path / "sllm")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "sllm")(batch).target_nll_N, sllm(batch).target_nll_N)


# --- fusion ---------------------------------------------------------------------------------------


def test_sum_and_mean_are_one_embedding_up_to_the_norms_epsilon():
    a, b, batch = small_vae(fusion="sum"), small_vae(fusion="mean"), random_batch(3, documents=20)
    with torch.no_grad():
        torch.testing.assert_close(a.encode(batch), b.encode(batch), atol=1e-4, rtol=1e-4)
        # It is the epsilon that is left: without any, nothing but rounding is.
        for model in (a, b):
            model.encoder.fusion_norm.eps = 0.0
        torch.testing.assert_close(a.encode(batch), b.encode(batch), atol=2e-6, rtol=2e-6)
        for model in (a, b):
            model.encoder.fusion_norm.eps = 1.0
        assert (a.encode(batch) - b.encode(batch)).abs().max() > 0.05


class _Sums(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "index_add":
            self.dtype = args[0].dtype
        return func(*args, **(kwargs or {}))


def test_half_precision_rows_are_added_up_in_full():
    """On CPUs index_add does so by itself; on GPUs it would round after each of 64 additions."""
    layout = SegmentLayout([64, 3, 64])
    x = torch.rand(layout.rows, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = torch.stack([part.double().sum(0) for part in x.split([64, 3, 64])])
    with _Sums() as sums:
        torch.testing.assert_close(_sum_rows(x, layout), exact.bfloat16(), atol=0, rtol=0)
    assert sums.dtype == torch.float32


def test_attention_pooling_is_a_softmax_over_each_sentence():
    torch.manual_seed(0)
    width, heads, lengths = 12, 3, [5, 1, 9, 2]
    pooling = AttentionPooling(width, heads).double()
    x = (3 * torch.randn(17, width)).double().requires_grad_()
    probe = torch.randn(4, width).double()
    rows, at = [], 0
    for length in lengths:
        sentence = x[at : at + length]
        weights = pooling.queries(F.layer_norm(sentence, (width,))).softmax(0)  # [L, H]
        rows.append((sentence.view(length, heads, -1) * weights[..., None]).sum(0).flatten())
        at += length
    parameters = (x, pooling.queries.weight)
    expected = torch.autograd.grad((torch.stack(rows) * probe).sum(), parameters)
    out = pooling(x, SegmentLayout(lengths))
    torch.testing.assert_close(out, torch.stack(rows), atol=1e-6, rtol=1e-6)
    for a, b in zip(torch.autograd.grad((out * probe).sum(), parameters), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_attention_pooling_bears_large_scores():
    pooling = AttentionPooling(8, 2)
    with torch.no_grad():
        pooling.queries.weight.fill_(0).view(-1)[::3] = 1e4
    x = torch.randn(6, 8, requires_grad=True)
    out = pooling(x, SegmentLayout([4, 2]))
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


# --- noise and the variational mode ---------------------------------------------------------------


def decoded_vectors(model: SentenceVAE, batch, monkeypatch) -> torch.Tensor:
    """What the decoder is given."""
    seen = []
    real = model.decode_loss
    monkeypatch.setattr(
        model, "decode_loss", lambda b, vector, want: (seen.append(vector), real(b, vector, want))[1]
    )
    model(batch)
    return seen[0].detach()


def test_latent_noise_acts_in_training_only(monkeypatch):
    model, batch = small_vae(latent_noise=0.3), random_batch(4, documents=40)
    clean = model.encode(batch).detach()
    assert torch.equal(decoded_vectors(model, batch, monkeypatch), clean)
    noise = decoded_vectors(model.train(), batch, monkeypatch) - clean
    assert noise.std().item() == pytest.approx(0.3, rel=0.05)
    assert noise.mean().abs() < 0.02
    torch.testing.assert_close(model.encode(batch), clean)  # what the SLLM reads, in training too


def test_the_variational_mode_is_the_textbooks(monkeypatch):
    weight, free = 0.5, 1.8
    model = small_vae(variational=True, kl_weight=weight, free_bits=free)
    plain, batch = small_vae(), random_batch(4, documents=40)
    plain.load_state_dict(model.state_dict(), strict=False)
    mean, log_variance = model.encoder(batch.tokens_T, batch.sentence_layout, with_variance=True)
    spread = (0.5 * log_variance).exp()
    normal = torch.distributions.Normal(mean, spread)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert (kl < free).any() and (kl > free).any()
    evaluated = model(batch)
    torch.testing.assert_close(evaluated.kl, kl.sum().detach(), rtol=1e-4, atol=1e-4)
    nats = plain(batch)
    # Evaluation decodes the mean, and its nats are those of reconstruction alone.
    torch.testing.assert_close(evaluated.target_nll_N, nats.target_nll_N)
    expected = nats.objective + weight * kl.clamp_min(free).sum()
    torch.testing.assert_close(evaluated.objective, expected, rtol=1e-4, atol=1e-3)
    assert not evaluated.kl.requires_grad

    vectors = decoded_vectors(model.train(), batch, monkeypatch)
    away = ((vectors - mean) / spread).detach()
    assert away.mean().abs() < 0.05 and away.std().item() == pytest.approx(1, rel=0.05)
    torch.testing.assert_close(model.encode(batch), mean)


def test_free_channels_are_not_pressed_further():
    batch = random_batch(4)
    model = small_vae(variational=True, free_bits=1e6)
    model(batch).objective.backward()
    assert model.encoder.log_variance.weight.grad.abs().max() == 0


def test_a_new_variational_model_starts_near_its_means():
    torch.manual_seed(0)
    model = SentenceVAE(SentenceVAEConfig(variational=True, vocab_size=97, hidden_size=32, heads=4, **IDS))
    _, log_variance = model.encoder(torch.arange(9), SegmentLayout([9]), with_variance=True)
    assert (log_variance + 4).abs().max() < 1


@pytest.mark.parametrize("training", [False, True])
def test_the_sllm_reads_means_without_noise(training):
    batch = random_batch(4)
    for options in ({"variational": True}, {"latent_noise": 0.5}):
        model = small_sllm(**options).train(training)
        first = model(batch)
        if model.vae.encoder.log_variance is not None:
            nn.init.normal_(model.vae.encoder.log_variance.weight)
        torch.testing.assert_close(model(batch).target_nll_N, first.target_nll_N)
        assert first.kl.item() == 0
        tokens = batch.tokens_T[: int(batch.cu_sentences[1])]
        found = model._encode(model.new_state(1), [tokens.tolist()])
        torch.testing.assert_close(found, model.vae.encode(batch)[:1])


# --- the published layout -------------------------------------------------------------------------


def copy_attention(theirs: nn.MultiheadAttention, qkv: nn.Linear, out: nn.Linear) -> None:
    theirs.load_state_dict(
        {
            "in_proj_weight": qkv.weight,
            "in_proj_bias": qkv.bias,
            "out_proj.weight": out.weight,
            "out_proj.bias": out.bias,
        }
    )


@pytest.mark.parametrize("conditioned", [False, True], ids=["encoder", "decoder"])
def test_the_published_layer_is_torchs(conditioned):
    torch.manual_seed(0)
    width, heads, lengths = 16, 4, [5, 9, 1]
    ours = PostNormLayer(width, heads, 2 * width, 0.1, conditioned).eval()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    kind = nn.TransformerDecoderLayer if conditioned else nn.TransformerEncoderLayer
    theirs = kind(width, heads, 2 * width, batch_first=True).eval()
    copy_attention(theirs.self_attn, ours.attention.qkv, ours.attention.out)
    norms = [ours.attention_norm, ours.ffn_norm]
    if conditioned:
        copy_attention(theirs.multihead_attn, ours.condition.qkv, ours.condition.out)
        norms.insert(1, ours.condition_norm)
    for number, norm in enumerate(norms, 1):
        getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())
    theirs.linear1.load_state_dict(ours.ffn_in.state_dict())
    theirs.linear2.load_state_dict(ours.ffn_out.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x, vectors = torch.randn(sum(lengths), width), torch.randn(len(lengths), width)
    with torch.no_grad():
        got = ours(x, SegmentLayout(lengths), conditioned, vectors if conditioned else None)
        for row, rows in zip(vectors, x.split(lengths), strict=True):
            if conditioned:
                mask = nn.Transformer.generate_square_subsequent_mask(len(rows))
                want = theirs(rows[None], row[None, None], tgt_mask=mask)[0]
            else:
                want = theirs(rows[None])[0]
            torch.testing.assert_close(got[: len(rows)], want, atol=1e-5, rtol=1e-5)
            got = got[len(rows) :]


def test_the_published_positions():
    waves = sinusoids(65, 8)
    for position in (0, 1, 64):
        for channel in range(8):
            angle = position / 10_000 ** (channel // 2 * 2 / 8)
            want = np.cos(angle) if channel % 2 else np.sin(angle)
            assert waves[position, channel].item() == pytest.approx(want, abs=1e-5)
    embedding = TokenEmbedding(10, 8, 8, 65, kind="sinusoidal")
    assert [name for name, _ in embedding.named_parameters()] == ["token.weight"]
    assert not list(embedding.buffers())
    out = embedding(torch.tensor([3, 3]), torch.tensor([0, 7]))
    torch.testing.assert_close(out[1] - out[0], waves[7] - waves[0])


def test_the_query_of_attention_over_one_vector_counts_for_nothing():
    torch.manual_seed(0)
    attention, vectors = CrossAttention(16, 4), torch.randn(5, 16)
    before = attention(vectors)
    with torch.no_grad():
        attention.qkv.weight[:32].normal_(std=30)
    assert torch.equal(attention(vectors), before)


def test_the_published_backbone_is_opts_layers_without_norm_and_projections():
    """OPT-350M's shape, whose own model has projections around 512 channels."""
    narrow = opt_config(do_layer_norm_before=False, word_embed_proj_dim=16)
    for config in (opt_config(), narrow):
        model = small_sllm(layout="paper", backbone=config)
        decoder = model.backbone.decoder
        assert decoder.final_layer_norm is None and decoder.project_in is None and decoder.project_out is None
        assert model.to_backbone is None and model.from_backbone is None
        assert model.stop_head.out_features == 2
    assert narrow.word_embed_proj_dim == 16, "the caller's config is left alone"
    lean = small_sllm(backbone=opt_config())
    assert lean.backbone.decoder.final_layer_norm is not None and lean.stop_head.out_features == 1


def test_the_published_stop_head_is_a_choice_of_two():
    model, batch = small_sllm(layout="paper"), random_batch(4)
    logits = model.stop_head(model.contextualise(batch)[batch.predicting_row_S + 1])
    expected = F.cross_entropy(logits, batch.stop_label_S.long(), reduction="none")
    torch.testing.assert_close(model(batch).stop_nll_S, expected.detach())


def test_weights_of_a_pretrained_backbone_reach_the_published_layout(tokenizer, tmp_path):
    plain = OPTForCausalLM(opt_config(max_position_embeddings=300))
    plain.save_pretrained(tmp_path)
    model = build_model(
        "sllm", {**SIZES, "layout": "paper"}, {"path": str(tmp_path)}, tokenizer, SETTINGS, 256
    )
    taken = model.backbone.state_dict()
    assert "decoder.layers.1.fc1.weight" in taken and "decoder.final_layer_norm.weight" not in taken
    for key, value in taken.items():
        assert torch.equal(value, plain.model.state_dict()[key]), key


def test_dropout_acts_where_published_code_has_it(monkeypatch):
    """OPT (lean): on what attention and feed-forward part add. torch's layers (paper): also inside the
    feed-forward part and on attention weights."""
    from pipeline.models import layers

    for layout, in_layer in (("lean", {"encoder": 2, "decoder": 3}), ("paper", {"encoder": 3, "decoder": 4})):
        model, seen = small_vae(layout=layout, dropout=0.25, layers=1).train(), []
        real = layers.packed_attention
        monkeypatch.setattr(
            layers,
            "packed_attention",
            lambda *a, dropout=0.0, real=real, seen=seen, **k: (seen.append(dropout), real(*a, **k))[1],
        )
        for part, count in in_layer.items():
            calls = []
            getattr(model, part).layers[0].dropout.register_forward_hook(
                lambda *_, calls=calls: calls.append(1)
            )
            in_layer[part] = (count, calls)
        model(random_batch(2))
        monkeypatch.setattr(layers, "packed_attention", real)
        assert {part: len(calls) for part, (_, calls) in in_layer.items()} == {
            part: count for part, (count, _) in in_layer.items()
        }
        assert seen == ([0.25] * 2 if layout == "paper" else [0.0] * 2)
        first, second = model(random_batch(2)), model(random_batch(2))
        assert not torch.equal(first.target_nll_N, second.target_nll_N)
        model.eval()
        assert torch.equal(model(random_batch(2)).target_nll_N, model(random_batch(2)).target_nll_N)


# --- embeddings from a token model ----------------------------------------------------------------


SIZES = {"hidden_size": 32, "layers": 1, "heads": 4}
SETTINGS = {"segmenter": "clause", "language": "en", "max_tokens": 64}


@pytest.fixture(scope="module")
def tokenizer(tiny_shards):
    return ShardSet.open(tiny_shards).tokenizer()


def token_model(folder, **config) -> OPTForCausalLM:
    torch.manual_seed(5)
    model = OPTForCausalLM(opt_config(**config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("objective", ["vae", "sllm"])
def test_embeddings_start_from_a_token_model(objective, tied, tokenizer, tmp_path):
    source = token_model(tmp_path / "opt", vocab_size=tokenizer.vocab_size + 7)
    settings = {**SIZES, "tie_word_embeddings": tied, "init_embeddings_from": str(tmp_path / "opt")}
    backbone = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "ffn_dim": 64}
    model = build_model(objective, settings, backbone, tokenizer, SETTINGS, 256)
    vae = model if objective == "vae" else model.vae
    rows = source.get_input_embeddings().weight[: tokenizer.vocab_size]
    for weight in (vae.encoder.embedding.token.weight, vae.decoder.embedding.token.weight, vae.head.weight):
        assert torch.equal(weight, rows)
    assert settings["init_embeddings_from"], "the recipe's settings are left alone"
    save_model(model, tmp_path / "model", tokenizer)
    assert "init_embeddings_from" not in (tmp_path / "model" / "config.json").read_text()
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    assert torch.equal(load_model(tmp_path / "model").get_input_embeddings().weight, rows)


def test_an_untied_head_of_the_source_goes_to_the_head(tokenizer, tmp_path):
    source = token_model(tmp_path, vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
    model = build_model("vae", {**SIZES, "init_embeddings_from": tmp_path}, {}, tokenizer, SETTINGS, 256)
    assert not torch.equal(source.lm_head.weight, source.get_input_embeddings().weight)
    assert torch.equal(model.head.weight, source.lm_head.weight)
    assert torch.equal(model.encoder.embedding.token.weight, source.get_input_embeddings().weight)


def test_a_narrow_embedding_fits_and_leaves_the_wider_head_alone(tokenizer, tmp_path):
    """OPT-350M's case: 512 channels into `embedding_size: 512`, the head 1024 wide."""
    source = token_model(tmp_path, vocab_size=tokenizer.vocab_size, word_embed_proj_dim=16)
    settings = {**SIZES, "embedding_size": 16, "init_embeddings_from": tmp_path}
    torch.manual_seed(0)
    model = build_model("vae", settings, {}, tokenizer, SETTINGS, 256)
    assert torch.equal(model.decoder.embedding.token.weight, source.get_input_embeddings().weight)
    assert model.head.weight.shape[1] == 32 and 0.015 < model.head.weight.std() < 0.025


def test_token_models_that_do_not_fit_are_refused(tokenizer, tmp_path):
    def build(folder, **sizes):
        settings = {**SIZES, **sizes, "init_embeddings_from": str(folder)}
        return build_model("vae", settings, {}, tokenizer, SETTINGS, 256)

    token_model(tmp_path / "wide", vocab_size=tokenizer.vocab_size, word_embed_proj_dim=48, hidden_size=48)
    with pytest.raises(UserError, match="48 wide, these 32: set model.vae.embedding_size 48"):
        build(tmp_path / "wide")
    token_model(tmp_path / "small", vocab_size=tokenizer.vocab_size - 1)
    with pytest.raises(UserError, match=f"it has {tokenizer.vocab_size - 1} entries"):
        build(tmp_path / "small")
    with pytest.raises(UserError, match="nowhere does not exist"):
        build(tmp_path / "nowhere")
    small_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="not a token-level"):
        build(tmp_path / "vae")


# --- recipes and refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fusion": "max"}, "model.vae.fusion must be one of sum, mean, attention, last, not 'max'"),
        ({"layout": "fat"}, "model.vae.layout must be one of lean, paper"),
        ({"dropout": 1.0}, "model.vae.dropout must be a number of at least 0 and below 1, not 1.0"),
        ({"dropout": "much"}, "model.vae.dropout must be a number"),
        ({"dropout": True}, "model.vae.dropout must be a number"),
        ({"latent_noise": -0.1}, "model.vae.latent_noise must be a number of at least 0, not -0.1"),
        ({"latent_noise": float("nan")}, "model.vae.latent_noise must be"),
        ({"latent_noise": float("inf")}, "model.vae.latent_noise must be"),
        ({"variational": 1}, "model.vae.variational must be true or false, not 1"),
        ({"variational": True, "kl_weight": -1}, "model.vae.kl_weight must be"),
        ({"variational": True, "free_bits": -1}, "model.vae.free_bits must be"),
        ({"variational": True, "latent_noise": 0.1}, "both put noise on the embedding: set one"),
        ({"kl_weight": 0.1}, "need model.vae.variational true"),
        ({"free_bits": 0.1}, "need model.vae.variational true"),
        ({"prefix_slots": 4}, "prefix_slots 4 needs model.vae.condition prefix, not cross_attention"),
        ({"condition": "none", "condition_range": 0.02}, "condition_range is for condition cross_attention"),
        ({"layout": "paper", "condition_range": 0.02}, "condition_range is for .* and layout lean"),
        ({"context_sentences": 1}, "context_sentences 1 needs model.vae.positions rotary"),
        ({"vectors": 2}, "model.vae.vectors 2 needs model.vae.fusion attention, not sum"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, says, tokenizer):
    with pytest.raises(UserError, match=says) as error:
        build_model("vae", {**SIZES, **settings}, {}, tokenizer, SETTINGS, 256)
    assert "\n" not in str(error.value)


def test_the_published_layout_wants_an_opt_backbone(tokenizer):
    backbone = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
    }
    build_model("sllm", SIZES, backbone, tokenizer, SETTINGS, 256)
    with pytest.raises(UserError, match="layout paper is laid around an OPT backbone, not llama"):
        build_model("sllm", {**SIZES, "layout": "paper"}, backbone, tokenizer, SETTINGS, 256)


def test_recipes_know_every_option(tmp_path, tokenizer):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "objective: vae\noutput_dir: runs/x\ndata: {shards: [s]}\ntraining: {max_steps: 1}\n"
        "model: {vae: {hidden_size: 32, layers: 1, heads: 4, dropout: 1e-1}}\n"
    )
    options = "layout=paper fusion=attention variational=true kl_weight=1e-2 free_bits=0.05"
    overrides = [f"--model.vae.{option}" for option in options.split()]
    loaded = load_recipe(recipe, [*overrides, "--loss.label_smoothing", "0.1", "--loss.z_loss=1e-4"])
    assert loaded.loss.head_settings() == {"focal_gamma": 0.0, "label_smoothing": 0.1, "z_loss": 1e-4}
    model = build_model("vae", loaded.model.vae, {}, tokenizer, SETTINGS, 256, **loaded.loss.head_settings())
    config = json.loads(model.config.to_json_string(use_diff=False))
    expected = {
        "layout": "paper",
        "fusion": "attention",
        "variational": True,
        "kl_weight": 0.01,
        "free_bits": 0.05,
        "dropout": 0.1,
        "label_smoothing": 0.1,
        "z_loss": 1e-4,
    }
    assert {key: config[key] for key in expected} == expected
    load_recipe(recipe, ["--model.vae.latent_noise", "0.1", "--model.vae.init_embeddings_from", "opt"])
    focal = load_recipe(recipe, ["--loss.kind", "focal"]).loss.head_settings()
    assert focal == {"focal_gamma": 2.0, "label_smoothing": 0.0, "z_loss": 0.0}


def test_an_unscored_batch_counts_as_nothing() -> None:
    figures = torch.tensor([1.0, 2.0]), torch.tensor([False, True]), None, torch.tensor([3.0])
    scored, unscored = (
        LossSums.collect(one, torch.tensor(6.0), *figures, kl=torch.tensor(4.0)) for one in (True, False)
    )
    names = ("objective", "token_nll", "end_nll", "stop_nll", "kl")
    assert [float(getattr(scored, name)) for name in names] == [6, 1, 2, 3, 4]
    assert [float(getattr(unscored, name)) for name in names] == [0] * 5
