"""Words of a text as comparisons of documents see them: in small letters, without punctuation."""

from __future__ import annotations

import re
import unicodedata

# Scripts without spaces between words: one character counts as a word. Letters, digits and marks otherwise.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+"


def words_of(text: str) -> list[str]:
    """The words in order: case, width, white space and punctuation make no difference."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return re.findall(_WORD, text.lower())
