"""Finds the files that the user named: files, folders, patterns, URLs, standard input and datasets.

Nothing below a named folder is dropped without a word: it is read, or reported as not read or lost, or passed
over and counted.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from data_prep.common.errors import UserError, counted
from data_prep.common.language_codes import normal_language
from data_prep.common.remote import URL, is_url, retry, stamp_of
from data_prep.corpus.inputs import DATASET, ENDINGS, InputFile, dataset_input, kind_of, user_errors

STREAMS = ("-", "/dev/stdin")
SPOOL = "stdin"  # the folder's name in manifests and ids
FOLDER_LANGUAGES = {"EN": "en", "CN": "zh"}  # WanJuan's folder names
LANGUAGE_FIELDS = ("language", "lang")
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
# What other programs leave beside data. Names that start with a dot are passed over too.
LEFTOVERS = re.compile(
    r"_(temporary|SUCCESS|metadata|common_metadata|delta_log|spark_metadata|(started|committed)_.*)"
    r"|__MACOSX|.*\.crc"
)
# The first bytes of what a stream may carry; anything else is read as JSON lines.
MAGIC = {
    b"\x1f\x8b": ".jsonl.gz",
    b"\x28\xb5\x2f\xfd": ".jsonl.zst",
    b"\xfd7zXZ\0": ".jsonl.xz",
    b"BZh": ".jsonl.bz2",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
}
_PATTERN = re.compile(r"[*?\[]")


@dataclass
class Survey:
    """What the user's inputs hold.

    Attributes:
        files: to read, in order.
        not_read: names of files of other kinds, and of text beside data.
        lost: names, with the cause, of what is there but cannot be opened: folders, dangling links.
        passed_over: hidden names, leftovers of other programs, second names and the run's output, by kind.
    """

    files: list[InputFile] = field(default_factory=list)
    not_read: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """One line for each kind of thing that is not read."""
        if self.not_read:
            advice = "unpack what is packed otherwise (zip: zip://**::FILE), name text files one by one"
            count = counted(len(self.not_read), "file")
            yield f"not read: {count} passed over: {_some(self.not_read)}; {advice}"
        if self.lost:
            count = counted(len(self.lost), "name")
            yield f"warning: {count} below the input cannot be read: {_some(self.lost)}"
        if self.passed_over:
            # The kinds are in manifests, with their plural in brackets.
            found = ((n, kind.replace("(s)", "s" * (n > 1))) for kind, n in sorted(self.passed_over.items()))
            yield "passed over: " + ", ".join(f"{n:,} {kind}" for n, kind in found)


def survey(paths: Iterable[str | Path], output: str | Path | None = None) -> Survey:
    """The inputs named by `paths`, and what is not read of them.

    Inputs are files, folders (searched in sorted order), patterns, URLs of these, standard input, and `hf:`
    datasets. Text files in a folder count only when it holds nothing else: a README beside data is not a
    document.

    Args:
        output: the run's own folder, which is passed over.

    Raises:
        UserError: a path is missing, of another kind, or named twice, or a folder has no inputs.
    """
    found = Survey()
    places: list[tuple[InputFile, tuple[str, ...]]] = []
    for path in paths:
        given = os.fspath(path).removeprefix("file://")
        if not given:
            raise UserError("an input has no name; --input must name a file, a folder or a URL")
        if given.startswith(DATASET):
            dataset = dataset_input(given)
            places.append((dataset, (dataset.name,)))
            continue
        place = _Place(_spooled(given) or given, given, found, output)
        chosen = place.choose()
        if not chosen:
            problem = next(iter(found.lines()), "")
            raise UserError(
                f"input {given} holds no {ENDINGS} file{'; ' if problem else ''}{problem}"
                if place.is_folder
                else f"input {given} is neither of {ENDINGS}"
            )
        places += map(place.input_file, chosen)
    seen: set[str] = set()
    for file, _ in places:
        real = file.path if is_url(file.path) else os.path.realpath(file.path)
        if real in seen:
            raise UserError(f"input {file.path} is named twice; give each file once")
        seen.add(real)
    found.files = list(_named_apart(places))
    return found


def find_inputs(paths: Iterable[str | Path], output: str | Path | None = None) -> list[InputFile]:
    """The files of `survey`."""
    return survey(paths, output).files


def _named_apart(places: list[tuple[InputFile, tuple[str, ...]]]) -> Iterator[InputFile]:
    """The files, each with a different name: the last folder and the file, and more folders where these
    repeat."""
    lengths = [2] * len(places)
    while True:
        names = ["/".join(parts[-length:]) for length, (_, parts) in zip(lengths, places, strict=True)]
        repeated = Counter(names)
        longer = [
            min(length + (repeated[name] > 1), max(len(parts), length))
            for length, name, (_, parts) in zip(lengths, names, places, strict=True)
        ]
        if longer == lengths:
            return (replace(file, name=name) for name, (file, _) in zip(names, places, strict=True))
        lengths = longer


class _Place:
    """A file, folder or pattern that a user named, local or behind a URL.

    `parts` of an entry: the input path's own name and the names below it. Folders above the input depend on
    the machine and must not change the result.
    """

    def __init__(self, where: str, given: str, found: Survey, output: str | Path | None):
        self.given, self._found = given, found
        self._output = output and os.path.realpath(output)
        # Path to open → (parts, all parts of the path, size, stamp).
        self._entries: dict[str, tuple[tuple[str, ...], tuple[str, ...], int, str]] = {}
        self.is_folder = True
        if is_url(where):
            with user_errors(given):
                retry(where, lambda: self._list_remote(where))
        else:
            self._list_local(where)

    # Local ----------------------------------------------------------------------------------------------

    def _list_local(self, where: str) -> None:
        root = Path(os.path.abspath(where))
        patterns: tuple[str, ...] = ()
        if not root.exists() and _PATTERN.search(where):
            at = next(n for n, part in enumerate(root.parts) if _PATTERN.search(part))
            root, patterns = Path(*root.parts[:at]), root.parts[at:]
        if not root.exists():
            raise UserError(f"input {self.given} does not exist")
        if not root.is_dir():
            # Links are followed when read; name and folder are the given ones.
            self.is_folder = False
            self._add_local(root, (root.name,))
            return
        read_once: dict[object, list[tuple[bool, list[bytes], Path, tuple[str, ...]]]] = {}
        for path in self._walk(root, patterns):
            below = path.relative_to(root).parts
            facts = path.stat()
            key = (facts.st_dev, facts.st_ino) if facts.st_nlink > 1 else os.path.realpath(path)
            order = [os.fsencode(part) for part in below]
            read_once.setdefault(key, []).append((path.is_symlink(), order, path, (root.name, *below)))
        kept = [min(names, key=lambda name: name[:2]) for names in read_once.values()]
        if second := sum(map(len, read_once.values())) - len(kept):
            self._found.passed_over["second name(s) of files read"] += second
        for _, _, path, parts in sorted(kept, key=lambda name: name[1]):
            self._add_local(path, parts)
        if patterns and not self._entries:
            raise UserError(f"input {self.given} matches nothing")

    def _walk(self, root: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
        """Files below a folder. Links to folders are followed, but each folder is entered once, by its own
        name if possible: links may be circular."""

        def lose(error: OSError) -> None:
            self._lose(Path(error.filename), error.strerror)

        entered: set[str] = set()
        starts = [str(root)]
        while starts:
            for folder, folders, names in os.walk(starts.pop(0), onerror=lose):
                if (real := os.path.realpath(folder)) in entered:
                    folders.clear()
                    continue
                entered.add(real)
                below = Path(folder).relative_to(root).parts
                meant = patterns[len(below) :][:1]
                folders[:] = [
                    name
                    for name in sorted(folders)
                    if _may_match((*below, name), patterns) and self._wanted(Path(folder, name), meant)
                ]
                starts += filter(os.path.islink, (os.path.join(folder, name) for name in folders))
                for path in (Path(folder, name) for name in names if _matches((*below, name), patterns)):
                    if not self._wanted(path, meant):
                        continue
                    try:
                        regular = path.is_file() or path.stat() is None
                    except OSError as error:
                        dangling = path.is_symlink() and isinstance(error, FileNotFoundError)
                        self._lose(path, "a link to nothing" if dangling else error.strerror)
                        continue
                    if regular:
                        yield path
                    else:
                        self._found.not_read.append(_shown((*path.parts, "(no regular file)")[-3:]))

    def _lose(self, path: Path, cause: str) -> None:
        self._found.lost.append(f"{_shown(path.parts[-2:])} ({cause})")

    def _wanted(self, path: Path, meant: tuple[str, ...]) -> bool:
        """Whether a name below the input is looked at; counts those that are not. `meant`: its pattern."""
        if meant and meant[0].startswith("."):
            return True
        own = self._output is not None and os.path.realpath(path) == self._output
        kind = "output folder" if own else passed_over((path.name,))
        self._found.passed_over.update([kind] if kind else [])
        return kind is None

    def _add_local(self, path: Path, parts: tuple[str, ...]) -> None:
        facts = path.stat()
        self._entries[str(path)] = parts, path.parts[1:], facts.st_size, str(facts.st_mtime_ns)

    # Remote ---------------------------------------------------------------------------------------------

    def _list_remote(self, where: str) -> None:
        from fsspec import AbstractFileSystem
        from fsspec.core import url_to_fs

        files, root = url_to_fs(where)
        root = root.rstrip("/")
        # The path belongs to the first link of a chain that has one: zip://PATH::ARCHIVE, simplecache::s3://…
        links = where.split("::")
        link = next(n for n, one in enumerate(links) if "://" in one)
        protocol, _, base = links[link].partition("://")
        base = base.rstrip("/")
        archives = [one for one in links[link + 1 :] if not one.endswith("cache")]
        archive = _split(URL.sub("/", archives[0])) if archives else []
        # Errors are swallowed by default; stores with a `find` of their own raise them.
        strict = {"on_error": "raise"} if type(files).find is AbstractFileSystem.find else {}
        found: dict[str, dict] = {}
        if _PATTERN.search(root) and not files.exists(root):
            for path, facts in files.glob(root, detail=True).items():
                is_folder = facts["type"] == "directory"
                found |= files.find(path, detail=True, **strict) if is_folder else {path: facts}
            if not found:
                raise UserError(f"input {self.given} matches nothing")
            tail = len(root.split("/")) - next(n for n, p in enumerate(root.split("/")) if _PATTERN.search(p))
            root, base = ("/".join(one.split("/")[:-tail]) for one in (root, base))
        elif files.isdir(root):
            found = files.find(root, detail=True, **strict)
        elif files.exists(root):
            found = {root: files.info(root)}
            self.is_folder = False
        else:
            raise UserError(f"input {self.given} does not exist")
        above = max(len(archive) + len(_split(root)) - 1, 0)
        for path, facts in sorted(found.items(), key=lambda item: _split(item[0])):
            full = (*archive, *_split(path))
            parts = full[above:]
            if kind := passed_over(parts[1:]):
                self._found.passed_over[kind] += 1
                continue
            if facts.get("size") is None:
                raise UserError(f"input {path} does not tell its size; copy it to this machine first")
            below = "/".join(filter(None, (base, path.removeprefix(root).lstrip("/"))))
            url = "::".join([*links[:link], f"{protocol}://{below}", *links[link + 1 :]])
            stamp = stamp_of(facts)
            named = (*archive, *_split(URL.sub("/", path)))
            self._entries[url] = parts, named, facts["size"], stamp

    # Choosing -------------------------------------------------------------------------------------------

    def choose(self) -> list[str]:
        """Paths to read; the others are reported."""
        kinds = {path: kind_of(entry[1][-1]) for path, entry in self._entries.items()}
        only_text = not set(kinds.values()) - {"text", None}
        read = [path for path, kind in kinds.items() if kind and (only_text or kind != "text")]
        if self.is_folder:
            taken = set(read)
            self._found.not_read += [self._shown(path) for path in kinds if path not in taken]
        return read

    def input_file(self, path: str) -> tuple[InputFile, tuple[str, ...]]:
        """The file, and all parts of its path for a unique name."""
        parts, full, size, stamp = self._entries[path]
        full = tuple(map(_in_utf8, full))
        # A file that was named itself has no folder within the input.
        folders = parts[:-1] if self.is_folder else ()
        file = InputFile(
            path,
            "/".join(full[-2:]),
            full[-2] if len(full) > 1 else "",
            folder_language(folders),
            kind_of(full[-1]),
            size,
            stamp,
            tuple(partitions(folders).items()),
        )
        return file, full

    def _shown(self, path: str) -> str:
        return _shown(self._entries[path][1][-2:])


@functools.cache
def _spooled(given: str) -> str | None:
    """The copy of a stream, which can be read more than once; None for what can be opened again."""
    stream = given in STREAMS or given.startswith("/dev/fd/")
    if not stream and not Path(given).is_fifo():
        return None
    folder = tempfile.mkdtemp(prefix="data-prep-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder, SPOOL, "copy")
    copy.parent.mkdir()
    try:
        with open(0 if given in STREAMS else given, "rb", closefd=given not in STREAMS) as source:
            with open(copy, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except OSError as error:
        raise UserError(f"cannot read {given}: {error.strerror}") from error
    with open(copy, "rb") as start:
        head = start.read(8)
    ending = next((ending for magic, ending in MAGIC.items() if head.startswith(magic)), ".jsonl")
    name = SPOOL if given in STREAMS else Path(given).name
    return str(copy.rename(copy.with_name(name if kind_of(name) else name + ending)))


def folder_language(parts: Iterable[str]) -> str | None:
    """The language of the nearest folder that names one (EN, CN, `lang=…`); the last part is the nearest."""
    for part in reversed(tuple(parts)):
        if part in FOLDER_LANGUAGES:
            return FOLDER_LANGUAGES[part]
        fields = partitions((part,))
        for name in LANGUAGE_FIELDS:
            if language := normal_language(fields.get(name)):
                return language
    return None


def partitions(folders: Iterable[str]) -> dict[str, str | None]:
    """The fields that partition folders (`lang=en/date=2024-01`) give to each record below them."""
    pairs = (folder.partition("=") for folder in folders)
    return {
        unquote(name): None if value == NO_VALUE else unquote(value)
        for name, sign, value in pairs
        if sign and name
    }


def passed_over(names: Iterable[str]) -> str | None:
    """The kind of the first of the names that is not looked at, None when all are."""
    for name in names:
        if name.startswith("."):
            return "hidden name(s)"
        if LEFTOVERS.fullmatch(name):
            return "leftover(s) of other programs"
    return None


def _matches(names: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether a path, or a folder above it, is what the patterns of its parts mean."""
    if not patterns:
        return True
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or (bool(names) and _matches(names[1:], patterns))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _may_match(names: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether something below a folder can match."""
    if not names or not patterns or patterns[0] == "**":
        return True
    return fnmatchcase(names[0], patterns[0]) and _may_match(names[1:], patterns[1:])


def _in_utf8(name: str) -> str:
    """A file name with bytes that are not UTF-8 written as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _shown(parts: Iterable[str]) -> str:
    return "/".join(map(_in_utf8, parts))


def _split(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _some(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
