"""`sllm robustness`: bits per byte on changed text (`VARIANTS`, and mixed languages if a second text is
given).

A variant is a function (text, numpy Generator) → text. Each document has its own generator, seeded by the
seed, the variant and the document's number, so that a seed gives the same text however many documents are
read. Every model is evaluated with its own settings; docs/evaluation.md explains the table.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, counted, log
from data_prep.common.page import NOTHING, Table, to_text
from data_prep.corpus.documents import RawDocument, Reject
from data_prep.corpus.finding import find_inputs
from data_prep.text.segment_rules import DASHES, ELLIPSES, PAUSES, STOPS
from data_prep.text.segmenter import get_segmenter
from data_prep.text.sentences import LONGEST, SentenceSettings, cut_document
from data_prep.text.tokenizer import LossyTokenization, Tokenizer
from pipeline.common.text import with_interval
from pipeline.evaluation.evaluate import Loaded, evaluate, load, read_records, sentence_settings

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
BYTES_NOTE = "bits per byte are per byte of the changed text, which has other bytes than the text as it comes"
PLAIN = "as it comes"
MIXED = "mixed languages"
NOISE = 0.05  # share of letters

Variant = Callable[[str, np.random.Generator], str]

# These are not punctuation between letters or digits: 3.14, 12:30, e.g, example.com, http://
_NARROW = re.escape(".,;:!?–")
_EAST = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_OTHERS = re.escape("".join(sorted(set(STOPS + ELLIPSES + PAUSES + DASHES) - set(".,;:!?–"))))
_MARK = rf"(?:[{_OTHERS}]|(?!://)[{_NARROW}](?![0-9A-Za-z])|(?<=[{_EAST}])[{_NARROW}]|(?<!\s)--+|--+(?=\s))"
_MARKS = re.compile(rf"[ \u00a0]?{_MARK}+(?:[ \u00a0]{_MARK}+)*")
_ONE_MARK = re.compile(rf"(?!-){_MARK}")
# The next word: one Chinese character, or everything up to white space or a mark.
_NEXT_WORD = re.compile(rf"(\s*)([\u3400-\u9fff]|(?:(?!{_MARK})[^\s\u3400-\u9fff])+)")
_SWAPS = {mark: marks for marks in (".,;:!?", "。，；：！？") for mark in marks}


def as_it_comes(text: str, generator: np.random.Generator) -> str:
    return text


def lowercase(text: str, generator: np.random.Generator) -> str:
    return text.lower()


def no_punctuation(text: str, generator: np.random.Generator) -> str:
    """Without the marks that end sentences or clauses; a mark that was the only separator becomes a space."""

    def without(found: re.Match) -> str:
        before, after = text[max(0, found.start() - 1) : found.start()], text[found.end() : found.end() + 1]
        if found[0][0].isspace():
            before = found[0][0]
            return before if after and not after.isspace() else ""
        narrow = before.isalnum() and after.isalnum() and not re.search(f"[{_EAST}]", before + after)
        return " " if narrow else ""

    return _MARKS.sub(without, text)


def wrong_punctuation(text: str, generator: np.random.Generator) -> str:
    """A third of the marks changed: half of them swapped for others, half moved behind the next word."""
    marks = list(_ONE_MARK.finditer(text))
    chosen = np.sort(generator.choice(len(marks), round(len(marks) / 3), replace=False)) if marks else ()
    parts, done = [], 0
    for number in chosen:
        at, mark = marks[number].start(), marks[number][0]
        word = _NEXT_WORD.match(text, at + 1)
        parts.append(text[done:at])
        if word and generator.random() < 0.5:
            parts += [word[1], word[2], mark]
            done = word.end()
        else:
            east = at and re.match(f"[{_EAST}]", text[at - 1])
            others = _SWAPS.get(mark, _SWAPS["。" if east else "."]).replace(mark, "")
            parts.append(others[generator.integers(len(others))])
            done = at + 1
    return "".join([*parts, text[done:]])


def one_long_sentence(text: str, generator: np.random.Generator) -> str:
    """No marks and no line breaks, so that only the token limit cuts sentences."""
    lines = (line.strip() for line in no_punctuation(text, generator).splitlines())
    return " ".join(filter(None, lines))


def noise(text: str, generator: np.random.Generator) -> str:
    """5 % of the letters swapped with the next one, dropped, or doubled."""
    letters = np.array([character.isalpha() for character in text], dtype=bool)
    hit = np.flatnonzero(letters & (generator.random(len(text)) < NOISE))
    characters = list(text)
    for at, kind in zip(hit.tolist(), generator.integers(3, size=len(hit)).tolist(), strict=True):
        if kind == 0 and at + 1 < len(text) and letters[at + 1]:
            characters[at : at + 2] = characters[at + 1], characters[at]
        elif kind == 1:
            characters[at] = ""
        else:
            characters[at] *= 2
    return "".join(characters)


def mixed_with(others: Sequence[str]) -> Variant:
    """Every second sentence replaced by the next one of another text."""
    segmenter = get_segmenter("sentence", "auto")

    def mixed_languages(text: str, generator: np.random.Generator) -> str:
        foreign = segmenter(others[int(generator.integers(len(others)))])
        parts = segmenter(text)
        for number in range(1, len(parts), 2):
            part = parts[number]
            space = part[: len(part) - len(part.lstrip())]
            parts[number] = space + foreign[number // 2 % len(foreign)].strip()
        return "".join(parts)

    return mixed_languages


VARIANTS: dict[str, Variant] = {
    PLAIN: as_it_comes,
    "lowercase": lowercase,
    "no punctuation": no_punctuation,
    "wrong punctuation": wrong_punctuation,
    "one long sentence": one_long_sentence,
    "noise": noise,
}


def changed(
    documents: Sequence[RawDocument], name: str, variant: Variant, seed: int
) -> list[RawDocument | Reject]:
    """The documents of one variant, in order; one without remaining text becomes a `Reject`."""
    records: list[RawDocument | Reject] = []
    for number, document in enumerate(documents):
        generator = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
        content = variant(document.content, generator)
        if content.strip():
            records.append(dataclasses.replace(document, content=content))
        else:
            records.append(Reject(document.line, "empty content", document.member))
    return records


def cut_by_limit(
    records: Sequence[RawDocument | Reject], tokenizer: Tokenizer, cut: SentenceSettings
) -> float:
    """Share of sentences that end at the token limit instead of at the segmenter's cut."""
    free = dataclasses.replace(cut, max_tokens=LONGEST)
    sentences = whole = 0
    for record in records:
        if isinstance(record, Reject):
            continue
        segmenter = cut.segmenter_for(record.language)
        try:
            sentences += len(cut_document(record.content, tokenizer, segmenter, cut)[1])
            whole += len(cut_document(record.content, tokenizer, segmenter, free)[1])
        except LossyTokenization:  # counted when it is scored
            continue
    return (sentences - whole) / max(1, sentences)


def _read(path: str, limit: int | None) -> tuple[list[RawDocument], dict[str, int]]:
    documents: list[RawDocument] = []
    rejected: Counter[str] = Counter()
    for record in read_records(path, "auto"):
        if isinstance(record, Reject):
            rejected[record.reason] += 1
        else:
            documents.append(record)
            if len(documents) == limit:
                break
    if not documents:
        raise UserError(f"{path}: nothing to evaluate, it holds no text")
    return documents, dict(rejected)


def run(
    models: Sequence[str],
    text: str,
    mix: str | None = None,
    max_documents: int | None = None,
    seed: int = 1,
    output: str | None = None,
) -> dict:
    """Evaluate every model on every variant of the first `max_documents` documents of `text`.

    Returns: header, input, and by variant the figures of each model in the order given.
    Raises: UserError for missing or unreadable folders and files, and for texts without documents.
    """
    require_folder(output)
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    for path in filter(None, (text, mix)):
        find_inputs([path])
    documents, rejected = _read(text, max_documents)
    variants = dict(VARIANTS)
    if mix is not None:
        variants[MIXED] = mixed_with([document.content for document in _read(mix, None)[0]])
    texts = {name: changed(documents, name, variant, seed) for name, variant in variants.items()}
    by_model = [_of_model(load(model), text, texts) for model in models]
    result = {
        **header(PACKAGES),
        "text": text,
        "mix": mix,
        "seed": seed,
        "documents": len(documents),
        "rejected": rejected,
        "note": BYTES_NOTE,
        "models": [model for model, _ in by_model],
        "variants": {name: [figures[name] for _, figures in by_model] for name in texts},
        "skipped": {} if mix is not None else {MIXED: "no second text: give one with --mix FILE"},
    }
    write_result(result, output)
    return result


def _of_model(
    loaded: Loaded, text: str, texts: dict[str, list[RawDocument | Reject]]
) -> tuple[dict[str, object], dict[str, dict]]:
    """The model's description, and its figures by variant."""
    figures: dict[str, dict] = {}
    scored: dict[str, Any] = {}
    for name, documents in texts.items():
        log(f"{loaded.folder}: {name}")
        scored = evaluate(loaded, text=text, documents=documents)
        mine = {
            "model": loaded.folder,
            **{key: scored[key] for key in ("bits_per_byte", "bits_per_byte_interval")},
            "change": 0.0,
            **{key: scored[key] for key in ("bytes", "tokens", "sentences", "documents", "rejected")},
            "data_fingerprint": scored["data_fingerprint"],
        }
        figures[name] = mine
        mine["change"] = mine["bits_per_byte"] - figures[PLAIN]["bits_per_byte"]
        if loaded.kind == "sllm":
            cut = sentence_settings(loaded.model)
            mine |= {key: scored[key] for key in ("vector_gain", "vector_gain_interval")}
            mine["tokens_per_sentence"] = scored["tokens"] / scored["sentences"]
            mine["cut_by_limit"] = cut_by_limit(documents, loaded.tokenizer, cut)
    what = {key: scored[key] for key in ("model", "kind", "measures", "parameters", "window_tokens")}
    return {**what, "sentence_settings": scored["sentence_settings"]}, figures


def format_result(result: dict) -> str:
    """The result as a text table with a row for each variant and model."""
    rows = [
        (
            "" if number else name,
            mine["model"],
            with_interval(mine, "bits_per_byte"),
            "" if name == PLAIN else f"{mine['change']:+.4f}",
            with_interval(mine, "vector_gain"),
            f"{mine['tokens_per_sentence']:.1f}" if "cut_by_limit" in mine else NOTHING,
            f"{mine['cut_by_limit']:.1%}" if "cut_by_limit" in mine else NOTHING,
        )
        for name, of_models in result["variants"].items()
        for number, mine in enumerate(of_models)
    ]
    heads = ("variant", "model", "bits per byte", "change", "vector gain", "tokens/sentence", "at limit")
    table = to_text(Table(heads, rows, left=(0, 1)))
    notes = [
        f"{counted(result['documents'], 'document')} of {result['text']}, seed {result['seed']}; {BYTES_NOTE}"
    ]
    notes += [f"left out: {name} ({reason})" for name, reason in result["skipped"].items()]
    if any(model["measures"] == "reconstruction" for model in result["models"]):
        notes.append("a SentenceVAE rebuilds what it has read: its figures compare with no language model's")
    left_out = Counter(result["rejected"])
    for mine in chain.from_iterable(result["variants"].values()):
        left_out.update(mine["rejected"])
    notes += [f"records left out: {count} × {reason}" for reason, count in left_out.items()]
    return "\n".join([table, *notes])
