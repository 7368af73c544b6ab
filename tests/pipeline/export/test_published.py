"""`sllm import`: state dicts with the names of the paper's own code give that code's logits.

Its forward is written again here, one sentence and one document at a time, with torch's own layers and
transformers' own OPT layers under a causal mask."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import IDS, opt_config, random_spans
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import OPTModel

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.cli import main as cli
from pipeline.data.batch import build_batch
from pipeline.data.windows import Span
from pipeline.evaluation.self_check import Checker
from pipeline.export.published import load_published
from pipeline.models.folders import parameter_count

# OPT-125M's shape: pre-norm. OPT-350M's: post-norm, embeddings narrower than the layers.
SHAPES = {"125m": {}, "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16}}


def waves(length: int, width: int) -> Tensor:
    """Sines in the even channels and cosines in the odd ones (Vaswani et al. 2017, §3.5)."""
    table = torch.empty(length, width, dtype=torch.float64)
    for place in range(length):
        for channel in range(width):
            angle = place / 10_000 ** ((channel - channel % 2) / width)
            table[place, channel] = math.cos(angle) if channel % 2 else math.sin(angle)
    return table.float()


class Half(nn.Module):
    """The published encoder or decoder: the names of its parameters, and what it computes."""

    def __init__(self, config, layers: int, decodes: bool):
        super().__init__()
        width, narrow = config.hidden_size, config.word_embed_proj_dim
        kind = nn.TransformerDecoderLayer if decodes else nn.TransformerEncoderLayer
        stack = nn.TransformerDecoder if decodes else nn.TransformerEncoder
        self.embed_token = nn.Embedding(config.vocab_size, narrow)
        if narrow != width:
            self.project_in = nn.Linear(narrow, width, bias=False)
        layer = kind(width, config.num_attention_heads, 2 * width, batch_first=True)
        setattr(self, "decoder" if decodes else "encoder", stack(layer, layers))
        if decodes:
            self.linear = nn.Linear(width, config.vocab_size)
        else:
            self.lnorm = nn.LayerNorm(width)

    def embedded(self, symbols: list[int]) -> Tensor:
        x = self.embed_token(torch.tensor(symbols))
        x = self.project_in(x) if hasattr(self, "project_in") else x
        return x + waves(len(symbols), x.shape[1])


class Theirs(nn.Module):
    """Their SentenceVAE."""

    def __init__(self, config, layers: int):
        super().__init__()
        self.encoder, self.decoder = (Half(config, layers, decodes) for decodes in (False, True))

    def encode(self, sentence: list[int]) -> Tensor:
        x = self.encoder.embedded([IDS["eos_token_id"], *sentence])  # OPT's tokenizer puts </s> first
        return self.encoder.lnorm(self.encoder.encoder(x[None]).sum(1))

    def logits(self, sentence: list[int], vector: Tensor) -> Tensor:
        x = self.decoder.embedded([IDS["eos_token_id"], *sentence])
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        return self.decoder.linear(self.decoder.decoder(x[None], vector[None], tgt_mask=mask))[0]


class TheirSLLM(nn.Module):
    def __init__(self, config, layers: int):
        super().__init__()
        self.svae = Theirs(config, layers)
        opt = OPTModel._from_config(config, attn_implementation="eager")
        self.llm_pe, self.llm_layers = opt.decoder.embed_positions, opt.decoder.layers
        self.fc = nn.Linear(config.hidden_size, 2)

    def hidden(self, vectors: Tensor) -> Tensor:
        """Causal outputs of a document's vectors [S, d]. OPT's table has two rows before place 0."""
        x = (vectors + self.llm_pe.weight[2 : 2 + len(vectors)])[None]
        mask = torch.full((len(vectors), len(vectors)), -torch.inf).triu(1)[None, None]
        for layer in self.llm_layers:
            x = layer(x, attention_mask=mask)
            x = x[0] if isinstance(x, tuple) else x
        return x[0]


def random_weights(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def setting(shape: str):
    ids = IDS | {"bos_token_id": IDS["eos_token_id"]}  # one symbol, as OPT has it
    return opt_config(max_position_embeddings=64, **{**ids, **SHAPES[shape]})


def opt_folder(path: Path, config) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def sentences(span: Span) -> list[list[int]]:
    cuts = span.sentence_lengths.cumsum()[:-1]
    return [part.tolist() for part in torch.tensor(span.tokens).tensor_split(torch.tensor(cuts))]


def our_logits(model, batch, vectors: Tensor) -> Tensor:
    vae = getattr(model, "vae", model)
    inputs, _ = batch.decoder_symbols(vae.config.bos_token_id, vae.config.eos_token_id)
    return vae.head(vae.decoder(batch.decoder_rows(inputs, vae.config.bos_token_id), vectors))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_sentence_vae_gives_their_logits(shape, layers, tmp_path):
    config = setting(shape)
    theirs = random_weights(Theirs(config, layers))
    save_file(theirs.state_dict(), tmp_path / "vae.safetensors")
    model = load_published(tmp_path / "vae.safetensors", opt_folder(tmp_path / "opt", config))
    assert parameter_count(model) == parameter_count(theirs)
    spans = random_spans(3)
    batch = build_batch(spans)
    expected = torch.cat([theirs.logits(s, theirs.encode(s)) for span in spans for s in sentences(span)])
    torch.testing.assert_close(our_logits(model, batch, model.encode(batch)), expected, atol=1e-5, rtol=1e-5)
    _, targets = batch.decoder_symbols(2, 2)
    nll = F.cross_entropy(expected, targets, reduction="none")
    torch.testing.assert_close(model(batch).target_nll_N, nll, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_an_sllm_gives_their_logits_under_a_causal_mask(shape, tmp_path):
    config = setting(shape)
    theirs = random_weights(TheirSLLM(config, 1))
    state = {"meta": {"epoch": 1}, "state_dict": {k: v.half() for k, v in theirs.state_dict().items()}}
    theirs.load_state_dict({k: v.float() for k, v in state["state_dict"].items()})
    torch.save(state, tmp_path / "best.pth")
    model = load_published(tmp_path / "best.pth", opt_folder(tmp_path / "opt", config))
    width = config.hidden_size
    assert parameter_count(model) == parameter_count(theirs) + width  # the start vector
    spans = random_spans(5)
    batch = build_batch(spans)
    logits, stops = [], []
    for span in spans:
        document = sentences(span)
        hidden = theirs.hidden(torch.cat([theirs.svae.encode(s) for s in document]))
        vectors = torch.cat([theirs.hidden(torch.zeros(1, width)), hidden])  # the first one has no sentence
        logits += [theirs.svae.logits(s, v[None]) for s, v in zip(document, vectors, strict=False)]
        stops.append(theirs.fc(hidden)[:, 0] - theirs.fc(hidden)[:, 1])  # theirs is 1 for "continue"
    vectors = model.sentence_vectors(batch)
    torch.testing.assert_close(our_logits(model, batch, vectors), torch.cat(logits), atol=1e-5, rtol=1e-5)
    out = model._stop_logits(model.contextualise(batch)[batch.predicting_row_S + 1])
    torch.testing.assert_close(out, torch.cat(stops), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_imported_model_keeps_every_guarantee(shape, tmp_path):
    config = setting(shape)
    save_file(random_weights(TheirSLLM(config, 1)).state_dict(), tmp_path / "sllm.safetensors")
    model = load_published(tmp_path / "sllm.safetensors", opt_folder(tmp_path / "opt", config))
    for finding in Checker(model, documents=4, tolerance=1e-5).run():
        assert finding.passed and finding.compared, finding
    # A prompt that is read at once is one that was written a sentence at a time.
    document = sentences(random_spans(8, documents=1)[0])
    one_by_one, at_once = model.begin(), model.new_state(1)
    for sentence in document:
        model.append(one_by_one, sentence)
    model.read(at_once, np.zeros(1, dtype=np.int64), [document])
    assert at_once.cache.lengths[0] == one_by_one.cache.lengths[0] == len(document)
    torch.testing.assert_close(at_once.hidden, one_by_one.hidden, atol=1e-5, rtol=1e-5)


@pytest.fixture
def theirs(tmp_path, tiny_tokenizer):
    """(checkpoint, folder of the OPT) with the tests' tokenizer."""
    tokenizer = load_tokenizer(tiny_tokenizer)
    opt = shutil.copytree(tiny_tokenizer, tmp_path / "opt")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = opt_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048, **ids)
    opt_folder(opt, config)
    path = tmp_path / "sllm.pth"
    torch.save(random_weights(TheirSLLM(config, 1)).state_dict(), path)
    return path, opt


def test_an_imported_model_is_evaluated_as_any_other(theirs, tmp_path, tiny_corpus, capsys):
    path, opt = theirs
    output = str(tmp_path / "model")
    assert cli.main(["import", str(path), "--opt", str(opt), "--output", output, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "sllm"
    text = str(tiny_corpus / "valid.jsonl")
    assert cli.main(["evaluate", "--model", output, "--text", text, "--max-documents", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sentence_settings"]["max_tokens"] == 63 and result["shuffle_gain"] is not None
    # Its own output is replaced, another folder is not.
    assert cli.main(["import", str(path), "--opt", str(opt), "--output", output]) == 0
    assert "imported" in capsys.readouterr().out
    with pytest.raises(UserError, match="was not written by"):
        cli.main(["import", str(path), "--opt", str(opt), "--output", str(opt)])


class Anything:
    """An object that a checkpoint must not bring with it."""


def test_what_is_not_theirs_is_refused_in_one_line(theirs, tmp_path):
    path, opt = theirs
    state = torch.load(path)

    def refused(says: str, values: object, folder: Path = opt) -> None:
        torch.save(values, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=says) as error:
            load_published(tmp_path / "bad.pth", folder)
        assert "\n" not in str(error.value)

    refused("cannot be read as tensors alone", {"state_dict": state, "hub": Anything()})
    refused("holds no state_dict", {"state_dict": [1, 2]})
    refused("learned fusion", {**state, "svae.encoder.la.weight": torch.zeros(1, 32)})
    refused("neither their SentenceVAE nor their SLLM", {"a.weight": torch.zeros(2)})
    refused("llm_extra.weight is .3. there", {**state, "llm_extra.weight": torch.zeros(3)})
    refused("stop_head.bias is missing", {k: v for k, v in state.items() if k != "fc.bias"})
    refused("nan|finite", {**state, "fc.bias": torch.full((2,), math.nan)})
    wide = opt_folder(tmp_path / "wide", opt_config(hidden_size=48))
    refused(r"is \[97, 32\] there|is \[\d+, 32\] there and", state, wide)
    (tmp_path / "wide" / "config.json").write_text('{"model_type": "llama"}')
    refused("model_type is llama, not opt", state, wide)
    (tmp_path / "bad.pth").write_bytes(b"no archive")
    for name in ("bad.pth", "nowhere.pth"):
        with pytest.raises(UserError, match="cannot be read|does not exist"):
            load_published(tmp_path / name, opt)
