"""A copy of a run behind a URL (s3://bucket/run), from which fresh machines resume. Rank 0 alone uses it.

A checkpoint there is complete or absent, too: its meta.json is removed first and written last.
"""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError, first_line
from data_prep.common.files import write_atomically
from data_prep.common.remote import retry, without_login
from pipeline.checkpoints import store
from pipeline.checkpoints.saving import Task

_DESCRIPTION = ("*.jsonl", "*.yaml", "*.json", "wandb-id", "tokenizer/*")  # of the run, beside checkpoints
_NEEDED = (".jsonl", "wandb-id")  # what a start does not write itself


class Mirror:
    """Uploads checkpoints in a thread, the newest first. A network that is down costs warnings only.

    Raises: UserError for a URL that no installed library reads.
    """

    def __init__(self, url: str, run_dir: Path, say: Callable[[str], None]):
        from fsspec.core import url_to_fs

        self._url, self._run_dir, self._say = without_login(url), run_dir, say
        self._folder = store.checkpoints_folder(run_dir)
        local = url.startswith(("file:", "local:"))
        try:
            self._files, root = url_to_fs(url, **({"auto_mkdir": True} if local else {}))
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoints.upload {self._url}: {first_line(error)}") from None
        self._root = root.rstrip("/")
        self._lock = threading.Lock()
        self._task: Task | None = None
        self._waiting: set[str] = set()  # published and not uploaded
        self._earlier: set[str] = set()
        self._current = self._newest = ""  # being uploaded; uploaded

    def held(self) -> tuple[str, ...]:
        """The checkpoint that must not be removed now."""
        return (self._current,)

    def add_earlier(self, name: str) -> None:
        """Upload the checkpoint that a run resumes from, and its best one, where an earlier start has not."""
        best = store.read_meta(self._folder / name).best
        self._earlier = {name, *([store.step_name(best["step"])] if best else [])}
        self.add(*self._earlier)

    def add(self, *names: str) -> None:
        """Upload checkpoints, soon."""
        with self._lock:
            self._waiting.update(names)
            if self._task is None:
                self._task = Task(self._upload_all)

    def wait(self, seconds: float | None) -> bool:
        """Whether there is nothing more to try, after waiting for at most `seconds` (None: to the end)."""
        if (task := self._task) is not None:
            task.join(seconds)
        return self._task is None

    def missing(self) -> str:
        """A line that names the checkpoints of this start that were not uploaded, or empty."""
        names = [name for name in sorted(self._waiting) if (self._folder / name).is_dir()]
        return f"not uploaded to {self._url}: {', '.join(names)}" if names else ""

    def _upload_all(self) -> None:
        while True:
            with self._lock:
                here = [name for name in self._waiting if (self._folder / name).is_dir()]
                self._current = max(here, default="")
                if not here:
                    self._task = None
                    return
            try:
                self._upload(self._current)
                self._waiting.discard(self._current)
            except Exception as error:  # each library for remote files raises other errors
                if not (self._folder / self._current).is_dir():  # removed just before
                    continue
                reason = str(error) if isinstance(error, UserError) else first_line(error)
                self._say(
                    f"{self._current} is not uploaded to {self._url} ({reason}): the next checkpoint or "
                    "start tries again"
                )
                with self._lock:
                    self._current, self._task = "", None
                return

    def _upload(self, name: str) -> None:
        folder, there = self._folder / name, f"checkpoints/{name}"
        meta, meta_bytes = store.read_meta(folder), (folder / store.META).read_bytes()
        if name not in self._earlier or not self._is_there(f"{there}/{store.META}", meta_bytes):
            self._upload_files(folder, there, meta, meta_bytes)
        # A start may have ended before this.
        self._newest = max(self._newest, name)
        self._write("checkpoints/latest", f"{self._newest}\n".encode())
        for old in self._names():
            if not (self._folder / old).is_dir():
                self._remove(f"checkpoints/{old}/{store.META}")
                self._remove(f"checkpoints/{old}")

    def _upload_files(self, folder: Path, there: str, meta: store.Meta, meta_bytes: bytes) -> None:
        self._remove(f"{there}/{store.META}")
        for file, (size, _) in meta.files.items():
            self._try(f"{there}/{file}", functools.partial(self._files.put_file, str(folder / file)))
            self._files.invalidate_cache()
            if self._try(f"{there}/{file}", self._files.info)["size"] != size:
                raise UserError(f"{there}/{file} has another size there")
        for path in sorted(path for pattern in _DESCRIPTION for path in self._run_dir.glob(pattern)):
            self._write(path.relative_to(self._run_dir).as_posix(), path.read_bytes())
        self._write(f"{there}/{store.META}", meta_bytes)

    def fetch(self) -> str:
        """Where the run's folder has no checkpoint: copy the newest complete one, the best one and the run's
        records from there. Returns a line about it; empty when there is nothing to copy.

        Raises: UserError when the URL cannot be read: a run that begins from nothing would replace the copy.
        """
        if store.listed(self._run_dir)[0]:
            return ""
        try:
            return self._fetch()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"checkpoints.upload {self._url} cannot be read: {first_line(error)}") from error

    def _fetch(self) -> str:
        damages = []
        try:
            latest = self._try("checkpoints/latest", self._files.cat_file).decode().strip()
        except FileNotFoundError:
            return ""

        def download(name: str) -> store.Meta | None:
            try:
                return self._download(name)
            except (store.DamagedCheckpoint, FileNotFoundError, ValueError, KeyError) as error:
                damages.append(f"{name} is not whole there ({first_line(error)})")
                return None

        # Later ones are of a start from which the run did not resume.
        for name in (name for name in self._names() if name <= latest):
            if not (meta := download(name)):
                continue
            # Uploads start with the newest: its best one may have had no time.
            best = store.step_name(meta.best["step"]) if meta.best else name
            names = [name, best] if best != name and download(best) else [name]
            for path in self._try("", lambda path: self._files.ls(path, detail=False)):
                if path.endswith(_NEEDED):
                    file = path.rpartition("/")[2]
                    write_atomically(self._run_dir / file, self._try(file, self._files.cat_file))
            # Once a checkpoint is in place, no start fetches again.
            for one in names:
                (self._folder / f"{store.TMP}{one}").rename(self._folder / one)
            write_atomically(self._folder / "latest", f"{name}\n".encode())
            return "; ".join([*damages, f"{name} was copied from {self._url}"])
        if damages:
            raise UserError(f"checkpoints.upload {self._url} has no whole checkpoint: {'; '.join(damages)}")
        return ""

    def _download(self, name: str) -> store.Meta:
        """Copy a checkpoint beside its place."""
        aside, there = self._folder / f"{store.TMP}{name}", f"checkpoints/{name}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        meta_bytes = self._try(f"{there}/{store.META}", self._files.cat_file)
        for file in json.loads(meta_bytes)["files"]:
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            self._read(f"{there}/{file}", aside / file)
        (aside / store.META).write_bytes(meta_bytes)
        meta = store.read_meta(aside)
        store.require_undamaged(aside, meta)
        return meta

    def _names(self) -> list[str]:
        """The checkpoints there, newest first, whole or not."""
        self._files.invalidate_cache()
        try:
            paths = self._try("checkpoints", lambda path: self._files.ls(path, detail=False))
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in paths)
        return sorted((name for name in names if name.startswith("step-")), reverse=True)

    def _is_there(self, file: str, data: bytes) -> bool:
        try:
            return self._try(file, self._files.cat_file) == data
        except FileNotFoundError:
            return False

    def _write(self, file: str, data: bytes) -> None:
        self._try(file, lambda path: self._files.pipe_file(path, data))

    def _read(self, file: str, to: Path) -> None:
        self._try(file, lambda path: self._files.get_file(path, str(to)))

    def _remove(self, file: str) -> None:
        try:
            self._try(file, lambda path: self._files.rm(path, recursive=True))
        except FileNotFoundError:
            pass

    def _try(self, file: str, action: Callable[[str], Any]) -> Any:
        path = f"{self._root}/{file}".rstrip("/")
        return retry(f"{self._url.rstrip('/')}/{file}", lambda: action(path), "reach")
