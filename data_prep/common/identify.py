"""Which language a text is in, by its letters: py3langid (extra `lang`) on a bounded sample of the text.

The script comes first: letters of the minor script of a sample are ignored, so that a quoted word of Russian
does not make an English text Russian. A long text is judged at several places, and the majority decides.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

from data_prep.common.extras import import_extra

EXTRA = "lang"
VERSION = 1  # of the sampling and the choice of script: raised when any text could be identified differently
PLACES, PLACE = 8, 125  # of a long text, and characters at each
SURE = 0.9  # confidence at every second place that makes the others superfluous
_LATIN = re.compile("[A-Za-zªºÀ-ÖØ-öø-ɏ\u0300-\u036fḀ-ỿＡ-Ｚａ-ｚ]+")
# Letters and their marks of alphabets that are not Latin; and of East Asia, each worth four letters.
_FAR = re.compile("[\u0370-\u1dff\u1f00-\u1fff\u2c00-\u2e7f\ua4d0-\uabff\ufb00-\ufdff\ufe70-\ufefe]+")
_EAST = re.compile("[\u3040-\ua4cf\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]+")
EAST_WEIGHT = 4


def identifier() -> str:
    """Name and versions of the identifier, for fingerprints. Raises: UserError without the extra."""
    # Imported here: it takes longer than most that the command's `--help` needs.
    from importlib.metadata import version

    import_extra("py3langid", EXTRA)
    return f"py3langid {version('py3langid')}, {VERSION}"


def labels() -> list[str]:
    """All codes that `identify` may give; `zxx` for no language. Raises: UserError without the extra."""
    return _model().labels


def identify(text: str) -> tuple[str, float]:
    """The code of the language of most of the text, or `zxx`, and its share of the votes (0 to 1).

    Raises: UserError without the extra.
    """
    samples = [text]
    if len(text) > PLACES * PLACE:
        starts = [place * (len(text) - PLACE) // (PLACES - 1) for place in range(PLACES)]
        samples = [text[start : start + PLACE] for start in starts]
    votes = Counter(_vote(samples[::2]))
    if len(samples) > 1 and (len(votes) > 1 or max(votes.values()) < SURE * len(samples[::2])):
        votes.update(_vote(samples[1::2]))
    else:
        samples = samples[::2]
    language, weight = votes.most_common(1)[0]
    # Rounded: the last digits depend on the processor, and shards must not.
    return language, round(weight / len(samples), 3)


def _vote(samples: list[str]) -> dict[str, float]:
    """The sum of confidences of each language."""
    votes: dict[str, float] = {}
    for sample in samples:
        language, confidence = _model().classify(_of_main_script(sample))
        votes[language] = votes.get(language, 0.0) + confidence
    return votes


def _of_main_script(text: str) -> str:
    """The text without the letters of its minor script."""
    if text.isascii():
        return text
    latin, far, east = (sum(map(len, letters.findall(text))) for letters in (_LATIN, _FAR, _EAST))
    if latin >= far + EAST_WEIGHT * east:
        return _EAST.sub(" ", _FAR.sub(" ", text))
    return _LATIN.sub(" ", text)


@functools.cache
def _model() -> Any:
    langid = import_extra("py3langid.langid", EXTRA)
    import numpy as np

    class Identifier(langid.LanguageIdentifier):  # type: ignore[name-defined]
        """In float64, so that the order of the additions does not change a rounded confidence."""

        __slots__ = ()

        def _sparse_score(self, visits, table):
            features = np.fromiter(visits.keys(), np.intp, len(visits))
            counts = np.fromiter(visits.values(), np.float64, len(visits))
            return np.log1p(counts) @ table[features].astype(np.float64) + self.nb_pc

    found = Identifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    # Bosnian differs too little from Croatian: with it in the choice, a third of both is wrong.
    found.set_languages(set(found.labels) - {"bs"})
    # Stored in 16 bits, which are slow to compute with.
    found.nb_ptc = found.nb_ptc.astype(np.float32)
    return found
