"""How much a sentence end says about the text behind it (docs/evaluation.md, Sentence ends look ahead).

    python -m tools.benchmarks.look_ahead FILE.jsonl[.gz] [--lang en] [--json]

The segmenter reads what follows a mark, so a sentence end that a model is given can depend on text that it
has not read. For every run of marks that is not inside a word, the cut in the document is compared with the
one that the text up to the mark decides by itself (`Segmenter.is_complete`, as for a prompt). The entropy of
the first given the second bounds from above what an end tells, in bits per byte of the text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
from collections import Counter
from typing import Any

from data_prep.common.errors import run_main
from data_prep.text.segmenter import LANGUAGES, NAMES, get_segmenter

_CLOSING = "[\"'”’)\\]」』]*"
MARKS = {
    "sentence": re.compile(rf"[.!?…。！？]+{_CLOSING}"),
    "clause": re.compile(rf"[.!?…,;:。！？，；：、—]+{_CLOSING}"),
}


def measure(texts: list[str], name: str, language: str) -> dict[str, Any]:
    """Counts of marks by (cut in the document, cut without what follows), and the bound in bits per byte."""
    segmenter = get_segmenter(name, language)
    counts: Counter[tuple[bool, bool]] = Counter()
    for text in texts:
        cuts = set(segmenter.cuts(text))
        for mark in MARKS[name].finditer(text):
            start = max(text.rfind("\n", 0, mark.start()) + 1, mark.start() - 1000)
            end = mark.end()
            behind = text[end : end + 1]
            if (
                behind.isascii()
                and not behind.isspace()
                or not text[end : (text.find("\n", end) + 1 or len(text) + 1) - 1].strip()
            ):
                continue  # inside a word; or at a line's end, which cuts whatever follows
            alone = segmenter.is_complete(text[start:end])
            counts[end in cuts, alone] += 1
    marks, size = counts.total(), sum(len(text.encode()) for text in texts)
    entropy = 0.0
    for alone in (True, False):
        of = [counts[cut, alone] for cut in (True, False)]
        entropy -= sum(n * math.log2(n / sum(of)) for n in of if n)
    return {
        "segmenter": name,
        "marks": marks,
        "decided_by_what_follows": (counts[True, False] + counts[False, True]) / marks,
        "bits_per_byte": entropy / size,
        "bytes": size,
    }


def main(argv: list[str] | None = None) -> int:
    return run_main("look_ahead", lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="look_ahead", description=__doc__.split("\n")[0])
    parser.add_argument("text", help="documents, .jsonl or .jsonl.gz, with `content`")
    parser.add_argument("--lang", choices=LANGUAGES, default="en")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    opened = gzip.open if arguments.text.endswith(".gz") else open
    with opened(arguments.text, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["content"] for line in lines]
    results = [measure(texts, name, arguments.lang) for name in NAMES]
    for one in results:
        print(
            json.dumps(one)
            if arguments.json
            else f"{one['segmenter']}: what follows decides {one['decided_by_what_follows']:.2%} of "
            f"{one['marks']:,} marks, at most {one['bits_per_byte']:.4f} bits per byte"
        )


if __name__ == "__main__":
    raise SystemExit(main())
