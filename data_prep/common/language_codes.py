"""The code of a language, from a name or a code of any standard."""

from __future__ import annotations

import functools
import re

from data_prep.common.errors import UserError

NO_LANGUAGES = ("und", "unk", "mul", "mis", "zxx", "na")  # codes that name no language
_CODE = re.compile(r"(?:__label__)?([a-z]{2,3})(?![^\W_])", re.IGNORECASE)  # `__label__` is fastText's
_MORE_NAMES = {"汉语": "zh", "漢語": "zh"}
_IN_BRACKETS = re.compile(r"\s*[(\[].*")


def normal_language(label: object) -> str | None:
    """The shortest code of the language that a record names; None for no language.

    `zh-CN`, `zho`, `cmn_Hans` and `Chinese (Simplified)` are `zh`, `vie_Latn` is `vi`. Codes are those of ISO
    639 and BCP 47, names those of CLDR and Wikidata.
    """
    return _normal(label.strip()) if isinstance(label, str) else None


def require_language(label: str, option: str) -> str:
    """`normal_language`; raises `UserError` when `label` names none."""
    if (code := normal_language(label)) is None:
        raise UserError(f"language {label!r} is not known; write a code, for example {option} en")
    return code


@functools.lru_cache(maxsize=4096)
def _normal(label: str) -> str | None:
    from langcodes import Language, standardize_tag

    label = _MORE_NAMES.get(label, label)
    found = _CODE.match(label)
    if found and not re.search(r"\s", label):
        tag = Language.get(found[1].lower())
    else:
        tag = _by_name(label) or _by_name(_IN_BRACKETS.sub("", label))
    if tag is None or not tag.language or not tag.is_valid():
        return None
    # The dominant member of a group has the group's code: cmn is zh, arb is ar, yue stays.
    code = Language.get(standardize_tag(tag.language, macro=True)).language
    return None if code in NO_LANGUAGES else code


def _by_name(label: str):
    import langcodes

    try:
        return langcodes.find(label) if label else None
    except LookupError:
        return None
