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
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, run_main
from data_prep.common.identify import identify
from data_prep.common.page import NOTHING, Table, markdown_table
from data_prep.corpus.filters import MIN_CONFIDENCE, UNDETERMINED
from tools.benchmarks.arguments import answer, positive
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
    parser.add_argument(
        "--texts", type=positive, default=300, metavar="N", help="texts of a language and length"
    )
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
    answer(
        arguments, result, lambda found: "\n\n".join("\n".join(markdown_table(one)) for one in tables(found))
    )


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
    """Everything about one identifier."""
    run: Identifier = identify if name == "py3langid" else _lingua()
    run("A text to load all models with.")
    accuracy: dict[str, dict[int, float]] = {}
    pairs: Counter[str] = Counter()
    mixture: list[tuple[str, str]] = []
    speeds = {}
    for length, by_language in texts.items():
        size, seconds = 0, time.process_time()
        answers = {language: [run(text) for text in of_one] for language, of_one in by_language.items()}
        seconds = time.process_time() - seconds
        size = sum(len(text.encode()) for of_one in by_language.values() for text in of_one)
        speeds[length] = size / 1e6 / seconds
        for language, of_one in answers.items():
            code = CODES.get(language, language)
            right = sum(found == code for found, _ in of_one)
            accuracy.setdefault(language, {})[length] = right / max(1, len(of_one))
            if length == MIXED_LENGTH:
                pairs.update(f"{language} as {found}" for found, _ in of_one if found != code)
                mixture += [
                    (code, found if confidence >= MIN_CONFIDENCE else UNDETERMINED)
                    for found, confidence in of_one
                    if language in MIXTURE
                ]
    kept = {}
    for code in MIXTURE:
        right = mixture.count((code, code))
        as_code, of_code = (sum(pair[place] == code for pair in mixture) for place in (1, 0))
        kept[code] = {"precision": right / max(1, as_code), "recall": right / max(1, of_code)}
    files = distribution(PACKAGES[name]).files or []
    return {
        "accuracy": accuracy,
        "mb_per_second": speeds,
        "installed_mb": sum(Path(file.locate()).stat().st_size for file in files if file.locate().exists())
        / 1e6,
        "seconds_to_first": _seconds_to_first(name),
        "pairs": dict(pairs.most_common(12)),
        "mixture": kept,
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
    code = "from tools.benchmarks import identify_quality as q; import time; begin = time.process_time(); "
    code += "(q.identify if {!r} == 'py3langid' else q._lingua())('One sentence in English.'); "
    code += "print(time.process_time() - begin)"
    done = subprocess.run(
        [sys.executable, "-c", code.format(name)], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def tables(result: dict[str, Any]) -> list[Table]:
    """Accuracy by language and length; then size and speed; then the mixture."""
    # A result that was read from a file has strings as keys.
    found = json.loads(json.dumps(result["identifiers"]))
    lengths = list(map(str, LENGTHS))
    head = [f"{name}: {length}" for name in found for length in lengths]
    languages = list(next(iter(found.values()))["accuracy"])
    rows = [
        [
            language,
            *(f"{one['accuracy'][language][length]:.3f}" for one in found.values() for length in lengths),
        ]
        for language in languages
    ]
    means = [
        sum(one["accuracy"][language][length] for language in languages) / len(languages)
        for one in found.values()
        for length in lengths
    ]
    rows.append(["mean", *(f"{mean:.3f}" for mean in means)])
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
    mixed = [
        [
            code,
            *(
                f"{one['mixture'][code][key]:.3f}"
                for one in found.values()
                for key in ("precision", "recall")
            ),
        ]
        for code in MIXTURE
    ]
    return [
        Table(["language", *head], rows),
        Table(["identifier", *titles, f"mixed at {MIXED_LENGTH}"], costs),
        Table(["language", *(f"{name}: {key}" for name in found for key in ("precision", "recall"))], mixed),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
