"""Data of the local tasks (`tasks/*.yaml`), made of documents at hand: no hub is needed.

The documents are those of the demo's validation split, or any file as for `sllm evaluate --text`, by
`--metadata text=FILE`. The same documents give the same items.
"""

from __future__ import annotations

import random
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from data_prep.common.errors import UserError
from data_prep.corpus.demo_corpus import write_demo_corpus
from data_prep.corpus.documents import RawDocument
from data_prep.text.segmenter import get_segmenter
from pipeline.evaluation.evaluate import read_records

ITEMS = 500  # at most
CONTEXT = 3  # sentences before the question
CHOICES = 4
WORDS = re.compile(r"[^\W\d_]{3,}")


def cloze(text: str | None = None, **_: Any) -> DatasetDict:
    """The last word of a paragraph that has the word before: `context`, `answer`."""
    items = []
    for sentences in _documents(text):
        *before, last = sentences
        words = last.rstrip(" .!?").split(" ")
        if len(before) >= CONTEXT and len(words) > 3 and WORDS.fullmatch(words[-1]):
            context = "".join(before[-CONTEXT:]) + last[: last.rindex(words[-1])].rstrip()
            if words[-1] in WORDS.findall(context):
                items.append({"context": context, "answer": " " + words[-1]})
    return _as_test_split(items)


def next_sentence(text: str | None = None, **_: Any) -> DatasetDict:
    """Which of four sentences comes next: `context`, `choices`, `label`. Three are of other documents."""
    documents = [sentences for sentences in _documents(text) if len(sentences) > CONTEXT]
    items, rng = [], random.Random(0)
    for number, sentences in enumerate(documents):
        at = rng.randrange(CONTEXT, len(sentences))
        right = sentences[at].strip()
        others = [n for n in range(len(documents)) if n != number]
        wrong = [rng.choice(documents[n]).strip() for n in rng.sample(others, min(len(others), CHOICES - 1))]
        choices = [right, *wrong]
        if len({*choices}) == CHOICES:
            rng.shuffle(choices)
            context = "".join(sentences[at - CONTEXT : at]).rstrip()
            items.append({"context": context, "choices": choices, "label": choices.index(right)})
    return _as_test_split(items)


def sentence_order(text: str | None = None, **_: Any) -> DatasetDict:
    """Whether two sentences are in their order: `context`, `choices` (both orders), `label`."""
    items, rng = [], random.Random(0)
    for sentences in _documents(text):
        if len(sentences) > CONTEXT + 1:
            at = rng.randrange(CONTEXT, len(sentences) - 1)
            first, second = sentences[at].strip(), sentences[at + 1].strip()
            if first != second:
                choices = [f"{first} {second}", f"{second} {first}"]
                label = rng.randrange(2)
                choices = choices if label == 0 else choices[::-1]
                context = "".join(sentences[at - CONTEXT : at]).rstrip()
                items.append({"context": context, "choices": choices, "label": label})
    return _as_test_split(items)


def _as_test_split(items: list[dict[str, Any]]) -> DatasetDict:
    if not items:
        raise UserError("the documents are too few or too short for this task: give others, text=FILE")
    random.Random(0).shuffle(items)
    return DatasetDict(test=Dataset.from_list(items[:ITEMS]))


@lru_cache(maxsize=4)
def _documents(text: str | None) -> list[list[str]]:
    """Sentences of each document, with the white space before each."""
    if text is None:
        with tempfile.TemporaryDirectory() as folder:
            write_demo_corpus(folder)
            records = list(read_records(str(Path(folder) / "valid"), "auto"))
    else:
        records = list(read_records(text, "auto"))
    found = []
    for record in records:
        if isinstance(record, RawDocument):
            cuts = [0, *get_segmenter("sentence").cuts(record.content)]
            found.append([record.content[a:b] for a, b in zip(cuts, cuts[1:], strict=False)])
    return found
