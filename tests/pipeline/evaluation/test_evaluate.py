"""The metric contract: closed forms, hand-computed sums, independence of packing and of the way the data
come in.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers import ranks
from helpers.model_folders import SETTINGS, WINDOW_TOKENS, save, small_model, write_jsonl
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from data_prep.common.errors import UserError
from data_prep.shards.reader import ShardSet
from data_prep.text.segmenter import get_segmenter
from data_prep.text.sentences import cut_document
from data_prep.text.tokenizer import load_tokenizer, train_sentencepiece
from pipeline.data.batch import build_batch
from pipeline.data.windows import Span, document_spans
from pipeline.evaluation.evaluate import evaluate, format_result, score
from pipeline.evaluation.reconstruction import edit_distances, rebuild
from pipeline.evaluation.scores import Window, interval

KINDS = ("sllm", "vae", "lm")
COUNTS = ("bytes", "tokens", "sentences", "documents", "windows", "window_tokens", "data_fingerprint")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def documents(tiny_valid_shards):
    """(tokens, sentence lengths) of every validation document, and their text's bytes in all."""
    documents = list(ShardSet.open(tiny_valid_shards).documents())
    return [(d.tokens.astype(int), d.sentence_lengths.astype(int)) for d in documents], sum(
        d.bytes for d in documents
    )


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """One random model folder per kind."""
    base = tmp_path_factory.mktemp("models")
    return {kind: save(small_model(kind, tokenizer), base / kind, tokenizer) for kind in KINDS}


def windows_by_hand(lengths) -> list[list[int]]:
    """Sentence lengths of each window: as many whole sentences as fit into WINDOW_TOKENS."""
    windows = [[]]
    for length in lengths:
        if sum(windows[-1]) + length > WINDOW_TOKENS:
            windows.append([])
        windows[-1].append(length)
    return windows


def assert_same(ours: dict, theirs: dict, but: set[str] = frozenset()) -> None:
    """Equal results, up to the rounding of a model that is fed other batches."""
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - but:
        if isinstance(ours[key], dict):
            assert_same(ours[key], theirs[key])
        elif isinstance(ours[key], float | list):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-6, abs=1e-6), key
        else:
            assert theirs[key] == ours[key], key


# --- closed forms ---


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_model_gives_the_closed_form(kind, tokenizer, documents, tiny_valid_shards, tmp_path):
    model = small_model(kind, tokenizer)
    with torch.no_grad():
        if kind == "lm":
            model.model.get_output_embeddings().weight.zero_()
        else:
            head = model.head if kind == "vae" else model.vae.head
            head.weight.zero_(), head.bias.zero_()
        if kind == "sllm":
            model.stop_head.weight.zero_(), model.stop_head.bias.zero_()
    result = evaluate(save(model, tmp_path / "uniform", tokenizer), data=tiny_valid_shards)

    documents, text_bytes = documents
    tokens, sentences = sum(len(t) for t, _ in documents), sum(len(s) for _, s in documents)
    ends = len(documents) if kind == "lm" else sentences
    nats = (tokens + ends) * math.log(tokenizer.vocab_size) + (
        sentences * math.log(2) if kind == "sllm" else 0
    )
    assert (
        result["bytes"] == text_bytes and result["tokens"] == tokens and result["documents"] == len(documents)
    )
    assert result["nll_nats"] == pytest.approx(nats, rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert result["ppl"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)  # N is the plain token count
    if kind == "sllm":
        assert result["vector_gain"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_unigram_model_gives_the_hand_computed_sum(kind, tokenizer, documents, tiny_valid_shards, tmp_path):
    rng = np.random.default_rng(3)
    log_q = np.log(rng.dirichlet(np.ones(tokenizer.vocab_size)))
    stop_logit = -1.5
    model = small_model(kind, tokenizer)
    with torch.no_grad():
        if kind == "lm":  # no bias there: a constant hidden state picks one column of the head
            norm = model.model.model.decoder.final_layer_norm
            norm.weight.zero_(), norm.bias.zero_()
            norm.bias[0] = 1
            model.model.get_output_embeddings().weight[:, 0] = torch.from_numpy(log_q)
        else:
            head = model.head if kind == "vae" else model.vae.head
            head.weight.zero_(), head.bias.copy_(torch.from_numpy(log_q))
        if kind == "sllm":
            model.stop_head.weight.zero_(), model.stop_head.bias.fill_(stop_logit)
    result = evaluate(save(model, tmp_path / "unigram", tokenizer), data=tiny_valid_shards)

    documents, text_bytes = documents
    token_nats = -sum(log_q[t].sum() for t, _ in documents)
    sentences = sum(len(s) for _, s in documents)
    end_nats = -log_q[tokenizer.eos_id] * (len(documents) if kind == "lm" else sentences)
    stop_nats = 0.0
    if (
        kind == "sllm"
    ):  # 1 at each document's true end, 0 after every other sentence, inner windows' ends included
        p = 1 / (1 + math.exp(-stop_logit))
        stop_nats = -(len(documents) * math.log(p) + (sentences - len(documents)) * math.log(1 - p))
    assert result["windows"] > len(documents)
    assert result["token_nll_nats"] == pytest.approx(token_nats, rel=1e-6)
    assert result["end_nll_nats"] == pytest.approx(end_nats, rel=1e-6)
    assert result["stop_nll_nats"] == pytest.approx(stop_nats, rel=1e-6)
    total = token_nats + end_nats + stop_nats
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / text_bytes, rel=1e-6)


# --- the same figures however they are made ---


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_one_by_one(kind, folders, tiny_valid_shards):
    packed = evaluate(folders[kind], data=tiny_valid_shards, batch_tokens=4096, max_documents=8)
    single = evaluate(folders[kind], data=tiny_valid_shards, batch_tokens=1, max_documents=8)
    assert_same(packed, single, {"seconds"})


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_figures_of_one(kind, folders, tiny_valid_shards, pool):
    arguments = ["evaluate", "--model", folders[kind], "--data", str(tiny_valid_shards), "--json"]
    (status, written), (other_status, nothing) = pool.run(2, ranks.sllm, arguments)
    assert (status, other_status, nothing) == (0, 0, "")
    two, one = json.loads(written), evaluate(folders[kind], data=tiny_valid_shards)
    assert (two["ranks"], one["ranks"]) == (2, 1)
    assert_same(one, two, {"seconds", "ranks"})


def test_ranks_without_a_document_change_nothing(folders, tiny_valid_shards, pool):
    arguments = ["evaluate", "--model", folders["lm"], "--data", str(tiny_valid_shards), "--json"]
    (_, written), _ = pool.run(2, ranks.sllm, [*arguments, "--max-documents", "1"])
    result = json.loads(written)
    assert_same(
        evaluate(folders["lm"], data=tiny_valid_shards, max_documents=1), result, {"seconds", "ranks"}
    )
    assert result["bits_per_byte_interval"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_data_and_text_give_identical_figures(kind, folders, tiny_valid_shards, tiny_corpus):
    shards = evaluate(folders[kind], data=tiny_valid_shards)
    text = evaluate(folders[kind], text=tiny_corpus / "valid.jsonl")
    assert shards.pop("shards_fingerprint") and text.pop("shards_fingerprint") is None
    for result in (shards, text):
        del result["seconds"], result["data"]
    assert shards == text


def test_sllm_and_token_model_are_scored_on_the_same_text(folders, tiny_valid_shards):
    sllm, lm = (evaluate(folders[kind], data=tiny_valid_shards, window_tokens=100) for kind in ("sllm", "lm"))
    assert {key: sllm[key] for key in COUNTS} == {key: lm[key] for key in COUNTS}
    assert sllm["window_tokens"] == 100


def test_max_documents_scores_the_first_ones(folders, documents, tiny_valid_shards):
    result = evaluate(folders["lm"], data=tiny_valid_shards, max_documents=3)
    assert result["documents"] == 3
    assert result["tokens"] == sum(len(tokens) for tokens, _ in documents[0][:3])


def test_rejected_lines_are_counted(folders, tiny_corpus, tmp_path):
    good = (tiny_corpus / "valid.jsonl").read_text("utf-8")
    (tmp_path / "mixed.jsonl").write_text("not json\n" + good + '{"id": "1"}\n', encoding="utf-8")
    mixed = evaluate(folders["lm"], text=tmp_path / "mixed.jsonl")
    clean = evaluate(folders["lm"], text=tiny_corpus / "valid.jsonl")
    assert sum(mixed["rejected"].values()) == 2 and not clean["rejected"]
    assert mixed["nll_nats"] == clean["nll_nats"]


# --- independent computations ---


def nll_by_transformers(folder: str, windows: list[tuple[list[int], bool]], bos: int, eos: int) -> float:
    """Nats of all windows by Hugging Face's own model and nothing of ours."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation == "sdpa"
    total = 0.0
    for tokens, document_end in windows:
        symbols = torch.tensor([[bos, *tokens, *([eos] if document_end else [])]])
        with torch.no_grad():
            log_p = model(symbols).logits[0, :-1].double().log_softmax(-1)
        total -= log_p.gather(1, symbols[0, 1:, None]).sum().item()
    return total


def test_token_model_equals_transformers_by_itself(folders, documents, tokenizer, tiny_valid_shards):
    windows = []
    for tokens, lengths in documents[0]:
        at, cuts = 0, windows_by_hand(lengths)
        for number, window in enumerate(cuts, 1):
            windows.append((tokens[at : at + sum(window)].tolist(), number == len(cuts)))
            at += sum(window)
    result = evaluate(folders["lm"], data=tiny_valid_shards)
    expected = nll_by_transformers(folders["lm"], windows, tokenizer.bos_id, tokenizer.eos_id)
    assert result["windows"] == len(windows)
    assert result["nll_nats"] == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def foreign_folder(tiny_corpus, tmp_path_factory):
    """A GPT-2 with its own byte-level tokenizer, as Hugging Face saves it: a folder we had no hand in."""
    folder = tmp_path_factory.mktemp("gpt2")
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train([str(tiny_corpus / "train.jsonl")], trainer)
    rust.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def test_foreign_token_model_with_its_own_tokenizer(foreign_folder, tiny_corpus):
    text = tiny_corpus / "valid.jsonl"
    result = evaluate(
        foreign_folder, text=text, window_tokens=WINDOW_TOKENS, segmenter="sentence", max_tokens=50
    )
    tokenizer = load_tokenizer(foreign_folder)
    windows, text_bytes = [], 0
    for line in text.read_text("utf-8").splitlines():
        content = json.loads(line)["content"]
        text_bytes += len(content.encode())
        tokens, lengths = cut_document(content, tokenizer, get_segmenter("sentence", "en"), 50)
        at, cuts = 0, windows_by_hand(lengths.tolist())
        for number, window in enumerate(cuts, 1):
            windows.append((tokens[at : at + sum(window)].tolist(), number == len(cuts)))
            at += sum(window)
    assert result["bytes"] == text_bytes and result["windows"] == len(windows)
    assert result["nll_nats"] == pytest.approx(
        nll_by_transformers(str(foreign_folder), windows, 0, 0), rel=1e-6
    )


def test_opt_folder_is_scored_up_to_its_positions(foreign_folder, tiny_corpus, tmp_path):
    """A folder as OPT's are published: 2,048 positions, both ends of a text marked by symbol 2."""
    config = OPTConfig(
        vocab_size=400,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=2048,
        bos_token_id=2,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    folder = tmp_path / "opt"
    OPTForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((foreign_folder / name).read_bytes())
    contents = [json.loads(line)["content"] for line in open(tiny_corpus / "valid.jsonl", encoding="utf-8")]
    while len(load_tokenizer(folder).encode(text := "\n".join(contents))) < 2500:
        contents *= 2
    file = write_jsonl(tmp_path / "long.jsonl", [text])
    result = evaluate(folder, text=file, window_tokens=2047)
    tokenizer = load_tokenizer(folder)
    tokens, lengths = cut_document(text, tokenizer, get_segmenter("clause", "en"), 64)
    windows, at = [], 0
    for span in document_spans(tokens, lengths, 2047):
        windows.append((span.tokens.tolist(), span.document_end))
        at += len(span.tokens)
    assert at == len(tokens) and max(len(window) for window, _ in windows) > 1900
    assert result["nll_nats"] == pytest.approx(nll_by_transformers(str(folder), windows, 2, 2), rel=1e-6)
    with pytest.raises(UserError, match="positions for 2,047"):
        evaluate(folder, text=file, window_tokens=2048)


def test_foreign_token_model_reads_the_same_text_as_ours(foreign_folder, folders, tiny_corpus):
    text = tiny_corpus / "valid.jsonl"
    foreign, ours = evaluate(foreign_folder, text=text), evaluate(folders["sllm"], text=text)
    assert foreign["window_tokens"] == 255  # its positions, less the start symbol
    assert foreign["data_fingerprint"] == ours["data_fingerprint"] and foreign["bytes"] == ours["bytes"]
    assert foreign["tokens"] != ours["tokens"]


# --- reconstruction ---


def short_sentences(tokenizer) -> list[np.ndarray]:
    words = "the list holds a value of its own name and each one is set by hand when code runs".split()
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(words, rng.integers(1, 6))) + "." for _ in range(40)]
    return [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def half_trained_vae(tokenizer):
    """A VAE trained until it rebuilds some of 40 short sentences, and those sentences as one document."""
    sentences = short_sentences(tokenizer)
    span = Span(np.concatenate(sentences), np.asarray([len(s) for s in sentences]), True)
    model = small_model("vae", tokenizer, noise=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = build_batch([span])
    for _ in range(300):
        losses = model(batch, want_correct=True)
        if losses.target_correct_N.float().mean() > 0.93:
            break
        optimizer.zero_grad()
        losses.objective.backward()
        optimizer.step()
    return model.eval(), span


@torch.no_grad()
def rebuilt_greedily(model, sentence: np.ndarray) -> list[int]:
    """What the decoder writes from the sentence's own embedding, its end symbol included."""
    vector = model.encode(build_batch([Span(sentence, np.asarray([len(sentence)]), True)]))
    state, written = model.decode_begin(vector), []
    while len(written) <= len(sentence):
        symbol = int(state.logits.argmax())
        written.append(symbol)
        if symbol == model.config.eos_token_id:
            break
        model.decode_step(state, symbol)
    return written


def test_exact_match_is_what_greedy_decoding_returns(half_trained_vae, tokenizer):
    model, span = half_trained_vae
    sums = score(model, "vae", tokenizer, [Window(span)], batch_tokens=100)
    sentences = np.split(span.tokens, np.cumsum(span.sentence_lengths)[:-1])
    exact = [rebuilt_greedily(model, s) == [*s.tolist(), tokenizer.eos_id] for s in sentences]
    assert 0.1 < np.mean(exact) < 0.95, (
        "the test wants a model that is right on some sentences and wrong on others"
    )
    figures = sums.figures()
    assert figures["exact_match"] == np.mean(exact)
    for length in np.unique(span.sentence_lengths):
        at = figures["exact_match_by_length"][str(length)]
        of_length = [e for e, s in zip(exact, sentences, strict=True) if len(s) == length]
        assert (at["sentences"], at["exact_match"]) == (len(of_length), np.mean(of_length))


def test_edit_distance_is_that_of_what_greedy_decoding_writes(half_trained_vae, tokenizer):
    model, span = half_trained_vae
    figures = score(model, "vae", tokenizer, [Window(span)], batch_tokens=100).figures()
    written = rebuild(model, build_batch([span]), np.arange(len(span.sentence_lengths)))
    edits = 0
    for sentence, ours in zip(
        np.split(span.tokens, np.cumsum(span.sentence_lengths)[:-1]), written, strict=True
    ):
        by_hand = rebuilt_greedily(model, sentence)
        assert ours[: len(by_hand)].tolist() == [t for t in by_hand if t != tokenizer.eos_id]
        edits += levenshtein(sentence.tolist(), ours.tolist())
    assert edits and figures["edit_distance"] == edits / len(span.tokens)


def levenshtein(a: list[int], b: list[int]) -> int:
    """The textbook's table."""
    table = [list(range(len(b) + 1))]
    for x in a:
        row = [table[-1][0] + 1]
        for j, y in enumerate(b):
            row.append(min(row[-1] + 1, table[-1][j + 1] + 1, table[-1][j] + (x != y)))
        table.append(row)
    return table[-1][-1]


def test_edit_distances_are_the_textbooks():
    rng = np.random.default_rng(5)
    pairs = [[rng.integers(0, 3, rng.integers(low, 9)) for low in (1, 0)] for _ in range(200)]
    ours = edit_distances(*map(list, zip(*pairs, strict=True)))
    assert ours.tolist() == [levenshtein(a.tolist(), b.tolist()) for a, b in pairs]


# --- intervals and groups ---


def test_intervals_cover_the_true_ratio_as_often_as_they_say():
    """Documents of random sizes whose nats per byte scatter around 2: of 200 such corpora, the intervals of
    about 95 % hold the 2 (a percentile interval of 60 documents a little fewer)."""
    rng = np.random.default_rng(11)
    hits, widths = 0, []
    for _ in range(200):
        sizes = rng.integers(50, 500, 60)
        nats = sizes * (2 + 0.3 * rng.standard_normal(60))
        low, high = interval(nats, sizes)
        hits += low <= 2 <= high
        widths.append(high - low)
    assert 0.88 <= hits / 200 <= 0.99
    # Of the ratio Σ sᵢ(2 + 0.3 z) / Σ sᵢ the standard deviation is known: 0.3 √(Σ s²) / Σ s.
    draws = rng.integers(50, 500, (2000, 60))
    deviation = (0.3 * np.sqrt((draws**2).sum(1)) / draws.sum(1)).mean()
    assert np.mean(widths) == pytest.approx(2 * 1.96 * deviation, rel=0.08)


def test_intervals_are_seeded_and_want_two_documents():
    nats, sizes = np.array([10.0, 30.0, 20.0]), np.array([10.0, 11.0, 12.0])
    assert interval(nats, sizes) == interval(nats, sizes)
    assert interval(nats[:1], sizes[:1]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_groups_add_up_to_the_whole(kind, folders, tiny_corpus, tokenizer, tmp_path):
    text = (tiny_corpus / "valid.jsonl").read_text("utf-8").splitlines()
    for name, lines in (("EN/books", text[:4]), ("EN/web", text[4:8])):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "part.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")
    whole = evaluate(folders[kind], text=tmp_path)
    assert whole["by_source"].keys() == {"books", "web"} and whole["by_language"].keys() == {"en"}
    books = evaluate(folders[kind], text=tmp_path / "EN/books")
    ours = whole["by_source"]["books"]
    for key in ours.keys() - {"bits_per_byte_interval", "vector_gain_interval"}:
        if books[key] is None:  # no sentence of these windows has so many before it
            assert ours[key] is None and key.startswith("shift_"), key
        else:
            assert ours[key] == pytest.approx(books[key], rel=1e-6, abs=1e-6), key
    for key in ("by_source", "by_language", "by_sentence_length", "by_sentence_position"):
        groups = whole[key].values()
        for count in ("bytes", "tokens", "sentences"):
            assert sum(group[count] for group in groups) == whole[count], (key, count)
        nats = sum(group["bits_per_byte"] * group["bytes"] for group in groups if group["bytes"])
        assert nats / whole["bytes"] == pytest.approx(whole["bits_per_byte"], rel=1e-5), key
    assert whole["by_sentence_position"]["1"]["sentences"] == whole["documents"]
    low, high = whole["bits_per_byte_interval"]
    assert low < whole["bits_per_byte"] < high
    assert "sub-corpora" in format_result(whole)


def test_reconstruction_is_labelled_as_such(folders, tiny_valid_shards):
    vae = evaluate(folders["vae"], data=tiny_valid_shards, max_documents=2)
    assert vae["measures"] == "reconstruction" and "vector_gain" not in vae
    assert "never" in format_result(vae) or "no figure here compares" in format_result(vae)
    assert evaluate(folders["lm"], data=tiny_valid_shards, max_documents=2)["measures"] == "prediction"


def test_vector_gain_is_the_loss_without_context(tokenizer, tiny_valid_shards, tmp_path):
    """A decoder that cannot hear its vector loses nothing; one that can, scores otherwise without it."""
    deaf, hearing = small_model("sllm", tokenizer), small_model("sllm", tokenizer)
    with torch.no_grad():
        for layer in deaf.vae.decoder.layers:
            layer.condition.weight.zero_()
    gains = {}
    for name, model in (("deaf", deaf), ("hearing", hearing)):
        result = evaluate(save(model, tmp_path / name, tokenizer), data=tiny_valid_shards, max_documents=3)
        gains[name] = result["vector_gain"]
        without = result["bits_per_byte_without_vectors"]
        assert without - result["bits_per_byte"] == pytest.approx(result["vector_gain"], abs=1e-9)
    assert gains["deaf"] == pytest.approx(0, abs=1e-9)
    assert abs(gains["hearing"]) > 1e-3


def test_a_sentence_that_does_not_end_is_written_to_the_longest(tokenizer):
    model = small_model("vae", tokenizer, max_tokens=6)
    with torch.no_grad():
        model.head.bias[tokenizer.eos_id] -= 1e3
    span = Span(np.arange(8, 12), np.asarray([1, 3]), True)
    assert [len(tokens) for tokens in rebuild(model, build_batch([span]), np.arange(2))] == [6, 6]


# --- refusals ---


def test_shards_of_another_tokenizer_are_refused(tokenizer, tiny_corpus, tiny_valid_shards, tmp_path):
    lines = (tiny_corpus / "train.jsonl").read_text("utf-8").splitlines()[:20]
    other = train_sentencepiece(lines, tmp_path / "other", 400)
    folder = save(small_model("lm", other), tmp_path / "model", other)
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate(folder, data=tiny_valid_shards)


def test_sentences_longer_than_the_model_takes_are_refused(tokenizer, tiny_valid_shards, tmp_path):
    folder = save(small_model("vae", tokenizer, max_tokens=16), tmp_path / "short", tokenizer)
    with pytest.raises(UserError, match="64 tokens, but the model takes 16"):
        evaluate(folder, data=tiny_valid_shards)


def test_windows_longer_than_the_positions_are_refused(folders, tiny_valid_shards):
    with pytest.raises(UserError, match="positions for 299"):
        evaluate(folders["lm"], data=tiny_valid_shards, window_tokens=300)


@pytest.mark.parametrize("missing", ["model", "data", "text"])
def test_missing_paths_are_refused(missing, folders, tiny_valid_shards, tmp_path):
    arguments = {"folder": folders["lm"], "data": tiny_valid_shards}
    if missing == "model":
        arguments["folder"] = tmp_path / "nowhere"
    else:
        del arguments["data"]
        arguments[missing] = tmp_path / "nowhere"
    with pytest.raises(UserError, match="nowhere"):
        evaluate(**arguments)


def test_empty_text_and_cut_settings_for_shards_are_refused(folders, tiny_valid_shards, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty.jsonl: nothing to evaluate"):
        evaluate(folders["lm"], text=tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="shards are cut already"):
        evaluate(folders["lm"], data=tiny_valid_shards, segmenter="sentence")


def test_chinese_text_counts_its_bytes(folders, tmp_path):
    text = "第三天，他说：“好。”然后他走了。The end.\n"
    result = evaluate(folders["sllm"], text=write_jsonl(tmp_path / "zh.jsonl", [text]))
    assert result["bytes"] == len(text.encode()) and result["documents"] == 1
    assert result["sentence_settings"] == SETTINGS | {"min_tokens": 1}
