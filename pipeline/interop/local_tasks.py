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
    """The last word of a sentence that stands before it, too: `context`, `answer`."""
    items = []
    for sentences in _documents(text):
        for at in range(CONTEXT, len(sentences)):
            words = sentences[at].rstrip(" .!?").split(" ")
            before = "".join(sentences[at - CONTEXT : at]) + " ".join(words[:-1])
            if len(words) > 3 and WORDS.fullmatch(words[-1]) and words[-1] in WORDS.findall(before):
                items.append({"context": before.rstrip(), "answer": f" {words[-1]}"})
    return _as_test_split(items)


def next_sentence(text: str | None = None, **_: Any) -> DatasetDict:
    """Which of four sentences comes next: `context`, `choices`, `label`. Three are of other documents."""
    documents = [sentences for sentences in _documents(text) if len(sentences) > CONTEXT]
    items, rng = [], random.Random(0)
    for number, sentences in enumerate(documents):
        others = [n for n in range(len(documents)) if n != number]
        for at in range(CONTEXT, len(sentences), CONTEXT + 1):
            drawn = rng.sample(others, min(len(others), CHOICES - 1))
            wrong = [rng.choice(documents[n][1:]).strip() for n in drawn]
            items.append(_choice(sentences, at, sentences[at].strip(), wrong, rng))
    return _as_test_split([item for item in items if len({*item["choices"]}) == CHOICES])


def sentence_order(text: str | None = None, **_: Any) -> DatasetDict:
    """Which order of two sentences is the right one: `context`, `choices`, `label`."""
    items, rng = [], random.Random(0)
    for sentences in _documents(text):
        for at in range(CONTEXT, len(sentences) - 1, CONTEXT + 2):
            first, second = sentences[at].strip(), sentences[at + 1].strip()
            items.append(_choice(sentences, at, f"{first} {second}", [f"{second} {first}"], rng))
    return _as_test_split([item for item in items if len({*item["choices"]}) == 2])


def _choice(
    sentences: list[str], at: int, right: str, wrong: list[str], rng: random.Random
) -> dict[str, Any]:
    choices = [right, *wrong]
    rng.shuffle(choices)
    context = "".join(sentences[at - CONTEXT : at]).strip()
    return {"context": context, "choices": choices, "label": choices.index(right)}


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
