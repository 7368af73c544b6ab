"""`python -m tools.docs.tables`: tables and charts of the docs, made from the files in docs/results.

A table of README.md or of a page below docs/ is between two lines of its own,

    <!-- table: NAME WORDS… -->
    <!-- end -->

and is filled by the function NAME of `figures.TABLES`, which also draws SVG files beside its results.
With `--check` nothing is written; the exit status is 1 where a page or a picture differs from its results.
Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

from jinja2 import TemplateError

from data_prep.common.errors import UserError, run_main
from data_prep.common.files import write_atomically
from tools.docs.figures import TABLES, Results

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = r"^<!-- table: (?P<words>.+?) -->$", "<!-- end -->"
TABLE = re.compile(rf"{BEGIN}\n(?:(?!<!-- table: ).*\n)*?{END}$", re.MULTILINE)
MARKER = re.compile(rf"{BEGIN}|^{END}$", re.MULTILINE)


def refresh(root: Path, check: bool = False) -> list[str]:
    """Write all tables and pictures below `root`; with `check`, write nothing.

    Returns: the places that differed, `PAGE:LINE: table …` or `PICTURE: …`, in order.
    Raises: UserError for a marker without its other half, an unknown table, or results that are
    not there or have another shape; nothing has been written then.
    """
    if not (root / "README.md").is_file():
        raise UserError(f"{root} has no README.md: the docs are made in a checkout of the project")
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    stale: list[str] = []
    files: dict[Path, str] = {}
    pictures: dict[Path, str] = {}
    for page in pages:
        files[page] = _filled(page, root, stale, pictures)
    for picture, text in pictures.items():
        if _read(picture) != text:
            stale.append(f"{picture.relative_to(root)}: picture differs from its results")
    for picture in sorted((root / "docs" / "results").rglob("*.svg")):
        if picture not in pictures:
            stale.append(f"{picture.relative_to(root)}: picture that no page's table draws (remove it)")
    if not check:
        for path, text in {**files, **pictures}.items():
            if _read(path) != text:
                write_atomically(path, text.encode())
    return stale


def _read(path: Path) -> str | None:
    return path.read_bytes().decode() if path.is_file() else None


def _filled(page: Path, root: Path, stale: list[str], pictures: dict[Path, str]) -> str:
    """The page with all its tables as they should be; adds to `stale` and `pictures`."""
    text, name = _read(page) or "", page.relative_to(root)
    results = Results(root / "docs" / "results", page, pictures)
    if lost := MARKER.search(TABLE.sub(lambda found: "\n" * found[0].count("\n"), text)):
        line = lost.string.count("\n", 0, lost.start()) + 1
        missing = f"no {END} comes after it" if lost["words"] else "no table begins before it"
        raise UserError(f"{name}:{line}: {lost[0]}: {missing}")

    def made(found: re.Match[str]) -> str:
        place = f"{name}:{text.count(chr(10), 0, found.start()) + 1}"
        lines = [found[0].split("\n")[0], "", *_table(place, found["words"].split(), results), "", END]
        if (filled := "\n".join(lines)) != found[0]:
            stale.append(f"{place}: table {found['words']} differs from its results")
        return filled

    return TABLE.sub(made, text)


def _table(place: str, words: list[str], results: Results) -> list[str]:
    name, *rest = words
    if name not in TABLES:
        near = difflib.get_close_matches(name, TABLES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(TABLES))}"
        raise UserError(f"{place}: there is no table `{name}`; {hint}")
    try:
        return TABLES[name](results, *rest)
    except UserError as error:
        raise UserError(f"{place}: table {' '.join(words)}: {error}") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, TemplateError) as error:
        raise UserError(
            f"{place}: table {' '.join(words)} cannot be made of these words and results "
            f"({type(error).__name__}: {error})"
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.docs.tables", description=__doc__.split("\n")[0].partition(": ")[2]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 for a difference")
    parser.add_argument("--root", default=ROOT, type=Path, help="the checkout (default: this one)")
    args = parser.parse_args()
    stale = refresh(args.root, args.check)
    print("\n".join(stale) or "docs: every table and chart is what the results say")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(run_main("docs_tables", main))
