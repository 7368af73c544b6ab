"""WanJuan jsonl files → documents, line by line; what cannot be used is handed on with its place and reason.

In: files or folders of `*.jsonl` and `*.jsonl.gz` with the fields `id` and `content`. Out: `RawDocument` and
`Reject` objects in file order. Called by the sharder and by tokenizer training. One bad byte costs one line,
never a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError

ENDINGS = (".jsonl", ".jsonl.gz")
# WanJuan comes as `*.jsonl.tar.gz` too; such files are told, not read.
PACKED_ENDINGS = (".gz", ".tar", ".tgz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z", ".rar")
FOLDER_LANGUAGES = {"EN": "en", "CN": "zh"}  # WanJuan's folder names
CHUNK_BYTES = 1 << 20
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LETTER = re.compile(r"[^\W\d_]")
SCRIPT_SAMPLE = 2000  # characters; enough to tell Chinese from English


@dataclass(frozen=True)
class InputFile:
    """One file to read. `name`, its last folder and file name, is what manifests show: no machine's paths.

    `folder_language`: that of the nearest folder named EN or CN, from the input path's own name downwards.
    """

    path: Path
    name: str
    source: str
    folder_language: str | None


@dataclass(frozen=True)
class RawDocument:
    """One good record. `id_repaired`: the record had no usable id and got one made of its file and line."""

    id: str
    content: str
    language: str
    source: str
    line: int
    id_repaired: bool = False


@dataclass(frozen=True)
class Reject:
    """One record that was left out; `line` counts from 1."""

    line: int
    reason: str


def find_inputs(paths: list[str | Path]) -> list[InputFile]:
    """Files among `paths` and below folders among them, folders in sorted order.

    Raises `UserError` on a missing path, a file of another kind, a folder without inputs, or a file named
    twice.
    """
    files: list[InputFile] = []
    for given in map(Path, paths):
        if given.is_dir():
            found = sorted(p for p in given.rglob("*.jsonl*") if p.name.endswith(ENDINGS) and p.is_file())
            if not found:
                unread = find_unread([given])
                advice = f", only {unread_line(unread)}" if unread else ""
                raise UserError(f"input folder {given} holds no .jsonl or .jsonl.gz file{advice}")
            files += (_input_file(p, given) for p in found)
        elif given.is_file():
            if not given.name.endswith(ENDINGS):
                raise UserError(f"input {given} is neither .jsonl nor .jsonl.gz")
            files.append(_input_file(given, given))
        else:
            raise UserError(f"input {given} does not exist")
    seen: set[Path] = set()
    for file in files:
        if file.path.resolve() in seen:
            raise UserError(f"input {file.path} is named twice; give each file once")
        seen.add(file.path.resolve())
    return files


def find_unread(paths: list[str | Path]) -> list[str]:
    """Packed files below folders among `paths`, which `find_inputs` passes over: last folder and name."""
    unread: list[str] = []
    for given in (Path(os.path.abspath(path)) for path in paths):
        for path in sorted(given.rglob("*")):  # nothing where `given` is a file
            name = path.name.lower()
            if name.endswith(PACKED_ENDINGS) and not path.name.endswith(ENDINGS) and path.is_file():
                unread.append(f"{path.parent.name}/{path.name}")
    return unread


def unread_line(unread: list[str], shown: int = 5) -> str:
    """`find_unread`'s answer for people, in one line: how many, the first few names, what to do."""
    more = ", …" if len(unread) > shown else ""
    files = f"{len(unread)} packed file{'s' if len(unread) > 1 else ''}"
    return f"{files} that cannot be read: {', '.join(unread[:shown])}{more}; unpack them first"


def _input_file(path: Path, given: Path) -> InputFile:
    # Links are followed when read, but name and folder are the ones given.
    path, given = Path(os.path.abspath(path)), Path(os.path.abspath(given))
    folder = path.parent.name
    # Folders above the input are this machine's own, and must not decide what is made of it.
    parts = (given.name, *path.relative_to(given).parts)
    language = next((FOLDER_LANGUAGES[part] for part in reversed(parts) if part in FOLDER_LANGUAGES), None)
    return InputFile(path, f"{folder}/{path.name}", folder, language)


class DocumentReader:
    """Reads one input file; iterate once.

    While iterating: `bytes_read` (of the file as stored). After: `sha256` of the file and `damage`, None or
    what stopped the reading before the end.
    """

    def __init__(self, file: InputFile, language: str = "auto"):
        self.file = file
        self.language = language
        self.bytes_read = 0
        self.damage: str | None = None
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[RawDocument | Reject]:
        for number, line in enumerate(self._lines(), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield self._parse(number, line)

    def _parse(self, number: int, line: bytes) -> RawDocument | Reject:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            return Reject(number, "undecodable bytes")
        except (ValueError, RecursionError):
            return Reject(number, "invalid JSON")
        if not isinstance(record, dict):
            return Reject(number, "not an object")
        if "content" not in record:
            return Reject(number, "no content")
        content = record["content"]
        if not isinstance(content, str):
            return Reject(number, "content is not text")
        if not content.strip():
            return Reject(number, "empty content")
        if not _encodable(content):
            return Reject(number, "lone surrogate")
        identity = record.get("id")
        if isinstance(identity, int) and not isinstance(identity, bool):
            identity = str(identity)
        usable = isinstance(identity, str) and identity != "" and _encodable(identity)
        return RawDocument(
            id=identity if usable else f"{self.file.name}:{number}",
            content=content,
            language=self._language(content),
            source=self.file.source,
            line=number,
            id_repaired=not usable,
        )

    def _language(self, content: str) -> str:
        if self.language != "auto":
            return self.language
        return self.file.folder_language or detect_language(content)

    def _lines(self) -> Iterator[bytes]:
        begun: list[bytes] = []  # pieces of a line whose end has not come yet
        for chunk in self._chunks():
            first, *others = chunk.split(b"\n")
            begun.append(first)
            for line in others:
                yield b"".join(begun)
                begun = [line]
        if last := b"".join(begun):
            yield last

    def _chunks(self) -> Iterator[bytes]:
        """Plain bytes of the file. A damaged gzip gives all that can be had, then sets `damage`."""
        compressed = self.file.path.name.endswith(".gz")
        member = zlib.decompressobj(wbits=31) if compressed else None
        try:
            with open(self.file.path, "rb") as stream:
                while stored := stream.read(CHUNK_BYTES):
                    self.bytes_read += len(stored)
                    self._hash.update(stored)
                    if member is None:
                        yield stored
                        continue
                    while stored and self.damage is None:
                        if member.eof:  # another member follows, or padding
                            stored = stored.lstrip(b"\0")
                            if not stored:
                                break
                            member = zlib.decompressobj(wbits=31)
                        # Small steps: a step that meets damage gives nothing, not even the good bytes before
                        # it.
                        step, stored = stored[:1024], stored[1024:]
                        try:
                            yield member.decompress(step)
                        except zlib.error as error:
                            self.damage = f"damaged gzip data: {error}"
                        stored = member.unused_data + stored if member.eof else stored
        except OSError as error:
            raise UserError(f"cannot read {self.file.path}: {error.strerror or error}") from error
        if member is not None and not member.eof and self.damage is None and self.bytes_read:
            yield member.flush()
            self.damage = "the gzip file ends too early"


def sample_lines(files: list[InputFile], budget: int) -> Iterator[str]:
    """Lines of text, about `budget` UTF-8 bytes in all: from every file an equal share, taken from its start.

    What short files leave goes to the others. Raises `UserError` when no file has a usable document.
    """
    files = sorted(files, key=lambda file: file.path.stat().st_size)
    found = False
    for position, file in enumerate(files):
        share = budget // (len(files) - position)
        for document in DocumentReader(file):
            if isinstance(document, RawDocument) and share > 0:
                found = True
                for line in document.content.split("\n"):
                    size = len(line.encode("utf-8")) + 1
                    share -= size
                    budget -= size
                    yield line
            if share <= 0:
                break
    if not found:
        raise UserError("the input holds no usable document to learn a tokenizer from")


def detect_language(text: str) -> str:
    """`zh` when at least a fifth of the first letters are Chinese characters, else `en`."""
    sample = text[:SCRIPT_SAMPLE]
    return "zh" if 5 * len(_HAN.findall(sample)) > len(_LETTER.findall(sample)) else "en"


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
