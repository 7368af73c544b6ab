"""The model contract: strictly causal, packed = single, cached = uncached, head and loss right, sizes as
published."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.backbone_families import family_lm, family_sllm
from helpers.models import (
    FORWARD_PATHS,
    cached_scores,
    opt_config,
    plain_nll,
    post_norm_opt_config,
    random_batch,
    random_spans,
    small_lm,
    small_sllm,
    small_vae,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, OPTForCausalLM, OPTModel

from pipeline.data.batch import build_batch, empty_batch
from pipeline.data.segments import SegmentLayout
from pipeline.data.windows import Span
from pipeline.models.attention import attention_path

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SEES_2 = {"positions": "rotary", "context_sentences": 2}
MODELS = {
    "vae": lambda: small_vae(),
    "sllm": lambda: small_sllm(),
    "sllm-post-norm": lambda: small_sllm(backbone=post_norm_opt_config()),
    "sllm-tied": lambda: small_sllm(tie_word_embeddings=True),
    "sllm-narrow-embedding": lambda: small_sllm(embedding_size=16),
    "sllm-prefix-context": lambda: small_sllm(
        condition="prefix", prefix_slots=2, **SEES_2, fusion="attention", vectors=2
    ),
    "sllm-without-vectors": lambda: small_sllm(condition="none", **SEES_2),
    "lm": lambda: small_lm(),
    "lm-post-norm": lambda: small_lm(config=post_norm_opt_config()),
}


def total(sums) -> float:
    return (sums.token_nll + sums.end_nll + sums.stop_nll).item()


# --- causality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FORWARD_PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_changing_a_sentence_changes_nothing_before_it(name, path):
    model = MODELS[name]()
    spans = random_spans(5, documents=3, most_sentences=6)
    batch = build_batch(spans)
    document, sentence = 1, len(spans[1].sentence_lengths) // 2
    assert sentence >= 1
    at = int(spans[1].sentence_lengths[:sentence].sum())
    tokens = spans[1].tokens.copy()
    tokens[at : at + spans[1].sentence_lengths[sentence]] = (
        4 + (tokens[at : at + spans[1].sentence_lengths[sentence]] + 7) % 90
    )
    changed = build_batch(
        [spans[0], Span(tokens, spans[1].sentence_lengths, spans[1].document_end), spans[2]]
    )
    with attention_path(path), torch.no_grad():
        a, b = model(batch), model(changed)
    difference = (a.target_nll_N - b.target_nll_N).abs()
    # The first target of the changed sentence, in the order of each model's targets.
    first = int(batch.cu_documents[document]) + sentence
    token_at = int(batch.cu_sentences[first])
    if name.startswith("lm"):
        row = token_at + sum(s.document_end for s in spans[:document])
        other_documents = difference[
            int(batch.cu_sentences[batch.cu_documents[2]]) + sum(s.document_end for s in spans[:2]) :
        ]
    else:
        row = token_at + first
        other_documents = difference[
            int(batch.cu_sentences[batch.cu_documents[2]]) + int(batch.cu_documents[2]) :
        ]
    assert difference[:row].max() <= 1e-5
    assert other_documents.max() <= 1e-5
    assert difference[row:].max() > 1e-3, "the perturbation was not seen at all"
    if a.stop_nll_S is not None:
        stops = (a.stop_nll_S - b.stop_nll_S).abs()
        assert stops[:first].max() <= 1e-5
        assert stops[first] > 1e-5


def test_a_later_sentence_does_see_an_earlier_one():
    model, spans = small_sllm(), random_spans(6, documents=1, most_sentences=7)
    assert len(spans[0].sentence_lengths) >= 3
    tokens = spans[0].tokens.copy()
    tokens[0] = 4 + (tokens[0] + 11) % 90
    with torch.no_grad():
        a = model(build_batch(spans)).target_nll_N
        b = model(build_batch([Span(tokens, spans[0].sentence_lengths, spans[0].document_end)])).target_nll_N
    last = int(spans[0].sentence_lengths[-1]) + 1
    assert (a[-last:] - b[-last:]).abs().max() > 1e-4


@pytest.mark.parametrize(("context", "layers"), [(1, 1), (2, 1), (1, 2)])
def test_a_decoder_sees_as_far_back_as_it_is_told(context, layers):
    model = small_sllm(condition="none", positions="rotary", context_sentences=context, layers=layers)
    lengths = np.full(8, 3)
    first = [Span(np.arange(4, 28), lengths, False), Span(np.arange(30, 54), lengths, True)]
    changed = [Span(np.r_[70, first[0].tokens[1:]], lengths, False), first[1]]
    with torch.no_grad():
        a, b = (model(build_batch(spans)).target_nll_N for spans in (first, changed))
    sees = ((a - b).abs().view(16, 4).amax(1) > 1e-5).tolist()  # by sentence
    reach = context * layers
    assert model.vae.decoder.remembers == reach
    assert sees == [True] * (1 + reach) + [False] * (15 - reach)


def test_the_encoder_looks_both_ways_within_its_sentence_only():
    model = small_vae().encoder
    tokens = torch.arange(10, 20)
    layout = SegmentLayout([4, 6])
    probe = []
    model.layers[-1].register_forward_hook(lambda module, inputs, output: probe.append(output.detach()))
    changed = tokens.clone()
    changed[3] = 50  # the last token of the first sentence
    with torch.no_grad():
        model(tokens, layout), model(changed, layout)
    difference = (probe[0] - probe[1]).abs().amax(1)
    assert difference[0] > 1e-4, "the first token must see the last one of its sentence"
    assert difference[4:].max() == 0


def test_the_stop_label_is_one_only_at_a_true_document_end():
    one = np.ones(3, dtype=np.int64)
    tokens = np.arange(4, 7)
    batch = build_batch([Span(tokens, one, False), Span(tokens, one, True), Span(tokens[:1], one[:1], False)])
    assert batch.stop_label_S.tolist() == [0, 0, 0, 0, 0, 1, 0]
    _, rows, targets = batch.token_model_symbols(bos=0, end=2)
    assert targets.tolist() == [4, 5, 6, 4, 5, 6, 2, 4]
    assert rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FORWARD_PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_of_a_packed_batch_is_the_loss_of_its_documents(name, path):
    model, spans = MODELS[name](), random_spans(7, documents=6)
    with attention_path(path), torch.no_grad():
        together = model(build_batch(spans), want_correct=True)
        apart = [model(build_batch([span]), want_correct=True) for span in spans]
    torch.testing.assert_close(
        together.target_nll_N, torch.cat([x.target_nll_N for x in apart]), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(together.target_correct_N, torch.cat([x.target_correct_N for x in apart]))
    assert total(together) == pytest.approx(sum(total(x) for x in apart), rel=1e-5)
    assert together.objective.item() == pytest.approx(total(together), rel=1e-5)


@pytest.mark.parametrize("name", ["vae", "sllm", "lm"])
def test_packed_gradients_are_the_sum_of_single_gradients(name):
    model, spans = MODELS[name](), random_spans(8)
    model(build_batch(spans)).objective.backward()
    together = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    for span in spans:
        model(build_batch([span])).objective.backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(
            together[key], p.grad, atol=2e-4, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient_also_from_the_empty_batch(name):
    model = MODELS[name]()
    sums = model(empty_batch())
    sums.objective.backward()
    assert sums.objective.item() == 0.0 and total(sums) == 0.0
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() == 0.0, key
    model.zero_grad()
    model(random_batch(9)).objective.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_the_token_model_is_the_hugging_face_model():
    wrapped, spans = small_lm(), random_spans(10)
    sums = wrapped(build_batch(spans))
    plain = OPTForCausalLM(opt_config()).eval()
    plain.load_state_dict(wrapped.model.state_dict())
    torch.testing.assert_close(sums.target_nll_N, plain_nll(plain, spans), atol=1e-4, rtol=1e-4)
    assert int(sums.is_end_N.sum()) == sum(span.document_end for span in spans)


@pytest.mark.parametrize("config", [opt_config, post_norm_opt_config])
def test_the_backbone_is_the_hugging_face_model(config):
    model, spans = small_sllm(backbone=config()), random_spans(11, documents=1)
    batch = build_batch(spans)
    plain = OPTModel(config()).eval()
    plain.load_state_dict(model.backbone.state_dict(), strict=False)
    with torch.no_grad():
        packed = model.contextualise(batch)
        x = torch.cat([model.start.weight, model.vae.encode(batch)])
        x = model._into(x)
        reference = plain(inputs_embeds=x[None]).last_hidden_state[0]
    torch.testing.assert_close(packed, reference, atol=1e-5, rtol=1e-4)


class _Waits(TorchDispatchMode):
    """Operations whose result needs a tensor's values on the host: on a GPU they stop the host until all that
    was started there has run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        if name in ("_local_scalar_dense", "nonzero", "masked_select") or (
            name in ("index", "index_put", "index_put_")
            and any(x is index for x in masks for index in args[1])
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"fusion": "mean"}, {"fusion": "attention", "layout": "paper"}], ids=str
)
def test_a_step_never_waits_for_a_tensors_values(options):
    models = [small_vae(variational=True, **options), small_vae(latent_noise=0.1, **options)]
    models += [small_sllm(**options), small_lm(), small_sllm(backbone=post_norm_opt_config())]
    for model in models:
        for module in model.train().modules():
            # transformers 5.17 draws LayerDrop's number on the host, so it stops no GPU.
            module.training &= not hasattr(module, "layerdrop")
        with _Waits() as waits:
            model(random_batch(3), want_correct=True).objective.backward()
        assert not waits.found
    with _Waits() as waits:
        (torch.arange(3)[torch.tensor([True, False, True])].sum() > 1).item()
    assert waits.found == ["index", "_local_scalar_dense"], "the measure sees what it is for"


# --- generation interface -------------------------------------------------------------------------


@pytest.mark.parametrize("config", [opt_config, post_norm_opt_config])
def test_cached_steps_equal_the_uncached_forward(config):
    model, spans = small_sllm(backbone=config()), random_spans(12, documents=1, most_sentences=7)
    span = spans[0]
    sums = model(build_batch(spans))
    nll, stops = cached_scores(model, span)
    torch.testing.assert_close(nll, sums.target_nll_N, atol=1e-5, rtol=1e-4)
    labels = torch.zeros(len(stops))
    labels[-1] = float(span.document_end)
    expected = F.binary_cross_entropy(stops, labels, reduction="none")
    torch.testing.assert_close(expected, sums.stop_nll_S, atol=1e-4, rtol=1e-3)


def test_limits_are_refused():
    model = small_sllm(backbone=opt_config(max_position_embeddings=4))
    state = model.begin()
    with pytest.raises(ValueError, match="no sentence yet"):
        model.stop_probability(state)
    for _ in range(3):
        model.append(state, [5, 6])
    with pytest.raises(ValueError, match="context is full"):
        model.append(state, [5, 6])
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        model.append(model.begin(), list(range(4, 21)))


# --- what a leak would look like ------------------------------------------------------------------


FLOOR = {
    "sllm": (lambda: small_sllm(vocab_size=12), "bucketed"),
    "sllm-llama-attention": (lambda: family_sllm("llama-wide", vocab_size=12, fusion="attention"), "masked"),
    "sllm-qwen3-mean": (lambda: family_sllm("qwen3", vocab_size=12, fusion="mean"), "bucketed"),
    "sllm-paper": (lambda: small_sllm(vocab_size=12, layout="paper"), "bucketed"),
    "lm": (lambda: small_lm(config=opt_config(vocab_size=12)), "bucketed"),
    "lm-llama": (lambda: family_lm("llama", vocab_size=12), "masked"),
}


@pytest.mark.parametrize("name", FLOOR)
def test_on_random_tokens_no_model_beats_the_entropy_floor(name):
    """I.i.d. uniform tokens over 8 symbols, sentences of fixed length: the floor is ln 8 a token and 0 for
    ends.

    The published system reached far below its floor on such data, because each position saw the sentence it
    had to predict. With attention that is not causal these models go 0.03 to 0.5 below it in as many steps.
    """
    (make, path), rng = FLOOR[name], np.random.default_rng(0)
    model = make().train()
    documents = 16 if path == "masked" else 32

    def batch(times: int = 1):
        return build_batch(
            [Span(4 + rng.integers(0, 8, 24), np.full(6, 4), True) for _ in range(times * documents)]
        )

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with attention_path(path):
        for _ in range(80):
            drawn = batch()
            optimizer.zero_grad()
            (model(drawn).objective / drawn.tokens).backward()
            optimizer.step()
    drawn = batch(8 * 32 // documents)
    with torch.no_grad():
        per_token = (model.eval()(drawn).token_nll / drawn.tokens).item()
    assert per_token > np.log(8) - 0.01
    assert per_token < np.log(8) + 0.10, "it should have learnt the symbol frequencies"


def test_an_autoencoder_does_beat_that_floor():
    """The SentenceVAE sees its target by design: the same data is learnt well below the floor (the floor
    test can fail)."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = small_vae(vocab_size=12).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = build_batch([Span(4 + rng.integers(0, 8, 24), np.full(6, 4), True) for _ in range(64)])
        optimizer.zero_grad()
        sums = model(batch)
        (sums.objective / batch.tokens).backward()
        optimizer.step()
    assert sums.token_nll.item() / batch.tokens < np.log(8) - 0.3


# --- sizes, saving --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae", "sllm", "sllm-tied", "sllm-post-norm"])
def test_save_and_load_round_trip(name, tmp_path):
    model, batch = MODELS[name](), random_batch(14)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).target_nll_N, model(batch).target_nll_N, atol=0, rtol=0)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_predicted_vectors_are_drawn_to_the_embedding_that_comes():
    """What is added is the angle to the next sentence's embedding; that embedding does not give way."""
    plain, drawn = small_sllm(), small_sllm()
    drawn.config.embedding_weight = 0.5
    batch = random_batch(4)
    before, after = plain(batch), drawn(batch)
    vectors_Sd = plain.contextualise(batch)[batch.predicting_row_S]
    targets_Sd = plain.vae.encode(batch).detach()
    cos_S = (vectors_Sd * targets_Sd).sum(-1) / (vectors_Sd.norm(dim=-1) * targets_Sd.norm(dim=-1))
    added = 0.5 * (1 - cos_S).sum()
    assert added > 0.1
    torch.testing.assert_close(after.objective, before.objective + added)
    assert torch.equal(after.target_nll_N, before.target_nll_N)
    (before.objective + added).backward()
    after.objective.backward()
    for (name, ours), theirs in zip(drawn.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
