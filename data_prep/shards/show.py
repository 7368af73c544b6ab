"""`data-prep show`: documents of a shard set, printed sentence by sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.common.errors import counted
from data_prep.corpus.compression import MARKS
from data_prep.shards.layout import Document
from data_prep.shards.reader import ShardSet


def show(folder: str | Path, count: int, number: int = 0, key: str | None = None) -> Iterator[str]:
    """Documents as lines, each sentence as a JSON string: `count` from `number`, or all with id `key`.

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
        confidence = "" if document.confidence is None else f" {document.confidence:.2f}"
        marks = "".join(f", {name}" for bit, name in MARKS.items() if document.mark & bit)
        yield (
            f"── {json.dumps(document.id)} ({document.language}{confidence}, {document.source}{marks}): "
            f"{counted(document.sentence_lengths.size, 'sentence')}, "
            f"{counted(document.tokens.size, 'token')}, {counted(document.bytes, 'byte')}"
        )
        for place, tokens in enumerate(document.sentences(), start=1):
            yield f"{place:5d} [{tokens.size:3d}] {json.dumps(tokenizer.decode(tokens), ensure_ascii=False)}"
