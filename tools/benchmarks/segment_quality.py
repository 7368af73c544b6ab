"""Quality and speed of segmentation, beside a naive regex and, where installed, `sentencex` and ICU.

    python -m tools.benchmarks.segment_quality GOLDEN... [--text FILE] [--json]

Golden sets are jsonl files named `…_<language>.jsonl` with `cut` (`‖` is a cut of both segmenters, `¦` one of
`clause` only) and optionally `language`. The speed is measured on a UTF-8 text file or WanJuan jsonl (.gz
too). `exact`: share of cases cut exactly as expected. `F1`: of inner cut positions over all cases; white
space at a cut is ignored. `kept`: share of cases whose pieces join to the text. MB/s: UTF-8 bytes per
CPU-second, one process, best of three. Results: docs/segmentation.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.common.errors import UserError, run_main
from data_prep.text.segmenter import LANGUAGES, NAMES, get_segmenter

Cutter = Callable[[str, str], list[str]]  # text, language code
_NAIVE = {
    "sentence": re.compile(r"(?<=[.!?…])[\"'”’)\]]*(?=\s)|(?<=[。！？])[”’」』]*|\n"),
    "clause": re.compile(r"(?<=[.!?…,;:])[\"'”’)\]]*(?=\s)|(?<=[。！？，；：、])[”’」』]*|\n"),
}


@dataclass
class Case:
    """One golden case; `sentence` and `clause` hold the expected inner cuts (see `inner_cuts`)."""

    topic: str
    language: str
    text: str
    sentence: set[int]
    clause: set[int]


@dataclass
class Score:
    """One row of the table: shares from 0 to 1, speed in MB/s; `note`: why there is none."""

    cutter: str
    segmenter: str
    language: str
    cases: int = 0
    exact: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    kept: float | None = None
    speed: float | None = None
    note: str = ""


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    return run_main("segment_quality", lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="segment_quality", description=__doc__.split("\n")[0])
    parser.add_argument("golden", nargs="+", metavar="GOLDEN", help="golden sets, …_<language>.jsonl")
    parser.add_argument("--text", metavar="FILE", help="measure the speed on this text, txt or jsonl(.gz)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    texts = read_texts(Path(arguments.text)) if arguments.text else []
    scores = [score for path in arguments.golden for score in measure(Path(path), texts)]
    if arguments.json:
        print(json.dumps([asdict(score) for score in scores], indent=2, ensure_ascii=False))
    else:
        print(table(scores))


def read_golden(path: Path) -> tuple[str, list[Case]]:
    """(language, cases) of one golden set. Raises `UserError` for a bad name or line."""
    language = path.name.removesuffix(".jsonl").rpartition("_")[2]
    if language not in LANGUAGES:
        raise UserError(f"{path}: name a golden set …_<language>.jsonl, with one of {', '.join(LANGUAGES)}")
    cases = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            topic, cut = record["topic"], record["cut"]
            text = cut.replace("‖", "").replace("¦", "")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{path}:{number}: not a golden case, an object with "topic" and "cut"') from None
        cases.append(
            Case(
                topic,
                record.get("language", language),
                text,
                inner_cuts(cut.replace("¦", "").split("‖")),
                inner_cuts(re.split("[‖¦]", cut)),
            )
        )
    if not cases:
        raise UserError(f"{path} holds no golden case")
    return language, cases


def read_texts(path: Path) -> list[str]:
    """The documents of a text file (one) or of WanJuan jsonl. Raises `UserError` for anything else."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if ".jsonl" not in path.suffixes:
            return [file.read()]
        try:
            return [json.loads(line)["content"] for line in file]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not jsonl with a content in each line: {error}") from None


def inner_cuts(pieces: Iterable[str]) -> set[int]:
    """Where pieces end inside their text, counted in characters that are not white space."""
    cuts, at = set(), 0
    for piece in pieces:
        at += len("".join(piece.split()))
        cuts.add(at)
    return cuts - {0, at}


def cutters(language: str) -> list[tuple[str, str, Cutter | str]]:
    """(name, segmenter, function or the reason why it is missing)."""
    rows: list[tuple[str, str, Cutter | str]] = [("ours", name, _ours(name, language)) for name in NAMES]
    rows += [("naive regex", name, _naive(_NAIVE[name])) for name in NAMES]
    return [*rows, ("sentencex", "sentence", _sentencex()), ("ICU", "sentence", _icu())]


def _ours(name: str, language: str) -> Cutter:
    segmenter = get_segmenter(name, language)
    return lambda text, _language: segmenter(text)


def _naive(expression: re.Pattern) -> Cutter:
    def cut(text: str, _language: str) -> list[str]:
        ends = [match.end() for match in expression.finditer(text)] + [len(text)]
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    return cut


def _sentencex() -> Cutter | str:
    try:
        from sentencex import segment
    except ImportError:
        return "not installed"

    def cut(text: str, language: str) -> list[str]:  # by lines: its time grows faster than the text
        return [piece for line in text.splitlines(keepends=True) for piece in segment(language, line)]

    return cut


def _icu() -> Cutter | str:
    try:
        from icu import BreakIterator, Locale
    except ImportError:
        return "not installed"

    def cut(text: str, language: str) -> list[str]:
        iterator = BreakIterator.createSentenceInstance(Locale(language))
        iterator.setText(text)
        data = text.encode("utf-16-le")  # ICU counts in UTF-16
        ends = list(iterator)
        return [
            data[2 * start : 2 * end].decode("utf-16-le")
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    return cut


def measure(path: Path, texts: list[str]) -> list[Score]:
    """One `Score` per cutter on the golden set at `path`, with speeds when there are texts."""
    language, cases = read_golden(path)
    scores = []
    for name, segmenter, cutter in cutters(language):
        score = Score(name, segmenter, language, len(cases))
        scores.append(score)
        if isinstance(cutter, str):
            score.note = cutter
            continue
        exact = kept = both = found = wanted = 0
        for case in cases:
            pieces = cutter(case.text, case.language)
            cuts, right = inner_cuts(pieces), getattr(case, segmenter)
            kept += "".join(pieces) == case.text
            exact += cuts == right
            both, found, wanted = both + len(cuts & right), found + len(cuts), wanted + len(right)
        score.exact, score.kept = exact / len(cases), kept / len(cases)
        score.precision, score.recall = both / max(1, found), both / max(1, wanted)
        score.f1 = 2 * both / max(1, found + wanted)
        if texts:
            score.speed = _speed(cutter, texts, language)
    return scores


def _speed(cutter: Cutter, texts: list[str], language: str) -> float:
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        for text in texts:
            cutter(text, language)
        seconds.append(time.process_time() - begin)
    return megabytes / min(seconds)


def table(scores: list[Score]) -> str:
    """A Markdown table."""
    lines = ["| language | cutter | segmenter | cases | exact | F1 | kept | MB/s |", "|" + " --- |" * 8]
    for score in scores:
        head = f"| {score.language} | {score.cutter} | {score.segmenter} | {score.cases} |"
        if score.note:
            lines.append(f"{head} {score.note} | | | |")
            continue
        speed = "" if score.speed is None else f"{score.speed:.1f}"
        lines.append(f"{head} {score.exact:.1%} | {score.f1:.3f} | {score.kept:.0%} | {speed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
