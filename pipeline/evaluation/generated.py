"""Text that a model wrote, as documents to score, and how often its sentence ends are the segmenter's cuts.

A model ends a sentence before it knows what follows; the segmenter, which reads the text again, does. Where
they disagree, the model reads its own text in other sentences than it wrote (docs/evaluation.md).
"""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import UserError
from data_prep.corpus.documents import RawDocument
from data_prep.text.sentences import SentenceSettings, cut_document
from data_prep.text.tokenizer import Tokenizer


def read_generated(path: str | Path) -> tuple[list[RawDocument], list[list[int]]]:
    """The texts of an output of `sllm generate --prompts`, with their prompts, and for each the places in
    characters where the model ended a sentence and wrote another.

    Raises: UserError for a line that is none of that command.
    """
    documents, ends = [], []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            value = json.loads(line)
            texts = value["samples"] if "error" not in value else []
            for sample in texts:
                prompt, sentences = value["prompt"], sample["sentences"]
                places = list(accumulate(map(len, sentences), initial=len(prompt)))
                documents.append(RawDocument(f"line {number}", prompt + "".join(sentences), "", "", number))
                ends.append(places[1:-1])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} line {number}: no output of `sllm generate --prompts`") from None
    return documents, ends


def cut_agreement(
    documents: list[RawDocument], ends: list[list[int]], tokenizer: Tokenizer, settings: SentenceSettings
) -> dict[str, Any]:
    """How many written sentence ends are cuts of the same text, and how many cuts are inside written
    sentences. The end of a text is no choice and is left out."""
    written = agreed = inside = 0
    for document, places in zip(documents, ends, strict=True):
        segmenter = settings.segmenter_for(document.language)
        tokens_T, lengths_S = cut_document(document.content, tokenizer, segmenter, settings)
        texts = np.split(tokens_T, np.cumsum(lengths_S)[:-1])
        cuts = set(accumulate(len(tokenizer.decode(tokens)) for tokens in texts))
        written += len(places)
        agreed += len(cuts.intersection(places))
        if places:
            inside += sum(places[0] < cut < places[-1] for cut in cuts.difference(places))
    return {
        "written_ends": written,
        "agreed": agreed,
        "share": agreed / written if written else None,
        "cuts_inside_sentences": inside,
    }
