"""`data-prep show`: documents of a shard set, printed sentence by sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.common.errors import counted
from data_prep.corpus.compression import MARKS
from data_prep.shards.layout import Document
from data_prep.shards.reader import ShardSet


def show(
    folder: str | Path, count: int, number: int = 0, key: str | None = None, as_json: bool = False
) -> Iterator[str]:
    """Documents as lines, each sentence as a JSON string: `count` from `number`, or all with id `key`.
    as_json: one line each, an object.

    Raises `UserError` when there is no such document.
    """
    shards = ShardSet.open(folder)
    tokenizer = shards.tokenizer()
    if key is not None:
        documents: Iterable[Document] = shards.find_all(key)
    else:
        last = min(number + count, max(shards.manifest["totals"]["documents"], number + 1))
        documents = map(shards.document, range(number, last))
    for document in documents:
        sentences = document.sentences()
        marks = [name for bit, name in MARKS.items() if document.mark & bit]
        if as_json:
            texts = [tokenizer.decode(tokens) for tokens in sentences]
            sizes = {"tokens": document.tokens.size, "bytes": document.bytes}
            yield json.dumps(document.facts() | sizes | {"marks": marks, "sentences": texts})
            continue
        source = ", ".join([document.source, *marks])
        confidence = "" if document.confidence is None else f" {document.confidence:.2f}"
        yield (
            f"── {json.dumps(document.id)} ({document.language}{confidence}, {source}): "
            f"{counted(document.sentence_lengths.size, 'sentence')}, "
            f"{counted(document.tokens.size, 'token')}, {counted(document.bytes, 'byte')}"
        )
        for place, tokens in enumerate(sentences, start=1):
            yield f"{place:5d} [{tokens.size:3d}] {json.dumps(tokenizer.decode(tokens), ensure_ascii=False)}"
