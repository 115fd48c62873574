"""Files under one URL prefix: a directory, or what else fsspec reaches.

Paths are relative to the prefix and made of names that the callers have checked. What is created
is whole once ``close`` returns, and on disk where the files are local. Nothing is cached: every
call asks the file system.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import fsspec
from xxhash import xxh3_128

from storage.disk import NO_SPACE, sync
from storage.errors import DiskFull, StoreFailed

Data = bytes | bytearray | memoryview


class Store:
    """The files under ``url``. Any thread.

    Raises FileNotFoundError where a file is missing, FileExistsError from ``publish``, DiskFull,
    and StoreFailed for everything else that a file system answers.
    """

    def __init__(self, url: str) -> None:
        """Nothing is read; ValueError if fsspec does not know the scheme or lacks its package."""
        self.url = url
        try:
            self._files, root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True
            )
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url}: {error}") from error
        self._root = root.rstrip("/")
        self.local = "file" in _protocols(self._files)

    def create(self, path: str) -> Output:
        """A new file, or a new content; call ``close``, or ``discard`` it."""
        with _Meaning(self.where(path)):
            self._make_parent(path)
            return Output(self._files.open(self._full(path), "wb"), self.where(path), self.local)

    def publish(self, path: str, data: Data) -> None:
        """Write a file at once: it is whole or not there. FileExistsError where there is one.

        Locally nobody else can create it meanwhile, and it is on disk with all that was created
        in its directory. Elsewhere it is one put, preceded by a look.
        """
        with _Meaning(self.where(path)):
            if not self.local:
                if self._files.exists(self._full(path)):
                    raise FileExistsError(self.where(path))
                self._files.pipe_file(self._full(path), bytes(data))
                return
            self._make_parent(path)
            target = Path(self._full(path))
            beside = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}")
            with beside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(beside, target)
            finally:
                beside.unlink()
            self.sync(path)

    def sync(self, path: str) -> None:
        """Make sure, locally, that the names up to ``path`` are on disk."""
        if self.local:
            parent = Path(self._full(path)).parent
            root = Path(self._root).parent
            while parent != root and root in parent.parents:
                sync(parent)
                parent = parent.parent

    def read(self, path: str, most: int) -> bytes:
        """The file, or its first ``most`` bytes."""
        with _Meaning(self.where(path)):
            if self.local:  # where as much is allocated as may come
                most = min(most, os.path.getsize(self._full(path)))
            return bytes(self._files.cat_file(self._full(path), start=0, end=most))

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        with _Meaning(self.where(path)):
            return bool(self._files.exists(self._full(path)))

    def directories(self, path: str = "") -> list[str]:
        """Names of the directories in one, sorted; none where it does not exist."""
        with _Meaning(self.where(path)):
            try:
                found = self._files.ls(self._full(path), detail=True)
            except FileNotFoundError:
                return []
        names = (str(each["name"]).rstrip("/") for each in found if each["type"] == "directory")
        return sorted(name.rsplit("/", 1)[-1] for name in names)

    def remove(self, path: str) -> None:
        """Remove a directory and everything in it; what is gone already is no error."""
        with _Meaning(self.where(path)), suppress(FileNotFoundError):
            self._files.rm(self._full(path), recursive=True)

    def where(self, path: str) -> str:
        """How errors name a file."""
        return f"{self.url.rstrip('/')}/{path}"

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _make_parent(self, path: str) -> None:
        if self.local:
            self._files.makedirs(self._full(path).rsplit("/", 1)[0], exist_ok=True)


class Output:
    """A file being written: its bytes and their xxh3_128 so far."""

    def __init__(self, file: Any, where: str, local: bool) -> None:
        self._file = file
        self._where = where
        self._local = local
        self._digest = xxh3_128()
        self.bytes = 0

    def write(self, parts: Sequence[Any]) -> None:
        """Append buffers, one behind the other."""
        with _Meaning(self._where):
            for part in parts:
                view = memoryview(part).cast("B")
                self._file.write(view)
                self._digest.update(view)
                self.bytes += len(view)

    def close(self) -> str:
        """Finish the file; the hexadecimal xxh3_128 of its bytes."""
        with _Meaning(self._where):
            if self._local:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Give up; whatever was written of it is of no use."""
        with suppress(Exception):
            self._file.close()


class _Meaning:
    """Says in our words what a file system answers."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, FileNotFoundError | FileExistsError | StoreFailed):
            return
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise DiskFull(self._where, 0) from error
        if isinstance(error, Exception):  # of a driver's own kind, as often as OSError
            raise StoreFailed(self._where, f"{type(error).__name__}: {error}") from error


def _protocols(files: Any) -> tuple[str, ...]:
    names = files.protocol
    return (names,) if isinstance(names, str) else tuple(names)
