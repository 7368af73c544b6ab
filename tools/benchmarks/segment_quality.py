"""Sentence segmentation, measured by language: ours beside sentencex and pysbd.

    python -m tools.benchmarks.segment_quality CASES... [--natural DIR] [--text LANG=FILE ...] [--failures]

CASES are jsonl files of `lang`, `text` and `want` (its sentences), or golden sets named `…_<language>.jsonl`
with `cut`. DIR holds `<language>.txt` with one sentence a line (`tools.benchmarks.natural_text`), which are
joined to paragraphs by the language's own spacing; precision and recall are of the ends inside a paragraph.
White space at the edges of a sentence does not count. MB/s: UTF-8 bytes per CPU-second, one process, best of
three, on the natural text, or on FILE (text, or jsonl with `content`; .gz too). `auto` is our segmenter
without the language's label. The libraries come with the extra `segmentation-benchmark`. Results:
docs/segmentation.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, run_main
from data_prep.common.extras import import_extra
from data_prep.common.page import NOTHING, Table, markdown_table
from data_prep.text.sentences import SentenceSettings

Cutter = Callable[[str], list[str]]
CUTTERS = ("ours", "auto", "sentencex", "pysbd")
EXTRA = "segmentation-benchmark"
PARAGRAPH = 6  # sentences
UNSPACED = ("ja", "zh")
DOCUMENT = 20  # paragraphs, a line each, where speed is measured
SLOWEST = 3.0  # CPU-seconds: a cutter is not measured again after a run as long as this


class Case(NamedTuple):
    """A text and its sentences."""

    text: str
    want: list[str]


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    return run_main("segment_quality", lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="segment_quality", description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASES", help="jsonl of lang, text, want; or golden sets")
    parser.add_argument("--natural", metavar="DIR", help="<language>.txt files, one sentence a line")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="LANG=FILE", help="measure the speed on these"
    )
    parser.add_argument(
        "--languages", nargs="+", metavar="LANG", help="only these (default: all that are given)"
    )
    parser.add_argument("--most", type=int, default=6000, metavar="N", help="natural sentences a language")
    parser.add_argument(
        "--cutters", nargs="+", default=CUTTERS, choices=CUTTERS, metavar="NAME", help="only these"
    )
    parser.add_argument("--failures", action="store_true", help="print the cases that ours cuts otherwise")
    parser.add_argument("--output", metavar="FILE", help="write the result, with machine and versions")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    require_folder(arguments.output)
    cases = read_cases(map(Path, arguments.cases))
    natural = read_natural(Path(arguments.natural), arguments.most) if arguments.natural else {}
    texts = dict(map(read_text, arguments.text))
    languages = arguments.languages or sorted({*cases, *natural, *texts})
    rows = [
        measure(name, cases.get(name, []), natural.get(name, []), texts.get(name), arguments.cutters)
        for name in languages
    ]
    if arguments.failures:
        for language in languages:
            for case in cases.get(language, []):
                if inner_cuts(got := cutter("ours", language)(case.text)) != inner_cuts(case.want):
                    print(
                        f"{language}: want {case.want}\n{'got':>{len(language) + 6}} {got}", file=sys.stderr
                    )
    result = {**header(("sentencex", "pysbd")), "languages": rows}
    write_result(result, arguments.output)
    print(json.dumps(result) if arguments.json else "\n".join(markdown_table(table(result))))


def read_cases(paths: Iterable[Path]) -> dict[str, list[Case]]:
    """Cases by language. Raises: UserError for a line that is none."""
    found = defaultdict(list)
    for path in paths:
        of_name = path.name.removesuffix(".jsonl").rpartition("_")[2]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                if "cut" in record:
                    want = record["cut"].replace("¦", "").split("‖")
                    found[record.get("language", of_name)].append(Case("".join(want), want))
                else:
                    found[record["lang"]].append(Case(record["text"], record["want"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{path}:{number}: not an object with lang, text and want, or with cut"
                ) from None
    return found


def read_natural(folder: Path, most: int) -> dict[str, list[Case]]:
    """Paragraphs of the files' sentences, by language."""
    found = {}
    for path in sorted(folder.glob("*.txt")):
        sentences = path.read_text(encoding="utf-8").split("\n")[:-1][:most]
        space = "" if path.stem in UNSPACED else " "
        groups = [sentences[at : at + PARAGRAPH] for at in range(0, len(sentences), PARAGRAPH)]
        found[path.stem] = [Case(space.join(group), group) for group in groups]
    if not found:
        raise UserError(
            f"{folder} has no <language>.txt; make it with python -m tools.benchmarks.natural_text"
        )
    return found


def read_text(word: str) -> tuple[str, list[str]]:
    """The language and the documents of `LANG=FILE`. Raises: UserError for anything else."""
    language, equals, name = word.partition("=")
    if not equals:
        raise UserError(f"--text {word}: write LANG=FILE")
    with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8") as file:
        if ".jsonl" not in Path(name).suffixes:
            return language, [file.read()]
        try:
            return language, [json.loads(line)["content"] for line in file]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{name}: not jsonl with a content in each line: {error}") from None


def inner_cuts(pieces: Iterable[str]) -> set[int]:
    """Where pieces end inside their text, counted in characters that are not white space."""
    cuts, at = set(), 0
    for piece in pieces:
        at += len("".join(piece.split()))
        cuts.add(at)
    return cuts - {0, at}


def cutter(name: str, language: str) -> Cutter | None:
    """A function from a text to its sentences; None where the library does not know the language."""
    if name in ("ours", "auto"):
        settings = SentenceSettings("sentence", "auto", 64)
        return settings.segmenter_for(language if name == "ours" else "")
    library = import_extra(name, EXTRA)
    if name == "sentencex":
        return _by_line(lambda line: library.segment(language, line))
    if language not in library.languages.LANGUAGE_CODES:
        return None
    return _by_line(library.Segmenter(language=language, clean=False).segment)


def _by_line(cut: Cutter) -> Cutter:
    """Both libraries need time that grows faster than the text."""
    return lambda text: [piece for line in text.splitlines(keepends=True) for piece in cut(line)]


def measure(
    language: str, cases: list[Case], natural: list[Case], text: list[str] | None, names: Iterable[str]
) -> dict[str, Any]:
    """One language's row."""
    row: dict[str, Any] = {"language": language, "cases": len(cases)}
    row |= {"sentences": sum(len(case.want) for case in natural), "cutters": {}}
    lines = [case.text for case in natural]
    documents = text or ["\n".join(lines[at : at + DOCUMENT]) for at in range(0, len(lines), DOCUMENT)]
    row["bytes"] = sum(len(document.encode()) for document in documents)
    for name in names:
        if (cut := cutter(name, language)) is None:
            continue
        score: dict[str, float] = {"exact": sum(inner_cuts(cut(c.text)) == inner_cuts(c.want) for c in cases)}
        row["cutters"][name] = score
        right = found = wanted = 0
        for case in natural:
            got, want = inner_cuts(cut(case.text)), inner_cuts(case.want)
            right, found, wanted = right + len(got & want), found + len(got), wanted + len(want)
        if natural:
            score.update({"precision": right / max(1, found), "recall": right / max(1, wanted)})
        if documents:
            score["mb_per_second"] = row["bytes"] / 1e6 / _seconds(cut, documents)
    return row


def _seconds(cut: Cutter, documents: list[str]) -> float:
    found: list[float] = []
    while len(found) < 3 and sum(found) < SLOWEST:
        begin = time.process_time()
        for document in documents:
            cut(document)
        found.append(time.process_time() - begin)
    return min(found)


def table(result: dict[str, Any]) -> Table:
    """One line a language: exact cases, precision and recall, and speed of every cutter that was measured."""
    names = [name for name in CUTTERS if any(name in row["cutters"] for row in result["languages"])]
    timed = [name for name in names if name != "auto"]
    head = ["language", "cases", *(f"exact: {name}" for name in names), "sentences"]
    head += [f"precision / recall: {name}" for name in names] + [f"MB/s: {name}" for name in timed]
    rows = []
    for row in result["languages"]:
        found = [row["cutters"].get(name, {}) for name in names]
        exact = [f"{one['exact']}" if one and row["cases"] else NOTHING for one in found]
        shares = [
            f"{one['precision']:.3f} / {one['recall']:.3f}" if "precision" in one else NOTHING
            for one in found
        ]
        speeds = [row["cutters"].get(name, {}).get("mb_per_second") for name in timed]
        rows.append(
            [row["language"], str(row["cases"]), *exact, f"{row['sentences']:,}", *shares]
            + [NOTHING if speed is None else f"{speed:.2f}" for speed in speeds]
        )
    return Table(head, rows)


if __name__ == "__main__":
    raise SystemExit(main())
