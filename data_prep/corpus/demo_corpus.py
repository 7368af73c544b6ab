"""A demo corpus from every CPython's own documentation, as WanJuan files; no download.

Sources: `pydoc_data.topics` and the docstrings of the standard library, read by `ast` and never imported. The
files are byte-identical for one Python version. A document is a topic, or the docstrings of one module's
header, of one class, or of one module's functions. A hash of its text decides its file and place, so
neighbours are unrelated. As in WanJuan, a paragraph is one line, not indented. Prose alone is kept: code,
signatures, grammars and drawings are left out.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.files import write_atomically

SHORTEST = 200  # characters; shorter documents are left out
TRAINING_PARTS = 4  # files, so that several workers have work
VALID_SHARE = 20  # one document in 20
# Not documentation, not part of every installation, or the same text again.
SKIPPED = frozenset(
    "site-packages dist-packages test tests idlelib idle_test lib2to3 turtledemo ensurepip pydoc_data "
    "lib-dynload encodings __pycache__ __phello__ _pyrepl".split()
)


def write_demo_corpus(folder: str | Path) -> dict[str, dict[str, int]]:
    """Write the corpus to `folder`. Returns documents and UTF-8 bytes of `training` and `valid`.

    Raises:
        UserError: this Python has no documentation, or `folder` cannot be written.
    """
    folder = Path(folder)
    # sha256 of the text → (id, text): equal texts are kept once.
    documents: dict[str, tuple[str, str]] = {}
    for name, text in [*_topics(), *_docstrings(Path(sysconfig.get_paths()["stdlib"]))]:
        text = _paragraphs(text)
        if len(text) >= SHORTEST:
            documents.setdefault(hashlib.sha256(text.encode("utf-8")).hexdigest(), (name, text))
    if not documents:
        raise UserError("this Python comes without its standard library's source; use another installation")
    ordered = sorted(documents)
    valid = [key for key in ordered if int(key[:8], 16) % VALID_SHARE == 0]
    training = [key for key in ordered if int(key[:8], 16) % VALID_SHARE]
    files = {f"valid/EN/demo/{_part(0)}": valid}
    for number in range(TRAINING_PARTS):
        files[f"EN/demo/{_part(number)}"] = training[number::TRAINING_PARTS]
    for name, keys in files.items():
        lines = (json.dumps(dict(zip(("id", "content"), documents[key], strict=True))) for key in keys)
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _gzip("".join(f"{line}\n" for line in lines).encode("ascii")))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return {
        part: {"documents": len(keys), "bytes": sum(len(documents[key][1].encode("utf-8")) for key in keys)}
        for part, keys in (("training", training), ("valid", valid))
    }


_CODE = re.compile(
    r"(>>>|\.\.\. |\$ |@)|.*(::=|->|[({\[,]$)|(def|class|import|from|for|if|return|with|try) ?.*[:=(]|\w+ ?=|"
    r".*\w\((self|\w*=|\w+(, \*?\w+)*\)$)"
)
_ITEM = re.compile(r"([*+•-]|\d{1,2}[.)]|\([a-z\d]\)) ")
_MARKUP = re.compile(r"(\*{1,2}|`{1,2})([^\s*`](?:[^*`\n]*[^\s*`])?)\1")  # *emphasis*, `names`
# Of a line's characters, so many are letters, spaces or commas and full stops, or it is no prose.
PROSE = 0.85


def _paragraphs(text: str) -> str:
    """The prose of `text`, one line per paragraph or list item."""
    lines: list[str] = []
    for block in re.split(r"\n[ \t]*\n", text):
        paragraph: list[str] = []
        for line in map(str.strip, _MARKUP.sub(r"\2", block).split("\n")):
            if item := _ITEM.match(line):
                lines += _joined(paragraph)
                paragraph = []
            paragraph.append(line[item.end() :] if item else line)
        lines += _joined(paragraph)
    return "\n".join(lines)


def _joined(paragraph: list[str]) -> list[str]:
    """The lines as one paragraph, where that is prose; else those of its lines that are."""
    if any(map(_CODE.match, paragraph)):
        return [line for line in paragraph if _is_prose(line)]
    line = " ".join(" ".join(paragraph).split())
    return [line] if _is_prose(line) else []


def _is_prose(line: str) -> bool:
    plain = sum(letter.isalpha() or letter in " .,;:'" for letter in line)
    return len(line.split()) > 3 and plain >= PROSE * len(line) and not _CODE.match(line)


def _part(number: int) -> str:
    return f"part-{number:06d}.jsonl.gz"


def _gzip(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as stream:
        stream.write(data)
    return buffer.getvalue()


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"topic:{name}", topics[name].strip()


def _docstrings(library: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if SKIPPED & set(place.parts) or place.name.startswith("_sysconfigdata"):
            continue
        try:
            module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates and test data are not always Python
        name = ".".join(place.with_suffix("").parts)
        yield f"module:{name}", _docstring(module)
        functions = []
        for node in module.body:
            if isinstance(node, ast.ClassDef):
                yield f"class:{name}.{node.name}", "\n\n".join(_class_texts(node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
                functions.append(_docstring(node))
        yield f"functions:{name}", "\n\n".join(functions)


def _class_texts(node: ast.ClassDef) -> Iterator[str]:
    if text := _docstring(node):
        yield text
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and (text := _docstring(inner)):
            yield text


def _docstring(node: ast.AsyncFunctionDef | ast.FunctionDef | ast.ClassDef | ast.Module) -> str:
    # Escapes in a docstring can make lone surrogates, which UTF-8 cannot encode.
    return (ast.get_docstring(node) or "").strip().encode("utf-8", "replace").decode("utf-8")
