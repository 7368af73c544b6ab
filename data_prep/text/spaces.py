"""Sentence ends in writing that has spaces between clauses and no full stops (Thai)."""

from __future__ import annotations

import re

from data_prep.text.language_rules import Rules

# Letters that a sentence has at least, without names after titles and numbers: half of all Thai clauses are longer.
_SHORTEST = 10
_CHUNK = re.compile(r"\S+")


def spaced_cuts(text: str, begin: int, end: int, rules: Rules, cuts: list[int]) -> list[int]:
    """`cuts` of one line, with those at spaces: after enough letters, not beside numbers, abbreviations and
    repetition marks, and not before words that continue (`continuers`)."""
    found, size, marks = [], 0, iter([*cuts, end])
    cut, before, stop = next(marks), "", begin
    for chunk in _CHUNK.finditer(text, begin, end):
        word, start = chunk.group(), chunk.start()
        while cut <= start:
            found.append(cut)
            size, before, cut = 0, "", next(marks)
        plain = before and rules.script.match(before[-1]) and rules.script.match(word) and "." not in word
        if plain and size >= _SHORTEST and not word.startswith(rules.continuing):
            found.append(stop)
            size = 0
        size = 0 if "." in word and size < _SHORTEST else size + len(rules.script.findall(word))
        before, stop = word, chunk.end()
    return found
