"""`sllm evaluate`: how well a model predicts (SLLM, token-level model) or rebuilds (SentenceVAE) a text.

Every kind of model is scored on the same tokens of the same windows, each window conditioned on itself only.
NLL is summed over the corpus in float64 and divided once, at the end (docs/evaluation.md defines each key):

    bits_per_byte = NLL / (ln 2 · UTF-8 bytes of the text)      ppl = exp(NLL / plain tokens)

With several ranks, each reads all documents (cheap compared with scoring) and scores every world-th of them.
The sums are gathered once, at the end, on every rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_prep.common.errors import UserError, counted
from data_prep.common.extras import import_extra
from data_prep.common.page import render
from data_prep.corpus.documents import DocumentReader, RawDocument, Reject
from data_prep.corpus.finding import find_inputs
from data_prep.shards.reader import ShardSet
from data_prep.text.running_ends import RunningEnds
from data_prep.text.sentences import SentenceSettings, cut_document
from data_prep.text.tokenizer import LossyTokenization, Tokenizer
from pipeline.common.text import FILTERS
from pipeline.data.batch import Batch, build_batch
from pipeline.data.upload import Uploader
from pipeline.data.windows import document_spans
from pipeline.evaluation.context_curve import curve_figures, curve_windows, longest_context, require_room
from pipeline.evaluation.generated import cut_agreement, read_generated
from pipeline.evaluation.ngram import NgramModel, count_shards
from pipeline.evaluation.scores import Scores, Window, document_windows
from pipeline.models.factory import load_model
from pipeline.models.folders import (
    DEFAULT_SENTENCES,
    KINDS,
    load_model_tokenizer,
    model_config,
    model_kind,
    parameter_count,
    read_config,
)
from pipeline.models.foreign_lm import load_plain_lm
from pipeline.models.inference import to_int8
from pipeline.models.losses import bits_per_byte
from pipeline.parallel.agreement import agree
from pipeline.parallel.device import DeviceName, DtypeName, choose_device
from pipeline.parallel.ranks import Ranks

DEFAULT_WINDOW_TOKENS = 1024
ALONE = Ranks(0, 1, 0)


# Tokens [T], sentence lengths [S], sub-corpus, language.
Document = tuple[np.ndarray, np.ndarray, str, str]


@dataclass
class Source:
    """Documents to score, in corpus order, and their origin."""

    path: str
    settings: dict  # segmenter, language, max_tokens
    documents: Iterator[Document]
    tokens: int | None = None  # expected, for the progress display
    shards_fingerprint: str | None = None
    rejected: dict[str, int] = field(default_factory=dict)  # reason → records left out
    digest: Any = field(default_factory=hashlib.sha256)  # over the scored text

    def read(self, tokenizer: Tokenizer, limit: int | None) -> Iterator[Document]:
        """The first `limit` documents. The digest covers the text of all, each preceded by its length so that
        borders count."""
        for document in itertools.islice(self.documents, limit):
            text = tokenizer.decode_bytes(document[0])
            self.digest.update(len(text).to_bytes(8, "little") + text)
            yield document

    def windows(
        self, tokenizer: Tokenizer, window_tokens: int, limit: int | None, ranks: Ranks
    ) -> Iterator[Window]:
        """The windows of this rank's documents out of the first `limit`."""
        pairs = _with_donors(self.read(tokenizer, limit))
        for number, ((tokens_T, lengths_S, source, language), donor) in enumerate(pairs):
            if number % ranks.world == ranks.rank:
                donors = [None] if donor is None else [*document_spans(*donor[:2], window_tokens)]
                place = number, source, language
                yield from document_windows(tokens_T, lengths_S, window_tokens, *place, donors)


def _with_donors(documents: Iterator[Document]) -> Iterator[tuple[Document, Document | None]]:
    """Each document with the one before it (the first with the second), whose vectors it will be given."""
    first, second = next(documents, None), next(documents, None)
    if first is None:
        return
    yield first, second
    for document in itertools.chain([] if second is None else [second], documents):
        yield document, first
        first = document


def _shard_source(shards: ShardSet, tokenizer: Tokenizer, model_folder: str) -> Source:
    theirs = shards.tokenizer().fingerprint
    if theirs != tokenizer.fingerprint:
        raise UserError(
            f"{shards.folder}: made with another tokenizer than {model_folder}'s; shard the text with the "
            "model's tokenizer, or give the documents themselves with --text"
        )

    def documents() -> Iterator[Document]:
        for document in shards.documents():
            if int(tokenizer.byte_lengths[document.tokens].sum()) != document.bytes:
                raise UserError(
                    f"{shards.folder}: document {document.id} has other bytes than its index says; "
                    "run data-prep verify"
                )
            yield document.tokens, document.sentence_lengths, document.source, document.language

    settings = shards.settings.to_dict()
    tokens = shards.manifest["totals"]["tokens"]
    return Source(str(shards.folder), settings, documents(), tokens, shards.fingerprint)


def read_records(path: str, language: str) -> Iterator[RawDocument | Reject]:
    """The records of a file or folder, in order. Raises: UserError for files that are damaged."""
    for file in find_inputs([path]):
        reader = DocumentReader(file, language)
        yield from reader
        if reader.damage:
            raise UserError(
                f"{file.path}: {reader.damage[0].reason}; an evaluation of half a file says nothing"
            )


def _record_source(
    path: str, records: Iterable[RawDocument | Reject], tokenizer: Tokenizer, cut: SentenceSettings
) -> Source:
    source = Source(path, cut.to_dict(), iter(()))

    def documents() -> Iterator[Document]:
        for record in records:
            if isinstance(record, Reject):
                reason = record.reason
            else:
                try:
                    segmenter = cut.segmenter_for(record.language)  # as in `data-prep shard`
                    tokens_T, lengths_S = cut_document(record.content, tokenizer, segmenter, cut)
                except LossyTokenization:
                    reason = "tokenizer loses text"
                else:
                    yield tokens_T, lengths_S, record.source, record.language
                    continue
            source.rejected[reason] = source.rejected.get(reason, 0) + 1

    source.documents = documents()
    return source


def batches(
    windows: Iterable[Window], batch_tokens: int, rule: RunningEnds | None = None
) -> Iterator[tuple[Batch, list[Window]]]:
    """Consecutive windows up to `batch_tokens` tokens per batch; a larger window is a batch alone. rule: cuts
    them again."""
    group: list[Window] = []
    size = 0
    for window in windows:
        if rule is not None:
            window = dataclasses.replace(window, span=window.span.cut_again(rule))
        if group and size + len(window.span.tokens) > batch_tokens:
            yield build_batch([w.span for w in group]), group
            group, size = [], 0
        group.append(window)
        size += len(window.span.tokens)
    if group:
        yield build_batch([w.span for w in group]), group


@dataclass(frozen=True)
class Loaded:
    """The model of a folder, ready for scoring."""

    folder: str
    model: torch.nn.Module
    kind: str  # sllm | vae | lm
    tokenizer: Tokenizer
    parameters: int
    int8: bool

    def placed(self) -> dict[str, str]:
        """Where and in which precision it computes."""
        weight = next(self.model.parameters())
        return {"device": weight.device.type, "dtype": str(weight.dtype).removeprefix("torch.")}


def load(folder: str, int8: bool = False, device: DeviceName = "auto", dtype: DtypeName = "auto") -> Loaded:
    """The model of any folder; a token-level model not trained by this project runs its own forward."""
    place, precision = choose_device(device, dtype, int8)
    config, tokenizer = read_config(folder), load_model_tokenizer(folder)
    foreign = config.get("model_type") not in KINDS and "sentence_settings" not in config
    model = load_plain_lm(folder, tokenizer) if foreign else load_model(folder)
    model, parameters = model.to(place, precision), parameter_count(model)
    if int8:
        to_int8(model)
    return Loaded(folder, model, model_kind(model), tokenizer, parameters, int8)


def window_limit(model: torch.nn.Module, kind: str, wanted: int | None) -> int:
    """W: as wanted, else the model's own, else 1024 or what its positions allow.

    Raises: UserError when too long.
    """
    config = model_config(model)
    positions = getattr(config, "max_position_embeddings", None) if kind == "lm" else None
    most = positions - 1 if positions else 1 << 30  # the start symbol takes one
    if getattr(model, "sentence_ends", False):  # in the worst case as many as tokens
        most = most // 2
    window = wanted or getattr(config, "window_tokens", None) or min(DEFAULT_WINDOW_TOKENS, most)
    if window > most:
        raise UserError(
            f"windows of {counted(window, 'token')}, but the model has positions for {most:,}: "
            "lower --window-tokens"
        )
    return window


def running_ends(model: torch.nn.Module, tokenizer: Tokenizer) -> RunningEnds | None:
    """The rule of a model whose sentences end by rule."""
    by_rule = getattr(model_config(model), "ends", None) == "rule"
    return RunningEnds(tokenizer, sentence_settings(model)) if by_rule else None


def sentence_settings(model: torch.nn.Module, **given: str | int | None) -> SentenceSettings:
    """How `--text` is cut: as given, else as the model was trained, else by default."""
    own = getattr(model.config, "sentence_settings", None) or {}
    settings: dict[str, Any] = {
        key: given.get(key) or own.get(key) or default for key, default in DEFAULT_SENTENCES.items()
    }
    return SentenceSettings(**settings)


def _check_fits(model: torch.nn.Module, kind: str, tokenizer: Tokenizer, settings: dict, folder: str) -> None:
    config = model_config(model)
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model folder {folder}: a vocabulary of {config.vocab_size:,}, "
            f"but its tokenizer has {tokenizer.vocab_size:,}"
        )
    if kind != "lm" and settings["max_tokens"] > config.max_sentence_tokens:
        raise UserError(
            f"sentences of up to {counted(settings['max_tokens'], 'token')}, but the model takes "
            f"{config.max_sentence_tokens}: cut them with a smaller --max-tokens"
        )


def evaluate(
    folder: str | Path | Loaded,
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
    ranks: Ranks = ALONE,
    documents: Sequence[RawDocument | Reject] | None = None,
    generated: str | Path | None = None,
    context_curve: Sequence[int] = (),
    context_block: int | None = None,
    context_blocks: int = 1,
    start_symbol: bool = True,
    ngram: str | Path | NgramModel | None = None,
    by_document: bool = False,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
) -> dict:
    """Score a model folder of any kind on shards (`data`) or WanJuan documents (`text`): exactly one of them,
    or `generated`, an output of `sllm generate`, for which cut agreement is measured too.

    Args: as in `sllm evaluate --help`.
        folder: a model folder, or its `Loaded` model.
        segmenter, language, max_tokens: how `text` is cut into sentences.
        ranks: all of them must call this alike, inside a process group.
        documents: scored in place of those in the file `text`, which then only names them.
        context_curve: context lengths in tokens whose loss is measured (`context_curve.py`).
        context_block, context_blocks: score so many blocks of so many tokens of each document alone, behind
            each of these contexts.
        start_symbol: whether these contexts have one before them (token models).
        ngram: shards to count an n-gram model on, or that model, scored on the same windows.
        by_document: also the nats and bytes of each document, in the text's order.
    Returns: the figures of `Scores.figures` and their origin (docs/evaluation.md).
    Raises: UserError for folders, data or settings that do not fit together.
    """
    given: dict[str, Any] = {"segmenter": segmenter, "language": language, "max_tokens": max_tokens}
    ends: list[list[int]] = []
    if generated is not None:
        text, (documents, ends) = generated, read_generated(generated)
    if data is not None and any(given.values()):
        raise UserError("--segmenter, --lang and --max-tokens are for --text: shards are cut already")
    loaded = source = window = cut = scored = error = None
    started = 0.0
    contexts = sorted(set(context_curve))
    if context_block and (not contexts or ngram is not None):
        raise UserError("--context-block is for --context-curve, without --ngram")
    try:
        shards = ShardSet.open(data) if data is not None else None
        if shards is None and documents is None:
            find_inputs([text])  # refuses a missing file before a model is loaded
        loaded = folder if isinstance(folder, Loaded) else load(str(folder), int8, device, dtype)
        model, kind, tokenizer = loaded.model, loaded.kind, loaded.tokenizer
        if shards is None:
            cut = sentence_settings(model, **given)

        def opened() -> Source:
            if shards is not None:
                return _shard_source(shards, tokenizer, loaded.folder)
            records = read_records(str(text), cut.language) if documents is None else documents
            return _record_source(str(text), records, tokenizer, cut)

        source = opened()
        _check_fits(model, kind, tokenizer, source.settings, loaded.folder)
        window = window_limit(model, kind, window_tokens)
        rule, by_token = running_ends(model, tokenizer), False
        if contexts:
            if kind == "vae":
                raise UserError("--context-curve is for models that predict: a SentenceVAE has no context")
            by_token = kind == "lm" and rule is None and not getattr(model, "sentence_ends", False)
            longest = 0 if by_token and context_block else source.settings["max_tokens"]
            if context_block and window_tokens is None:
                most = max(contexts) + longest + max(context_block, longest)
                window = window_limit(model, kind, max(window, most))
            require_room(contexts, longest, window, context_block)
        if not start_symbol and not (by_token and context_block):
            raise UserError("--no-start-symbol is for token-level models, with --context-block")
        if ngram is not None and not isinstance(ngram, NgramModel):
            ngram = count_shards(ngram, tokenizer, window)
        windows = source.windows(tokenizer, window, max_documents, ranks)
        expected = None if max_documents or source.tokens is None else source.tokens // ranks.world
        started = time.perf_counter()
        how = model, kind, tokenizer
        if not context_block:
            scored = [score(*how, windows, batch_tokens, expected, progress, ngram=ngram)]
        if contexts:
            read = source if context_block else opened()
            targets = context_block, context_blocks, by_token, rule, start_symbol
            curve = read.read(tokenizer, max_documents), contexts, ranks, *targets
            scored = [
                *(scored or ()),
                score(*how, curve_windows(*curve), batch_tokens, None, progress, controls=False),
            ]
    except (UserError, OSError) as problem:
        if ranks.world == 1:
            raise
        error = problem
    if ranks.world > 1:
        everyone = agree(error, scored)
        whole_too = not context_block
        scored = [Scores(loaded.kind, controls=whole_too and part == 0) for part in range(len(scored))]
        for theirs in everyone:
            for whole, part in zip(scored, theirs, strict=True):
                whole.merge(part)
    scores = longest_context(scored[0], contexts) if context_block else scored[0]
    if context_block and not scores.rows:
        needed = counted(max(contexts), "token")
        raise UserError(f"{source.path}: no document is long enough for {needed} and a block")
    if not scores.rows:
        reasons = ", ".join(f"{n} × {reason}" for reason, n in source.rejected.items())
        left_out = f" (left out: {reasons})" if reasons else ""
        raise UserError(f"{source.path}: nothing to evaluate, it holds no text{left_out}")
    agreement = {}
    if generated is not None:
        texts = [record for record in documents or () if isinstance(record, RawDocument)]
        agreement["cut_agreement"] = cut_agreement(texts, ends, loaded.tokenizer, cut)
    return {
        "model": loaded.folder,
        "kind": loaded.kind,
        "parameters": loaded.parameters,
        "int8": loaded.int8,
        **loaded.placed(),
        "data": source.path,
        "data_fingerprint": source.digest.hexdigest(),
        "shards_fingerprint": source.shards_fingerprint,
        "rejected": source.rejected,
        "sentence_settings": source.settings,
        "window_tokens": window,
        "ranks": ranks.world,
        **scores.figures(),
        **({"by_document": scores.by_document()} if by_document else {}),
        **({"context_curve": curve_figures(scored[-1], contexts)} if contexts else {}),
        **({"context_block": context_block, "context_blocks": context_blocks} if context_block else {}),
        **({} if start_symbol else {"start_symbol": False}),
        **({"ngram_trained_tokens": ngram.tokens} if isinstance(ngram, NgramModel) else {}),
        **agreement,
        "seconds": round(time.perf_counter() - started, 3),
    }


def score(
    model: torch.nn.Module,
    kind: str,
    tokenizer: Tokenizer,
    windows: Iterable[Window],
    batch_tokens: int,
    expected_tokens: int | None = None,
    progress: bool = False,
    controls: bool = True,
    ngram: NgramModel | None = None,
) -> Scores:
    """Sums over all windows. `model` in eval mode; `kind`: sllm, vae or lm; `controls`: also with other
    sentence vectors (sllm)."""
    if kind == "vae":  # refused before the work, not at the first sentence that differs
        import_extra("rapidfuzz", "eval")
    scores, nats, text_bytes, device = Scores(kind, controls), 0.0, 0, next(model.parameters()).device
    # disable=None: shown on a terminal only.
    with tqdm(
        total=expected_tokens, unit="tokens", unit_scale=True, disable=None if progress else True
    ) as bar:
        uploader = Uploader(device)
        for batch, group in batches(windows, batch_tokens, running_ends(model, tokenizer)):
            batch = uploader.prepare(batch).to(device)
            more = scores.add(model, batch, group, tokenizer.byte_lengths, ngram)
            uploader.learn(batch)
            nats, text_bytes = nats + more[0], text_bytes + more[1]
            bar.update(batch.tokens)
            bar.set_postfix_str(f"{bits_per_byte(nats, max(1, text_bytes)):.4f} bits/byte", refresh=False)
    return scores


def format_result(result: dict) -> str:
    """The result as a text table."""
    return render(Path(__file__).with_name("evaluate.txt.jinja"), {**result, "all": result}, FILTERS)
