"""Copy Unicode CLDR's sentence break suppressions into the languages' files.

    python -m tools.cldr_abbreviations [LANGUAGE ...]

Reads them from the ICU library of this machine (Debian: libicu72). They are written to the key `cldr` at the
end of data_prep/text/languages/LANGUAGE.yaml. Copyright © 1991-2026 Unicode, Inc., Unicode License v3
(https://www.unicode.org/license.txt). Raise `segment_rules.VERSION` after a change.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import textwrap
from pathlib import Path

from data_prep.common.command_line import Many
from data_prep.common.errors import UserError
from tools.commands import console

FOLDER = Path(__file__).resolve().parent.parent / "data_prep" / "text" / "languages"
WITH_LISTS = ("de", "es", "fr", "it", "pt", "ru")  # English has its own, measured list
HEADER = "# Unicode CLDR's suppressions (Unicode License v3), by tools/cldr_abbreviations.py.\ncldr: >-\n"


def suppressions(language: str) -> list[str]:
    """CLDR's abbreviations of a language, without spaces and final full stop.

    Raises:
        UserError: ICU is missing, or has none for the language.
    """
    path = ctypes.util.find_library("icuuc")
    if path is None:
        raise UserError("no ICU library (libicuuc) on this machine; install it first")
    version = path.rsplit(".", 1)[-1]
    icu, error = ctypes.CDLL(path), ctypes.c_int(0)

    def call(name: str, *arguments: object) -> int:
        function = getattr(icu, f"{name}_{version}")
        function.restype = ctypes.c_void_p
        return function(*arguments, ctypes.byref(error))

    bundle = call("ures_open", f"icudt{version}l-brkitr".encode(), language.encode())
    for key in (b"exceptions", b"SentenceBreak"):
        bundle = call("ures_getByKey", ctypes.c_void_p(bundle), key, None)
    if error.value > 0:
        raise UserError(f"ICU has no suppressions for {language!r} (error {error.value})")
    words, length = [], ctypes.c_int32(0)
    for index in range(getattr(icu, f"ures_getSize_{version}")(ctypes.c_void_p(bundle))):
        at = call("ures_getStringByIndex", ctypes.c_void_p(bundle), index, ctypes.byref(length))
        word = ctypes.string_at(at, 2 * length.value).decode("utf-16-le")
        words.append("".join(word.split()).removesuffix("."))
    return sorted(set(words))


def cldr_abbreviations(languages: Many = (), /) -> None:
    """Copy Unicode CLDR's sentence break suppressions into the languages' files.

    Args:
        languages: de, es, fr, it, pt, ru (default: all)
    """
    for language in languages or WITH_LISTS:
        path = FOLDER / f"{language}.yaml"
        head = path.read_text(encoding="utf-8").split(HEADER)[0]
        lines = textwrap.wrap(
            " ".join(suppressions(language)), 106, break_long_words=False, break_on_hyphens=False
        )
        path.write_text(head + HEADER + "".join(f"  {line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(console("cldr_abbreviations", cldr_abbreviations))
