"""Files behind URLs (s3://, gs://, memory://), through fsspec. A read that fails is resumed, a few times."""

from __future__ import annotations

import io
import re
import tarfile
import time
import zipfile
from collections.abc import Callable
from typing import Any, TypeVar

from data_prep.common.errors import UserError, first_line, log

WAITS = (1, 2, 4, 8, 15)  # seconds before each new try; a library's own tries come on top
# Keys of fsspec's file info that change with a remote file; the first one present is used.
STAMPS = ("etag", "ETag", "checksum", "mtime", "LastModified", "created")
# Errors that do not pass: what is named wrongly, forbidden, or no archive.
FINAL: tuple[type[Exception], ...] = (UserError, FileNotFoundError, PermissionError, IsADirectoryError)
FINAL += (
    NotADirectoryError,
    ValueError,
    NotImplementedError,
    ImportError,
    zipfile.BadZipFile,
    tarfile.TarError,
)
# Names of botocore's and google-auth's errors, for the same reason.
NO_LOGIN = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::.*)?://")
_LOGIN = re.compile(r"(?<=://)[^/?#]*@")
T = TypeVar("T")


def is_url(path: object) -> bool:
    """Whether a path is a URL, also a chained one (zip://…::s3://…)."""
    return isinstance(path, str) and URL.match(path) is not None


def without_login(url: str) -> str:
    """The URL without user and password, for messages and manifests."""
    return _LOGIN.sub("", url)


def retry(url: str, action: Callable[[], T], verb: str = "read") -> T:
    """The action's result, tried again after errors that may pass: of the network, of a server that restarts.
    verb: what cannot be done, for messages.

    Raises:
        UserError: it fails every time.
    """
    shown = without_login(url)
    for wait in (*WAITS, None):
        try:
            return action()
        except FINAL:
            raise
        except Exception as error:  # each library for remote files raises other errors
            reason = first_line(error)
            if type(error).__name__ in NO_LOGIN:
                raise UserError(f"cannot {verb} {shown}: {reason}") from error
            if wait is None:
                tries = f"{len(WAITS) + 1} tries in {sum(WAITS)} s"
                raise UserError(f"cannot {verb} {shown}: {reason}; given up after {tries}") from error
        log(f"cannot {verb} {shown} ({reason}); next try in {wait} s")
        time.sleep(wait)
    raise AssertionError


def stamp_of(facts: dict[str, Any]) -> str:
    """What changes with a remote file, from fsspec's file info; "" if unknown."""
    return next((str(facts[name]) for name in STAMPS if facts.get(name) is not None), "")


class RemoteFile(io.RawIOBase):
    """A remote file for reading and seeking. After an error it is opened again and read on from there.

    Raises: UserError when it cannot be read, or is another file after an error than before.
    """

    def __init__(self, url: str, block: int | None):
        super().__init__()
        self._url, self._block, self._at = url, block, 0
        self._stream: Any = None
        self._facts: tuple[Any, str] | None = None
        retry(url, self._open)

    def _open(self) -> None:
        from fsspec.core import url_to_fs

        if self._stream is not None:
            return
        files, path = url_to_fs(self._url)
        files.invalidate_cache()
        self._files = files  # an archive is closed with its last reference
        info = files.info(path)
        facts = info.get("size"), stamp_of(info)
        if self._facts not in (None, facts):
            raise UserError(f"{without_login(self._url)} has changed while it was read; run again")
        self._facts, self._stream = facts, files.open(path, "rb", block_size=self._block)

    def _read(self, size: int) -> bytes:
        self._open()
        try:
            self._stream.seek(self._at)
            return self._stream.read(size)
        except Exception:
            self._stream = None
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = retry(self._url, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._at
        elif whence == io.SEEK_END:
            assert self._facts is not None
            offset += self._facts[0]
        self._at = offset
        return offset

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        super().close()


def open_remote(url: str, block: int | None = None) -> io.BufferedReader:
    """A remote file for reading and seeking, which survives short failures of the network.

    block: bytes of a request (default: the file system's).
    """
    return io.BufferedReader(RemoteFile(url, block), 1 << 20)
