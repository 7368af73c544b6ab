"""`data-prep show`: finished shards, printed sentence by sentence.

In: a shard folder. Out: lines for people. Called by `data_prep/cli.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.shards.reader import ShardSet


def show(folder: str | Path, count: int, number: int = 0, key: str | None = None) -> Iterator[str]:
    """Lines that show documents sentence by sentence, each as a JSON string: `count` from `number` on, or the
    one whose id is `key`. Raises `UserError` when there is no such document.
    """
    shards = ShardSet.open(folder)
    tokenizer = shards.tokenizer()
    if key is not None:
        documents = [shards.find(key)]
    else:
        last = min(number + count, max(shards.manifest["totals"]["documents"], number + 1))
        documents = map(shards.document, range(number, last))
    for document in documents:
        yield (
            f"── {json.dumps(document.id)} ({document.language}, {document.source}): "
            f"{document.sentence_lengths.size} sentences, "
            f"{document.tokens.size} tokens, {document.bytes} bytes"
        )
        for place, tokens in enumerate(document.sentences(), start=1):
            yield f"{place:5d} [{tokens.size:3d}] {json.dumps(tokenizer.decode(tokens), ensure_ascii=False)}"
