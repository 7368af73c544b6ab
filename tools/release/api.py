"""`python -m tools.release.api`: the public Python API, as a stub that is kept and compared.

Public is what docs/reference/python.md shows. With `--check` nothing is written; the status is 1 where the
code differs from the stub, and a break that CHANGELOG.md does not name is listed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import griffe

from data_prep.common.errors import run_main
from data_prep.common.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
STUB = Path("docs/reference/api.pyi")
# An object's name, and those of its members that the page shows (without a list: all public ones).
SHOWN = re.compile(r"^::: ([\w.]+)$(?:\n +options:\n +members: \[(.*)\])?", re.MULTILINE)


def stub(root: Path) -> str:
    """The signatures of all public objects, one class or function after the other."""
    names = SHOWN.findall((root / "docs/reference/python.md").read_text(encoding="utf-8"))
    lines = [
        "# The public Python API, written by `python -m tools.release.api`.",
        "from typing import Any",
        "",
    ]
    loader = griffe.GriffeLoader(search_paths=[root])
    for name, members in names:
        module, _, last = name.rpartition(".")
        found = loader.load(module)[last]
        lines.append(f"# {name}")
        if found.is_class:
            lines.append(f"class {last}:")
            wanted = members.split(", ") if members else found.members
            shown = [found.all_members[one] for one in wanted if one in found.all_members]
            lines += [f"    {_signature(one)}" for one in shown if _is_public(one)] or ["    ..."]
        else:
            lines.append(_signature(found))
        lines.append("")
    return "\n".join(lines)


def _is_public(member: griffe.Object | griffe.Alias) -> bool:
    dunder = member.name in ("__init__", "__call__", "__len__")
    return isinstance(member, griffe.Function | griffe.Attribute) and (
        dunder or not member.name.startswith("_")
    )


def _signature(found: Any) -> str:
    if found.is_attribute:
        return f"{found.name}: {str(found.annotation or 'Any')!r}"
    parts, star, positional = [], False, False
    for one in found.parameters:
        kind = one.kind
        if kind is griffe.ParameterKind.keyword_only and not star:
            parts.append("*")
            star = True
        star = star or kind is griffe.ParameterKind.var_positional
        if positional and kind is not griffe.ParameterKind.positional_only:
            parts.append("/")
        positional = kind is griffe.ParameterKind.positional_only
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind.value, "")
        note = f": {str(one.annotation)!r}" if one.annotation else ""
        parts.append(f"{stars}{one.name}{note}{' = ...' if one.default is not None and not stars else ''}")
    if positional:
        parts.append("/")
    returns = f" -> {str(found.returns)!r}" if found.returns else ""
    return f"def {found.name}({', '.join(parts)}){returns}: ..."


def breaks(before: str, after: str) -> list[str]:
    """What a caller of `before` can no longer do, in griffe's words."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = []
        for name, text in (("before", before), ("after", after)):
            path = Path(folder, name, "api.py")
            path.parent.mkdir()
            path.write_text(text, encoding="utf-8")
            loaded.append(griffe.load("api", search_paths=[path.parent]))
        found = griffe.find_breaking_changes(*loaded)
        return [f"{one.obj.path.removeprefix('api.')}: {one.kind.value}" for one in found]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release.api", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 for a difference")
    parser.add_argument("--root", default=ROOT, type=Path, help="the checkout (default: this one)")
    args = parser.parse_args()
    kept, now = args.root / STUB, stub(args.root)
    before = kept.read_text(encoding="utf-8") if kept.is_file() else ""
    if before == now:
        print("api: as in the snapshot")
        return 0
    unreleased = (args.root / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1]
    undeclared = [
        one for one in breaks(before, now) if f"`{one.split(':')[0].split('(')[0]}`" not in unreleased
    ]
    for one in undeclared:
        print(f"{one}: name `{one.split(':')[0].split('(')[0]}` in CHANGELOG.md, under Unreleased")
    if not args.check and not undeclared:
        write_atomically(kept, now.encode())
        print(f"api: wrote {STUB}")
        return 0
    print(
        "api: the code differs from the snapshot (`make api` writes it)" if args.check else "api: not written"
    )
    return 1


if __name__ == "__main__":
    sys.exit(run_main("api", main))
