"""Measure the structure of the code on import-linter's graph: packages, arrows, chains, circles, lines.

    python -m tools.structure [--check] [--json]

`--check` fails where a bar is missed, and names what misses it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

import grimp

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_ARROWS = 80  # between packages of pipeline/
LONGEST_CHAIN = {"pipeline": 9, "data_prep": 5}  # packages
MOST_LINES_OF_A_FILE = {"code": 500, "tests": 600}
MOST_LINES = 27_000  # of pipeline/, data_prep/ and tools/


def arrows(root: str) -> set[tuple[str, str]]:
    """Which direct child of a package imports which other one; recipes/ is data."""
    graph = grimp.build_graph(root, exclude_type_checking_imports=True)
    found = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            ends = [name.split(".")[1] if "." in name else "" for name in (importer, imported)]
            if all(ends) and ends[0] != ends[1]:
                found.add((ends[0], ends[1]))
    return found


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Sets of packages that reach each other."""
    below: dict[str, set[str]] = {}
    for upper, lower in edges:
        below.setdefault(upper, set()).add(lower)
        below.setdefault(lower, set())

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        open_ = [start]
        while open_:
            for name in below[open_.pop()] - seen:
                seen.add(name)
                open_.append(name)
        return seen

    reach = {name: reached(name) for name in below}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other])
        for name in below
        if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def longest_chain(edges: Iterable[tuple[str, str]]) -> list[str]:
    """The longest chain of packages that import one another; the edges must have no circles."""
    below: dict[str, set[str]] = {}
    for upper, lower in edges:
        below.setdefault(upper, set()).add(lower)
    chains: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in chains:
            chains[name] = [name, *max((chain(lower) for lower in below.get(name, ())), key=len, default=[])]
        return chains[name]

    return max((chain(name) for name in below), key=len, default=[])


def line_counts(*folders: str) -> dict[str, int]:
    """Lines of every Python file that git tracks or would add below `folders`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    paths = [REPOSITORY / name for name in listed.splitlines() if name.endswith(".py")]
    return {
        str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8").count("\n")
        for path in paths
        if path.exists()
    }


def measure() -> dict:
    """Every figure, and `missed`: a line for each bar that is missed."""
    result: dict = {"missed": []}
    for root, most in LONGEST_CHAIN.items():
        edges = arrows(root)
        found = circles(edges)
        chain = [] if found else longest_chain(edges)
        result[root] = {"arrows": len(edges), "circles": found, "longest_chain": chain}
        result["missed"] += [f"{root}: a circle: {' '.join(circle)}" for circle in found]
        if len(chain) > most:
            result["missed"].append(f"{root}: a chain of {len(chain)} packages: {' > '.join(chain)}")
    if result["pipeline"]["arrows"] > MOST_ARROWS:
        result["missed"].append(f"pipeline: {result['pipeline']['arrows']} arrows, at most {MOST_ARROWS}")
    code, tests = line_counts("pipeline", "data_prep", "tools"), line_counts("tests")
    result["lines"] = {
        folder: sum(line_counts(folder).values()) for folder in ("pipeline", "data_prep", "tools")
    }
    result["lines"] |= {"code": sum(code.values()), "tests": sum(tests.values())}
    for kind, files in (("code", code), ("tests", tests)):
        most = MOST_LINES_OF_A_FILE[kind]
        result["missed"] += [
            f"{name}: {lines} lines, at most {most}" for name, lines in files.items() if lines > most
        ]
    if result["lines"]["code"] > MOST_LINES:
        result["missed"].append(f"{result['lines']['code']} lines of code, at most {MOST_LINES}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="status 1 where a bar is missed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result = measure()
    if arguments.json:
        print(json.dumps(result))
    else:
        for root in LONGEST_CHAIN:
            figures = result[root]
            print(
                f"{root}: {figures['arrows']} arrows between packages, {len(figures['circles'])} circles, "
                f"longest chain {len(figures['longest_chain'])}: {' > '.join(figures['longest_chain'])}"
            )
        print("lines: " + ", ".join(f"{name} {lines:,}" for name, lines in result["lines"].items()))
        for line in result["missed"]:
            print(f"missed: {line}")
    return 1 if arguments.check and result["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
