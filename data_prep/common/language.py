"""Which language a text is in, by its script."""

from __future__ import annotations

import functools

SCRIPT_SAMPLE = 2000  # characters; enough to tell one script from another
_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())


def detect_language(text: str) -> str:
    """By the script of the first letters: `zh` when at least a fifth of them are Chinese characters, `other`
    when most are neither Latin nor Chinese, else `en`.
    """
    sample = text[:SCRIPT_SAMPLE]
    if sample.isascii():
        return "en"
    plain = sample.encode("ascii", "ignore")
    # Too few other characters to matter, whatever they are: most English texts end here.
    if 5 * (len(sample) - len(plain)) <= len(plain.translate(None, _NO_LETTERS)):
        return "en"
    import numpy as np  # not for `data-prep --help`

    codes = np.frombuffer(sample.encode("utf-32-le", "surrogatepass"), np.uint32)
    table = _scripts()
    _, latin, chinese, rest = np.bincount(table[np.minimum(codes, table.size - 1)], minlength=4)
    letters = latin + chinese + rest
    if 5 * chinese > letters:
        return "zh"
    return "other" if 2 * rest > letters else "en"


@functools.cache
def _scripts():
    """uint8 [characters]: 1 Latin letter, 2 Chinese character, 3 other letter, 0 anything else."""
    import numpy as np

    # Planes 0 to 3; nothing above is a letter, and all of it shares the last entry.
    table = np.fromiter((3 * chr(code).isalpha() for code in range(0x32001)), np.uint8)
    for first, last in ("AZ", "az", "ªª", "ºº", "ÀÖ", "Øö", "øɏ", "Ḁỿ", "ＡＺ", "ａｚ"):
        table[ord(first) : ord(last) + 1] = 1
    for first, last in ("\u3400\u9fff", "\uf900\ufaff", "\U00020000\U00031fff"):
        table[ord(first) : ord(last) + 1] = 2
    return table
