"""Measure the structure of the code on import-linter's graph: packages, arrows, chains, lines.

    python -m tools.structure

The exit status is 1 where a bar is missed; a line names what misses it. import-linter itself refuses circles.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

from tools.commands import console

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_ARROWS = 80  # between packages of pipeline/
LONGEST_CHAIN = {"pipeline": 9, "data_prep": 5}  # packages
MOST_LINES_OF_A_FILE = {"code": 500, "tests": 600}
MOST_LINES = 46_500


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


def longest_chain(edges: Iterable[tuple[str, str]]) -> list[str]:
    """The longest chain of packages that import one another."""
    below: dict[str, set[str]] = {}
    for upper, lower in edges:
        below.setdefault(upper, set()).add(lower)
    chains: dict[str, list[str]] = {}
    for name in TopologicalSorter(below).static_order():  # the lowest first
        chains[name] = [name, *max((chains[lower] for lower in below.get(name, ())), key=len, default=[])]
    return max(chains.values(), key=len, default=[])


def line_counts(folder: str) -> dict[str, int]:
    """Lines of every Python file that git tracks or would add below a folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", folder]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    paths = [REPOSITORY / name for name in listed.splitlines() if name.endswith(".py")]
    return {
        str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8").count("\n")
        for path in paths
        if path.exists()
    }


def structure() -> int:
    """Measure the structure of the code on import-linter's graph: packages, arrows, chains, lines."""
    missed = []
    for root, most in LONGEST_CHAIN.items():
        edges = arrows(root)
        chain = longest_chain(edges)
        print(
            f"{root}: {len(edges)} arrows between packages, longest chain {len(chain)}: {' > '.join(chain)}"
        )
        if len(chain) > most:
            missed.append(f"{root}: a chain of {len(chain)} packages, at most {most}")
        if root == "pipeline" and len(edges) > MOST_ARROWS:
            missed.append(f"{root}: {len(edges)} arrows, at most {MOST_ARROWS}")
    folders = {folder: line_counts(folder) for folder in ("pipeline", "data_prep", "tools", "tests")}
    print("lines: " + ", ".join(f"{name} {sum(files.values()):,}" for name, files in folders.items()))
    for folder, files in folders.items():
        most = MOST_LINES_OF_A_FILE["tests" if folder == "tests" else "code"]
        missed += [f"{name}: {lines} lines, at most {most}" for name, lines in files.items() if lines > most]
    code = sum(sum(files.values()) for folder, files in folders.items() if folder != "tests")
    if code > MOST_LINES:
        missed.append(f"{code} lines of code, at most {MOST_LINES}")
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(console("structure", structure))
