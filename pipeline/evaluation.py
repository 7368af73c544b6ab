"""The metric contract: how well a model predicts (SLLM, token-level model) or rebuilds (SentenceVAE) a text.

Comes in: a model folder and a text, as shards or as WanJuan documents. Goes out: one dict of sums and the
figures made of them (docs/evaluation.md says what each key means). Every kind of model is scored on the
same tokens of the same windows (`bins.document_spans`), each window conditioned on itself only; NLL is
summed over the corpus in float64 and divided once, at the end:

    bits_per_byte = NLL / (ln 2 · UTF-8 bytes of the text)      ppl = exp(NLL / plain tokens)

Called by `pipeline/cli.py` (`sllm evaluate`), the demo, and tests.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_prep.documents import DocumentReader, Reject
from data_prep.errors import UserError
from data_prep.inputs import find_inputs
from data_prep.sentences import SentenceSettings, cut_document
from data_prep.shards import ShardSet
from data_prep.tokenizer import LossyTokenization, Tokenizer
from pipeline.batches import Batch, build_batch
from pipeline.bins import Span, document_spans
from pipeline.int8 import to_int8
from pipeline.losses import bits_per_byte, perplexity
from pipeline.model_io import load_model, load_model_tokenizer, model_kind
from pipeline.plain_lm import load_plain_lm
from pipeline.pretrained import KINDS, read_config

DEFAULT_WINDOW_TOKENS = 1024
DEFAULT_SETTINGS = {"segmenter": "clause", "language": "auto", "max_tokens": 64}


@dataclass
class Sums:
    """Running sums over a corpus: Python floats (float64) in nats, and counts.

    `add` batches, then `figures`.
    """

    kind: str  # sllm | vae | lm
    token_nll: float = 0.0
    end_nll: float = 0.0
    stop_nll: float = 0.0
    without_vectors_nll: float = (
        0.0  # sllm: all of it again, every sentence vector replaced by the window's start
    )
    bytes: int = 0
    tokens: int = 0
    sentences: int = 0
    documents: int = 0
    windows: int = 0
    sentences_of_length: Counter[int] = field(default_factory=Counter)  # vae
    exact_of_length: Counter[int] = field(default_factory=Counter)

    @torch.inference_mode()
    def add(self, model: torch.nn.Module, batch: Batch, byte_lengths: np.ndarray) -> None:
        """Score one batch. `byte_lengths`: int [V], the tokenizer's UTF-8 bytes per token."""
        losses = model(batch, want_correct=True) if self.kind == "vae" else model(batch)
        ends = float(losses.target_nll_N.double()[losses.is_end_N].sum())
        stops = 0.0 if losses.stop_nll_S is None else float(losses.stop_nll_S.double().sum())
        everything = float(losses.target_nll_N.double().sum())
        self.token_nll += everything - ends
        self.end_nll += ends
        self.stop_nll += stops
        if self.kind == "sllm":
            without = model(batch, start_vector_only=True)
            # Stop decisions see the backbone's own outputs either way: no decoder is involved in them.
            self.without_vectors_nll += float(without.target_nll_N.double().sum()) + stops
        if self.kind == "vae":
            self._count_exact(batch, losses.target_correct_N)
        self.bytes += int(byte_lengths[batch.tokens_T.cpu().numpy()].sum())
        self.tokens += batch.tokens
        self.sentences += batch.sentences
        self.windows += batch.documents
        self.documents += int(batch.document_end_D.sum())  # every document ends in exactly one window

    def _count_exact(self, batch: Batch, correct_N: torch.Tensor) -> None:
        # Greedy decoding returns a sentence exactly when the arg max is right at every symbol, its end
        # included: as long as it is right, the decoder has been fed what teacher forcing feeds it.
        wrong_S = torch.zeros(batch.sentences, dtype=torch.int64, device=batch.device)
        wrong_S.index_add_(0, batch.decoder_layout.segment_of_row, (~correct_N).long())
        lengths = np.diff(batch.cu_sentences)
        self.sentences_of_length.update(lengths.tolist())
        self.exact_of_length.update(lengths[(wrong_S == 0).cpu().numpy()].tolist())

    @property
    def nll(self) -> float:
        return self.token_nll + self.end_nll + self.stop_nll

    def figures(self) -> dict:
        """All figures of the sums so far (docs/evaluation.md); at least one token must have been scored."""
        figures = {
            "measures": "reconstruction" if self.kind == "vae" else "prediction",
            "bits_per_byte": bits_per_byte(self.nll, self.bytes),
            "ppl": perplexity(self.nll, self.tokens),
            "nll_nats": self.nll,
            "token_nll_nats": self.token_nll,
            "end_nll_nats": self.end_nll,
            "stop_nll_nats": self.stop_nll,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "sentences": self.sentences,
            "documents": self.documents,
            "windows": self.windows,
        }
        if self.kind == "sllm":
            figures["bits_per_byte_without_vectors"] = bits_per_byte(self.without_vectors_nll, self.bytes)
            figures["vector_gain"] = bits_per_byte(self.without_vectors_nll - self.nll, self.bytes)
        if self.kind == "vae":
            figures["cross_entropy"] = self.nll / (self.tokens + self.sentences)
            figures["exact_match"] = self.exact_of_length.total() / self.sentences
            figures["exact_match_by_length"] = {
                str(length): {"sentences": count, "exact_match": self.exact_of_length[length] / count}
                for length, count in sorted(self.sentences_of_length.items())
            }
        return figures


@dataclass
class Source:
    """Documents to score, in corpus order, and where they come from."""

    path: str
    settings: dict  # segmenter, language, max_tokens
    documents: Iterator[tuple[np.ndarray, np.ndarray]]  # tokens [T], sentence lengths [S]
    tokens: int | None = None  # expected, for the progress display
    shards_fingerprint: str | None = None
    rejected: dict[str, int] = field(default_factory=dict)  # reason → records left out
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)  # over the text that was scored

    def read(self, tokenizer: Tokenizer, limit: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The documents, at most `limit`; their text enters the digest (length first, so that borders
        count).
        """
        for tokens_T, lengths_S in itertools.islice(self.documents, limit):
            text = tokenizer.decode_bytes(tokens_T)
            self.digest.update(len(text).to_bytes(8, "little") + text)
            yield tokens_T, lengths_S


def _shard_source(shards: ShardSet, tokenizer: Tokenizer, model_folder: str) -> Source:
    theirs = shards.tokenizer().fingerprint
    if theirs != tokenizer.fingerprint:
        raise UserError(
            f"{shards.folder}: made with another tokenizer than {model_folder}'s; shard the text with the "
            "model's tokenizer, or give the documents themselves with --text"
        )

    def documents() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for document in shards.documents():
            if int(tokenizer.byte_lengths[document.tokens].sum()) != document.bytes:
                raise UserError(
                    f"{shards.folder}: document {document.id} has other bytes than its index says; "
                    "run data-prep verify"
                )
            yield document.tokens, document.sentence_lengths

    settings = shards.settings.to_dict()
    tokens = shards.manifest["totals"]["tokens"]
    return Source(str(shards.folder), settings, documents(), tokens, shards.fingerprint)


def _text_source(path: str, tokenizer: Tokenizer, settings: dict) -> Source:
    cut = SentenceSettings(**settings)
    source = Source(path, settings, iter(()))

    def documents() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for file in files:
            reader = DocumentReader(file, cut.language)
            for record in reader:
                reason = record.reason if isinstance(record, Reject) else None
                if reason is None:
                    try:
                        segmenter = cut.segmenter_for(record.language)  # as `data-prep shard` does it
                        document = cut_document(record.content, tokenizer, segmenter, cut)
                    except LossyTokenization:
                        reason = "tokenizer loses text"
                if reason is None:
                    yield document
                else:
                    source.rejected[reason] = source.rejected.get(reason, 0) + 1
            if reader.damage:
                raise UserError(f"{file.path}: {reader.damage}; an evaluation of half a file says nothing")

    files = find_inputs([path])
    source.documents = documents()
    return source


def _batches(spans: Iterable[Span], batch_tokens: int) -> Iterator[Batch]:
    """Consecutive windows up to `batch_tokens` tokens per batch; a larger window is a batch of its own."""
    group: list[Span] = []
    size = 0
    for span in spans:
        if group and size + len(span.tokens) > batch_tokens:
            yield build_batch(group)
            group, size = [], 0
        group.append(span)
        size += len(span.tokens)
    if group:
        yield build_batch(group)


def _load(folder: str) -> tuple[torch.nn.Module, str, Tokenizer]:
    """Model, kind and tokenizer of a folder; a token-level model that is not ours runs through its own
    forward.
    """
    config, tokenizer = read_config(folder), load_model_tokenizer(folder)
    foreign = config.get("model_type") not in KINDS and "sentence_settings" not in config
    model = load_plain_lm(folder, tokenizer) if foreign else load_model(folder)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), model_kind(model), tokenizer


def _window_limit(model: torch.nn.Module, kind: str, wanted: int | None) -> int:
    """W: as wanted, else the model's own, else 1024 or what its positions allow.

    Raises: UserError when too long.
    """
    positions = getattr(model.config, "max_position_embeddings", None) if kind == "lm" else None
    most = positions - 1 if positions else 1 << 30  # the start symbol takes one
    window = wanted or getattr(model.config, "window_tokens", None) or min(DEFAULT_WINDOW_TOKENS, most)
    if window > most:
        raise UserError(
            f"windows of {window} tokens, but the model has positions for {most}: lower --window-tokens"
        )
    return window


def _sentence_settings(model: torch.nn.Module, **given: str | int | None) -> dict:
    own = getattr(model.config, "sentence_settings", None) or {}
    settings = {key: given[key] or own.get(key) or default for key, default in DEFAULT_SETTINGS.items()}
    return SentenceSettings(**settings).to_dict()


def _check_fits(model: torch.nn.Module, kind: str, tokenizer: Tokenizer, settings: dict, folder: str) -> None:
    config = model.config.vae if kind == "sllm" else model.config
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model folder {folder}: {config.vocab_size} vocabulary entries, "
            f"but its tokenizer has {tokenizer.vocab_size}"
        )
    if kind != "lm" and settings["max_tokens"] > config.max_sentence_tokens:
        raise UserError(
            f"sentences of up to {settings['max_tokens']} tokens, but the model takes "
            f"{config.max_sentence_tokens}: cut them with a smaller --max-tokens"
        )


def evaluate(
    folder: str | Path,
    data: str | Path | None = None,
    text: str | Path | None = None,
    window_tokens: int | None = None,
    batch_tokens: int = 8192,
    max_documents: int | None = None,
    segmenter: str | None = None,
    language: str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
    int8: bool = False,
) -> dict:
    """Score a model folder of any kind on shards (`data`) or WanJuan documents (`text`): exactly one of them.

    Args: as `sllm evaluate --help` says; `segmenter`, `language` and `max_tokens` decide the sentences of
    `text` only. Returns: the figures of `Sums.figures` and what they were made from (docs/evaluation.md).
    Raises: UserError for folders, data or settings that do not fit together.
    """
    folder, given = str(folder), {"segmenter": segmenter, "language": language, "max_tokens": max_tokens}
    if data is not None and any(given.values()):
        raise UserError("--segmenter, --lang and --max-tokens are for --text: shards are cut already")
    shards = ShardSet.open(data) if data is not None else find_inputs([text]) and None
    model, kind, tokenizer = _load(folder)
    if int8:
        to_int8(model)
    if shards is not None:
        source = _shard_source(shards, tokenizer, folder)
    else:
        source = _text_source(str(text), tokenizer, _sentence_settings(model, **given))
    _check_fits(model, kind, tokenizer, source.settings, folder)
    window = _window_limit(model, kind, window_tokens)
    spans = (
        span
        for tokens_T, lengths_S in source.read(tokenizer, max_documents)
        for span in document_spans(tokens_T, lengths_S, window)
    )
    started = time.perf_counter()
    sums = score(
        model, kind, tokenizer, spans, batch_tokens, None if max_documents else source.tokens, progress
    )
    if not sums.tokens:
        reasons = ", ".join(f"{n} × {reason}" for reason, n in source.rejected.items())
        left_out = f" (left out: {reasons})" if reasons else ""
        raise UserError(f"{source.path}: nothing to evaluate, it holds no text{left_out}")
    return {
        "model": folder,
        "kind": kind,
        "int8": int8,
        "data": source.path,
        "data_fingerprint": source.digest.hexdigest(),
        "shards_fingerprint": source.shards_fingerprint,
        "rejected": source.rejected,
        "sentence_settings": source.settings,
        "window_tokens": window,
        **sums.figures(),
        "seconds": round(time.perf_counter() - started, 3),
    }


def score(
    model: torch.nn.Module,
    kind: str,
    tokenizer: Tokenizer,
    spans: Iterable[Span],
    batch_tokens: int,
    expected_tokens: int | None = None,
    progress: bool = False,
) -> Sums:
    """Sums over all spans. `model` in eval mode; `kind`: sllm, vae or lm."""
    sums = Sums(kind)
    # disable=None: shown on a terminal only.
    with tqdm(total=expected_tokens, unit="tok", unit_scale=True, disable=None if progress else True) as bar:
        for batch in _batches(spans, batch_tokens):
            sums.add(model, batch.to(model.device), tokenizer.byte_lengths)
            bar.update(batch.tokens)
            bar.set_postfix_str(f"{bits_per_byte(sums.nll, max(1, sums.bytes)):.4f} bits/byte", refresh=False)
    return sums


def format_result(result: dict) -> str:
    """The result as a small table for people."""
    window = result["window_tokens"]
    tokens, ends, stops = (result[f"{part}_nll_nats"] for part in ("token", "end", "stop"))
    rows = [
        ("model", f"{result['model']} ({result['kind']})"),
        ("data", f"{result['data']} (text {result['data_fingerprint'][:12]})"),
        (
            "documents",
            f"{result['documents']:,}: {result['sentences']:,} sentences, {result['bytes']:,} bytes",
        ),
        ("tokens", f"{result['tokens']:,} in {result['windows']:,} windows of at most {window:,}"),
    ]
    if result["rejected"]:
        rows.append(("left out", ", ".join(f"{n} × {reason}" for reason, n in result["rejected"].items())))
    rows += [
        ("bits per byte", f"{result['bits_per_byte']:.4f}"),
        ("perplexity", f"{result['ppl']:.4g} per plain token"),
        ("nats", f"{result['nll_nats']:.1f} = tokens {tokens:.1f} + ends {ends:.1f} + stops {stops:.1f}"),
    ]
    if result["kind"] == "sllm":
        without = result["bits_per_byte_without_vectors"]
        rows.append(
            ("vector gain", f"{result['vector_gain']:.4f} bits per byte ({without:.4f} without vectors)")
        )
    if result["kind"] == "vae":
        rows.append(("exact match", f"{result['exact_match']:.2%} of sentences rebuilt exactly"))
        rows += [
            (f"  {n} tokens", f"{at['exact_match']:.2%} of {at['sentences']:,}")
            for n, at in result["exact_match_by_length"].items()
        ]
        rows.append(
            ("note", "reconstruction: the model has seen each sentence; no figure here compares with")
        )
        rows.append(("", "a language model's"))
    return "\n".join(f"{name:<15} {value}" for name, value in rows)
