"""`python -m tools.check_words [PATH …]`: refuse phrases of a private dialect, with the usual word for each.

Checks tracked code, docs, recipes, scripts and the "//" headers of JSON files. A line with the marker
`words: quoted`, and the line after it, may quote anything.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.common.command_line import Many
from tools.commands import console

ROOT = Path(__file__).resolve().parent.parent
PHRASES = {
    r"(go|goes|going) on": "resume, continue",
    r"anew|afresh|once more": "again, from scratch, re-",
    r"begun": "started",
    r"(is|are|be|been|was|were) told(?! apart)|says? so": "is reported, prints, logs",
    r"(come|comes|came) along": "ship with the package",
    r"drawn to the next embedding": "with embedding loss",
    r"stands? in|lies in": "is in",
    r"nobody|whoever": "if no process reads",
    r"put by|taken up|put back": "saved, loaded, released",
}
FILES = (".py", ".md", ".yaml", ".yml", ".sh", ".toml", ".cfg", ".json", ".jinja", "Makefile")
# Notes and records that hold earlier versions' output; word lists; this file.
ALLOWED = (
    "docs/lab-notes/",
    "data_prep/text/languages/",
    "tests/data/golden/",
    "tools/check_words.py",
    "tests/tools/test_check_words.py",
)
MARKER = "words: quoted"
# Words of a phrase may be on two lines, the second of which is a comment or a quotation.
_BETWEEN = r"[\s#>*]+"
_PATTERN = re.compile(
    "|".join(f"(?<![a-z])(?:{phrase.replace(' ', _BETWEEN)})(?![a-z])" for phrase in PHRASES), re.IGNORECASE
)


def text_of(path: Path) -> str:
    """What is checked of a file: all of it, or of JSON the lines of its header."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        header = re.search(r'"//":\s*(\[.*?\]|"[^"\n]*")', text, re.DOTALL)
        return "" if header is None else "\n" * text[: header.start()].count("\n") + header[0]
    return text


def found(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, phrase, what to write) of every phrase that no marker allows."""
    lines = text.split("\n")
    for match in _PATTERN.finditer(text):
        number = text.count("\n", 0, match.start()) + 1
        if any(MARKER in line for line in lines[max(0, number - 2) : number]):
            continue
        phrase = " ".join(re.split(_BETWEEN, match[0]))
        row = next(row for row in PHRASES if re.match(row, phrase, re.IGNORECASE))
        yield number, phrase, PHRASES[row]


def check_words(paths: Many = (), /) -> int:
    """Refuse phrases of a private dialect, with the usual word for each.

    Args:
        paths: files and folders (default: all that git tracks)
    """
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--", *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    hits = 0
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if not name.endswith(FILES) or name.startswith(ALLOWED) or not path.is_file():
            continue
        for line, phrase, instead in found(text_of(path)):
            print(f"{name}:{line}: {phrase!r}: write: {instead}")
            hits += 1
    if hits:
        print(f"{hits} phrases of the dialect", file=sys.stderr)
    return 1 if hits else 0


if __name__ == "__main__":
    raise SystemExit(console("check_words", check_words))
