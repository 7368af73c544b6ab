"""Languages by name and code of every standard."""

from __future__ import annotations

import pytest

from data_prep.common.errors import UserError
from data_prep.common.language_codes import normal_language, require_language
from data_prep.text.sentences import SentenceSettings

LABELS = {
    "vi": "vi VI vie vie_Latn Vietnamese vietnamese __label__vi __label__vie_Latn vi-VN",
    "th": "th tha Thai tha_Thai",
    "sr": "sr srp Serbian sr-Latn srp_Cyrl",
    "hu": "hu hun Hungarian",
    "cs": "cs ces cze Czech",
    "ar": "ar ara arb arb_Arab Arabic",
    "zh": "zh zho chi cmn zho_Hans cmn_Hant zh-CN zh_Hant_TW Chinese Mandarin 中文 汉语 漢語 zh_CN.UTF-8",
    "yue": "yue yue_Hant Cantonese",
    "en": "en eng EN ENG English en-GB en_XX",
    "fa": "fa fas per pes Persian Farsi",
    "el": "el ell gre Greek",
    "nb": "nb nob Bokmål",
    "he": "he heb iw Hebrew",
    "ms": "ms msa may zsm Malay",
    "sw": "sw swa swh Swahili",
}


@pytest.mark.parametrize(("code", "labels"), LABELS.items())
def test_codes_and_names(code: str, labels: str):
    assert {label: normal_language(label) for label in labels.split()} == dict.fromkeys(labels.split(), code)


def test_names_of_several_words():
    for label, code in (
        ("Chinese (Simplified)", "zh"),
        (" English (United States) ", "en"),
        ("Haitian Creole", "ht"),
        ("Norwegian Bokmål", "nb"),
        ("Brazilian Portuguese", "pt"),
    ):
        assert normal_language(label) == code


@pytest.mark.parametrize(
    "label", ["", "und", "unk", "mul", "zxx", "NA", "n/a", "Python", "unknown", "xx", "?", None, 3]
)
def test_labels_that_name_no_language(label: object):
    assert normal_language(label) is None
    if isinstance(label, str):
        with pytest.raises(UserError, match="is not known; write a code, for example --lang en"):
            require_language(label, "--lang")


def test_any_language_has_a_segmenter():
    for language in ("vi", "th", "other", "auto", "en"):
        assert SentenceSettings("clause", language, 64).segmenter_for()("One. Two.")
