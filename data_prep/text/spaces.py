"""Sentence ends in writing that has spaces between clauses and no full stops (Thai)."""

from __future__ import annotations

import re

from data_prep.text.language_rules import Rules

SHORTEST = 10  # letters of a sentence, without those before the last abbreviation
SHORT_NAME = 6  # a word in a list, or a surname
_CHUNK = re.compile(r"\S+")


def spaced_cuts(text: str, begin: int, end: int, rules: Rules, cuts: list[int]) -> list[int]:
    """`cuts` of one line, with those at spaces.

    Those are after enough letters, not beside abbreviations and single words, not before words that continue,
    and beside numbers and repetition marks only before words that start sentences.
    """
    found, size, marks = [], 0, iter([*cuts, end])
    cut, before, stop = next(marks), "", begin
    chunks = list(_CHUNK.finditer(text, begin, end))
    for index, chunk in enumerate(chunks):
        word, start = chunk.group(), chunk.start()
        while cut <= start:
            found.append(cut)
            size, before, cut = 0, "", next(marks)
        letters = len(rules.script.findall(word))
        if before and size >= SHORTEST and "." not in word + before and rules.script.match(word):
            titled = before.startswith(tuple(rules.never_last))
            plain = rules.script.match(before[-1]) and before[-1] != "ๆ" and not titled
            single = letters <= SHORT_NAME and index + 1 < len(chunks)
            starts = word.startswith(rules.starting)
            if starts or (plain and not single and not word.startswith(rules.continuing)):
                found.append(stop)
                size = 0
        size = 0 if "." in word and size < SHORTEST else size + letters
        before, stop = word, chunk.end()
    return found
