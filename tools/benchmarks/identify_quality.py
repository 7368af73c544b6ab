"""Language identification, measured: accuracy by language and length of the text, speed, size.

    python -m tools.benchmarks.identify_quality natural [--against lingua] --output FILE

`natural/<language>.txt` has one sentence a line (`tools.benchmarks.natural_text`). They are joined and cut
to 50, 200 and 1,000 characters. `mixture`: precision and recall of `--keep-lang` on ten languages at 200
characters. MB/s: UTF-8 bytes per CPU-second, one process. lingua: pip install lingua-language-detector.
Results: docs/segmentation.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, run_main
from data_prep.common.identify import identify
from data_prep.common.measuring import in_new_process
from data_prep.common.page import NOTHING, Table, markdown_table
from data_prep.corpus.filters import MIN_CONFIDENCE
from tools.benchmarks.segment_quality import UNSPACED

LENGTHS = (50, 200, 1000)
MIXED_LENGTH = 200
LANGUAGES = (
    "ar bg bs ca cs da de el en es fa fi fr gl he hi hr hu id it ja ko nb nl pl pt ro ru sk sr sr-latn sv th "
    "tr uk vi zh"
).split()
MIXTURE = "ar cs en hu ko ru sr th vi zh".split()
CODES = {"sr-latn": "sr", "nb": "no", "bs": "hr"}  # what a right answer is
PACKAGES = {"py3langid": "py3langid", "lingua": "lingua-language-detector"}
Identifier = Callable[[str], tuple[str, float]]


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    return run_main("identify_quality", lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="identify_quality", description=__doc__.split("\n")[0])
    parser.add_argument("natural", metavar="DIR", help="<language>.txt files, one sentence a line")
    parser.add_argument("--against", choices=["lingua"], help="measure this library, too")
    parser.add_argument("--texts", type=int, default=300, metavar="N", help="texts of a language and length")
    parser.add_argument("--output", metavar="FILE", help="write the result, with machine and versions")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args(argv)
    require_folder(arguments.output)
    folder = Path(arguments.natural)
    found = [name for name in LANGUAGES if (folder / f"{name}.txt").is_file()]
    if not found:
        raise UserError(
            f"{folder} has no <language>.txt; make it with python -m tools.benchmarks.natural_text"
        )
    texts = {n: {name: cut_texts(folder, name, n, arguments.texts) for name in found} for n in LENGTHS}
    result: dict[str, Any] = header(PACKAGES.values()) | {"identifiers": {}}
    for name in PACKAGES:
        if name in ("py3langid", arguments.against):
            result["identifiers"][name] = measure(name, texts)
    write_result(result, arguments.output)
    shown = "\n\n".join("\n".join(markdown_table(one)) for one in tables(result))
    print(json.dumps(result) if arguments.json else shown)


def cut_texts(folder: Path, language: str, length: int, most: int) -> list[str]:
    """Up to `most` texts of exactly `length` characters, of different sentences."""
    space = "" if language in UNSPACED else " "
    texts, text = [], ""
    for sentence in (folder / f"{language}.txt").read_text(encoding="utf-8").splitlines():
        text += (space if text else "") + sentence
        if len(text) >= length:
            texts.append(text[:length])
            text = ""
    return texts[:most]


def measure(name: str, texts: dict[int, dict[str, list[str]]]) -> dict[str, Any]:
    """Everything about one identifier; by language the accuracy at each length, and the mixture's figures."""
    run: Identifier = identify if name == "py3langid" else _lingua()
    run("A text to load all models with.")
    languages: dict[str, dict[str, float]] = defaultdict(dict)
    pairs: Counter[str] = Counter()
    mixture: Counter[tuple[str, str]] = Counter()
    speeds = {}
    for length, by_language in texts.items():
        seconds = time.process_time()
        answers = {language: [run(text) for text in of_one] for language, of_one in by_language.items()}
        seconds = time.process_time() - seconds
        size = sum(len(text.encode()) for of_one in by_language.values() for text in of_one)
        speeds[str(length)] = size / 1e6 / seconds
        for language, of_one in answers.items():
            code = CODES.get(language, language)
            wrong = [found for found, _ in of_one if found != code]
            languages[language][str(length)] = 1 - len(wrong) / max(1, len(of_one))
            if length == MIXED_LENGTH:
                pairs.update(f"{language} as {found}" for found in wrong)
                if language in MIXTURE:
                    mixture.update((language, found) for found, share in of_one if share >= MIN_CONFIDENCE)
    for code in set(MIXTURE) & set(languages):
        right, found = mixture[code, code], sum(mixture[other, code] for other in MIXTURE)
        of_code = len(texts[MIXED_LENGTH][code])
        languages[code] |= {"precision": right / max(1, found), "recall": right / max(1, of_code)}
    paths = [Path(str(file.locate())) for file in distribution(PACKAGES[name]).files or []]
    return {
        "languages": languages,
        "mb_per_second": speeds,
        "installed_mb": sum(path.stat().st_size for path in paths if path.exists()) / 1e6,
        "seconds_to_first": in_new_process(_seconds_to_first, name),
        "pairs": dict(pairs.most_common(12)),
    }


def _lingua() -> Identifier:
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError:
        raise UserError("--against lingua needs pip install lingua-language-detector") from None
    detector = LanguageDetectorBuilder.from_all_languages().build()

    def run(text: str) -> tuple[str, float]:
        best = detector.compute_language_confidence_values(text)[0]
        code = best.language.iso_code_639_1.name.lower()
        return CODES.get(code, code), best.value

    return run


def _seconds_to_first(name: str) -> float:
    """CPU-seconds of a new process until it has identified one sentence."""
    begin = time.process_time()
    (identify if name == "py3langid" else _lingua())("One sentence in English.")
    return time.process_time() - begin


def tables(result: dict[str, Any]) -> list[Table]:
    """Accuracy by language and length, with the mixture's precision and recall; then size and speed."""
    found, lengths = result["identifiers"], list(map(str, LENGTHS))
    columns = [(name, key) for name in found for key in (*lengths, "precision", "recall")]
    of = {name: one["languages"] for name, one in found.items()}
    rows = []
    for language in next(iter(of.values())):
        shares = [of[name][language].get(key) for name, key in columns]
        rows.append([language, *(NOTHING if share is None else f"{share:.3f}" for share in shares)])
    means = [sum(row.get(key, 0) for row in of[name].values()) / len(of[name]) for name, key in columns]
    rows.append(
        [
            "mean",
            *(
                f"{mean:.3f}" if column[1] in lengths else NOTHING
                for column, mean in zip(columns, means, strict=True)
            ),
        ]
    )
    costs = [
        [
            name,
            *(f"{one['mb_per_second'][length]:.2f}" for length in lengths),
            f"{one['seconds_to_first']:.1f} s",
            f"{one['installed_mb']:.1f} MB",
            ", ".join(f"{pair} {count}" for pair, count in one["pairs"].items()) or NOTHING,
        ]
        for name, one in found.items()
    ]
    titles = [*(f"MB/s at {length}" for length in lengths), "to the first text", "installed"]
    return [
        Table(["language", *(f"{name}: {key}" for name, key in columns)], rows),
        Table(["identifier", *titles, f"mixed at {MIXED_LENGTH}"], costs),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
