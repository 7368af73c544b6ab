"""Punctuation marks and letters: sets of characters and expressions that find them."""

from __future__ import annotations

import re

# Stops and pauses of scripts that have their own. Stops: Unicode's Sentence_Terminal, less Myanmar's little
# section (a comma to its readers), and with the Hebrew sof pasuq and Tibetan shads. Armenian, Arabic, Syriac,
# NKo, Samaritan, Indic dandas, Tibetan, Myanmar, Ethiopic, Canadian syllabics, Philippine, Khmer, Mongolian,
# Limbu, Tai Tham, Balinese, Lepcha, Ol Chiki, rare Latin marks, Lisu, Vai, Bamum, Phags-pa, Saurashtra,
# Kayah Li, Javanese, Cham, Meetei Mayek.
_OTHER_STOPS = (
    "\u0589\u05c3\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965"
    "\u0f0d\u0f0e\u0f0f\u0f10\u0f11\u0f12\u0f14\u104b\u1362\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u1803"
    "\u1809\u1944\u1945\u1aa8\u1aa9\u1aaa\u1aab\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d\u1b7e\u1c3b\u1c3c\u1c7e\u1c7f"
    "\u203d\u2e2e\u2e3c\u2e53\u2e54\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9"
    "\uaa5d\uaa5e\uaa5f\uaaf0\uaaf1\uabeb\ufe12\ufe15\ufe16\ufe52\ufe56\ufe57"
)

OTHER_PAUSES = (
    "\u055d\u060c\u061b\u0703\u0704\u0705\u0706\u0707\u0708\u0709\u07f8\u104a\u1363\u1364\u1365\u1366\u1802"
    "\u1804\u1808\u17d6\u1b5d\u2e32\u2e34\u2e35\u2e41\ua4fe\ua60d\ua6f4\ua6f5\ua9c7\ufe10\ufe11\ufe13\ufe14"
    "\ufe50\ufe51"
)

# Sentence_Terminal above U+FFFF, scanned for by `other` alone: they slow the search in every other text.
FAR_STOPS = "".join(
    chr(code)
    for first, last in (
        (0x10A56, 0x10A57), (0x10F55, 0x10F59), (0x10F86, 0x10F89), (0x11047, 0x11048), (0x110BE, 0x110C1),
        (0x11141, 0x11143), (0x111C5, 0x111C6), (0x111CD, 0x111CD), (0x111DE, 0x111DF), (0x11238, 0x11239),
        (0x1123B, 0x1123C), (0x112A9, 0x112A9), (0x1144B, 0x1144C), (0x115C2, 0x115C3), (0x115C9, 0x115D7),
        (0x11641, 0x11642), (0x1173C, 0x1173E), (0x11944, 0x11944), (0x11946, 0x11946), (0x11A42, 0x11A43),
        (0x11A9B, 0x11A9C), (0x11C41, 0x11C42), (0x11EF7, 0x11EF8), (0x11F43, 0x11F44), (0x16A6E, 0x16A6F),
        (0x16AF5, 0x16AF5), (0x16B37, 0x16B38), (0x16B44, 0x16B44), (0x16E98, 0x16E98), (0x1BC9F, 0x1BC9F),
        (0x1DA88, 0x1DA88),
    )
    for code in range(first, last + 1)
)  # fmt: skip

WIDE_STOPS = "。！？｡" + _OTHER_STOPS + FAR_STOPS  # end a sentence whatever follows
STOPS = WIDE_STOPS + ".!?．‽⁇⁈⁉‼\u037e"
ELLIPSES = "…⋯"
WIDE_PAUSES = "，；：、､﹐﹔﹕"
PAUSES = WIDE_PAUSES + ",;:" + OTHER_PAUSES
DASHES = "—–―⸺"
QUOTE_CLOSERS = "\"'”’」』»﹂﹄"

# What may be between a mark and the cut: closing quotes and brackets, Markdown's emphasis, and characters
# that join the one before them (accents, joiners, variation selectors), which no cut may separate from it.
# Marks of direction close or open as well.
EXTENDERS = "\u200b\u200c\u200d\u2060\u20e3\ufeff"
DIRECTION_CLOSERS, DIRECTION_OPENERS = (
    "\u061c\u200e\u200f\u202c\u2069",
    "\u202a\u202b\u202d\u202e\u2066\u2067\u2068",
)
EXTENDER_RANGES = "\u0300-\u036f\ufe00-\ufe0f"
CLOSERS = QUOTE_CLOSERS + ")]}）］｝】》〉〕〗〙〛*_`~" + EXTENDERS + DIRECTION_CLOSERS
OPENERS = "\"'“‘「『«﹁﹃([{（［｛【《〈〔〖〘〚*_`~#¿¡" + DIRECTION_OPENERS

# Quotes that open in English and close elsewhere: „Komm!“ and »Komm!«
TWO_WAY_QUOTES = "“‘«‹"
MARK = re.escape("".join(c for c in STOPS if c not in FAR_STOPS) + ELLIPSES + PAUSES + DASHES)
CLOSE = re.escape(CLOSERS) + EXTENDER_RANGES

# After a mark, without a space: [12], [1,2], [12]:34, [citation needed], ¹
NOTES = (
    rf"(?:(?:\[\d{{1,3}}\](?::\d{{1,4}}(?:[–-]\d{{1,4}})?(?=\s|\Z))?"
    rf"|(?<=[.?…。！？)\]\"”])\[\d{{1,3}}(?:[,–-] ?\d{{1,3}})+\]"
    rf"|(?<=[.!?)\]\"”])\[[^\W\d_\u3041-\u9fff][^\[\]\n_]{{0,30}}\](?=[\s\[{CLOSE}]|\Z)|[¹²³⁰⁴-⁹†‡]+)[{CLOSE}]*)*"
)

WORD_CHARACTER = re.compile(r"[^\W_]")
_EAST_ASIAN = r"\u2e80-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
EAST_ASIAN = re.compile(f"[{_EAST_ASIAN}]")
KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa]")
_LATIN = r"A-Za-zªºÀ-ÖØ-öø-\u02b8\u1d00-\u1dbf\u1e00-\u1eff\u2c60-\u2c7f\ua720-\ua7ff\uab30-\uab6f"
LATIN_LETTERS = re.compile(f"[{_LATIN}]+")
_FAR = (
    r"\u0370-\u1cff\u1f00-\u1fff\u2c00-\u2c5f\u2c80-\u2dff\ua000-\ua71f\ua800-\uab2f\uab70-\ud7ff"
    r"\ufb13-\ufdff\ufe70-\ufefc\U00010000-\U0001efff"
)
FAR_LETTERS = re.compile(f"[{_FAR}]+")  # letters of other scripts

# Sets for expressions: small and capital letters; letters of scripts without case, with the marks on them.
_LETTERS = [chr(code) for first, last in ((0x41, 0x530), (0x1E00, 0x2000)) for code in range(first, last)]
LOWER = "".join(letter for letter in _LETTERS if letter.islower() and letter.title() != letter)
UPPER = "".join(letter for letter in _LETTERS if letter.isupper())
CASELESS = (
    r"\u05d0-\u05ea\u0620-\u064a\u0671-\u06d3\u0900-\u0963\u0971-\u0e4e\u0e81-\u0ede\u10d0-\u10ff"
    r"\uac00-\ud7a3"
)
