"""`python -m tools.docs.prose`: how long the sentences of README.md and of the tutorials are.

The status is 1 where a sentence has more than 30 words, or a page's mean is above 16.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from data_prep.text.segmenter import Segmenter
from tools.commands import console

ROOT = Path(__file__).resolve().parents[2]
LONGEST, MEAN = 30, 16
# Code, comments, pictures; lines of tables and headings; marks of lists and quotations.
_OUT = re.compile(r"^(```|~~~).*?^\1|<!--.*?-->|!\[.*?\]\(.*?\)", re.MULTILINE | re.DOTALL)
_LINES = re.compile(r"^(\||#|!!!|:::|---).*$", re.MULTILINE)
_MARKS = re.compile(r"^[ \t]*(>|[-*] |\d+\. )[ \t]*", re.MULTILINE)


def sentences(text: str) -> list[str]:
    """The sentences of a Markdown page's prose."""
    prose = _LINES.sub("\n", _OUT.sub("\n", text))
    # A list item ends a paragraph, as a blank line does.
    prose = re.sub(r"^[ \t]*([-*] |\d+\. )", r"\n\n\1", prose, flags=re.MULTILINE)
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", _MARKS.sub("", prose))
    segmenter = Segmenter("sentence", "en")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", prose))
    return [one.strip() for part in paragraphs if part for one in segmenter(part) if one.strip()]


def prose() -> int:
    """How long the sentences of README.md and of the tutorials are."""
    status = 0
    for page in [ROOT / "README.md", *sorted((ROOT / "docs/tutorials").glob("*.md"))]:
        found = sentences(page.read_text(encoding="utf-8"))
        counts = [len(one.split()) for one in found]
        mean = statistics.fmean(counts)
        print(
            f"{page.relative_to(ROOT)}: {len(found)} sentences, mean {mean:.1f} words, longest {max(counts)}"
        )
        for one, count in zip(found, counts, strict=True):
            if count > LONGEST:
                status = 1
                print(f"  {count} words: {one}")
        if mean > MEAN:
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(console("docs.prose", prose))
