"""Files under one URL prefix: a directory, or another place that fsspec reaches.

Paths are relative to the prefix and consist of names that the callers have checked. In a local
store no path leaves the prefix: symbolic links below it are not followed, and only regular files
are read. A file is complete once ``close`` returns, and on disk where the store is local. Nothing
is cached. Every call has a deadline (deadline.py).
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import fsspec
from xxhash import xxh3_128

from storage.deadline import Deadlines
from storage.disk import NO_SPACE, pread_all
from storage.errors import Corrupt, DiskFull, StorageError, StoreFailed

Data = bytes | bytearray | memoryview
SECONDS = 120.0  # for one operation: 64 MiB at least, or a sync of them
BUFFER_BYTES = 256 << 10  # small writes are collected up to this size
T = TypeVar("T")

_PASSWORD = re.compile(r"(?<=://)([^/:@]*):[^/]*@")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# a FIFO must not block the open; whether it is a regular file is seen afterwards
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Store:
    """Reads and writes the files under one URL. Any thread may use it.

    url    the prefix of all paths
    local  True if the URL is a directory of this machine's file system

    Every method raises FileNotFoundError for a missing file, DiskFull, Corrupt for a symbolic link
    or a special file, and StoreFailed for every other error of the file system.
    """

    def __init__(self, url: str, seconds: float = SECONDS) -> None:
        """Check the URL; read no file yet.

        seconds  deadline of one operation

        Raises ValueError if fsspec does not know the URL's scheme or its package is not installed.
        """
        self.url = url
        try:
            self._files, root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True
            )
        except (ImportError, ValueError) as error:
            raise ValueError(f"{_shown(url)}: {error}") from error
        self._root = root.rstrip("/")
        self.local = "file" in _protocols(self._files)
        self._deadlines = Deadlines(seconds)

    def stop(self) -> None:
        """Make every call fail at once with StoreFailed: those in progress, and all later ones."""
        self._deadlines.stop()

    def create(self, path: str) -> Output:
        """Create a file, or truncate an existing one, and return it open for writing.

        The caller must call ``close`` or ``discard`` on the result.
        """
        where = self.where(path)
        file = self._run(path, lambda: self._open_output(path), undo=lambda file: file.close())
        return Output(file, where, self.local, self._deadlines)

    def publish(self, path: str, data: Data) -> None:
        """Create a file with all its contents at once.

        Raises FileExistsError if the file exists. In a local store this is atomic, and the file and
        the names of all files in its directory are synced to disk. In other stores it checks for
        the file and then puts it, which is not atomic.
        """
        self._run(path, lambda: self._publish(path, bytes(data)))

    def sync(self, path: str) -> None:
        """Sync all directories that contain ``path``, so that it survives a power failure.

        Does nothing unless the store is local.
        """
        if self.local:
            self._run(path, lambda: self._sync(path))

    def read(self, path: str, most: int) -> bytes:
        """Return the contents of a file. Raises Corrupt if it has more than ``most`` bytes."""
        data = self._run(path, lambda: self._read(path, most))
        if len(data) > most:
            raise Corrupt(self.where(path), f"expected at most {most} bytes, got more")
        return data

    def exists(self, path: str) -> bool:
        """Return whether the file or directory ``path`` exists."""
        return self._run(path, lambda: self._exists(path))

    def directories(self, path: str = "") -> list[str]:
        """Return the sorted names of the directories and symbolic links in directory ``path``.

        Returns [] if ``path`` does not exist.
        """
        return self._run(path, lambda: sorted(self._directories(path)))

    def remove(self, path: str) -> None:
        """Remove a file, or a directory with everything in it. Does nothing if it is missing."""
        self._run(path, lambda: self._remove(path))

    def where(self, path: str) -> str:
        """Return the full URL of ``path``, by which errors name it, without a password."""
        return f"{_shown(self.url).rstrip('/')}/{path}"

    def _run(
        self, path: str, function: Callable[[], T], undo: Callable[[T], None] | None = None
    ) -> T:
        where = self.where(path)

        def call() -> T:
            with _translated(where):
                return function()

        return self._deadlines.call(where, call, undo)

    # ---- on the threads of the deadlines

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    @contextmanager
    def _parents(self, path: str, *, make: bool = False) -> Iterator[tuple[list[int], str]]:
        """Open the directories from the prefix to the one that contains ``path``.

        make  create missing directories

        Yields (descriptors of the directories, last name in ``path``). Follows no symbolic link.
        """
        *above, name = path.split("/")
        opened: list[int] = []
        try:
            if make and not os.path.isdir(self._root):
                self._make_root()
            opened.append(os.open(self._root, _DIRECTORY))
            for each in above:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(each, dir_fd=opened[-1])
                opened.append(self._enter(opened[-1], each, path))
            yield opened, name
        finally:
            for fd in opened:
                os.close(fd)

    def _make_root(self) -> None:
        try:
            os.makedirs(self._root, exist_ok=True)
        except FileExistsError as error:  # means another file to the callers of ``publish``
            raise StoreFailed(self.where(""), f"not a directory: {error}") from error

    def _enter(self, fd: int, name: str, path: str) -> int:
        try:
            return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        except NotADirectoryError:
            if stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                raise Corrupt(
                    self.where(path), f"{name} is a symbolic link, which is not followed"
                ) from None
            raise

    def _open_file(self, fd: int, name: str, path: str, flags: int) -> int:
        """Open the regular file ``name`` in directory ``fd``. Raises Corrupt for any other kind.

        path   path in the store, for errors
        flags  of ``os.open``
        """
        if stat.S_ISLNK(_mode(name, fd)):
            raise Corrupt(self.where(path), "is a symbolic link, which is not followed")
        file = os.open(name, flags | _FILE, 0o666, dir_fd=fd)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise Corrupt(self.where(path), "is not a regular file")
        return file

    def _open_output(self, path: str) -> Any:
        if not self.local:
            return self._files.open(self._full(path), "wb")
        with self._parents(path, make=True) as (fds, name):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            return open(self._open_file(fds[-1], name, path, flags), "wb", buffering=0)

    def _publish(self, path: str, data: bytes) -> None:
        if not self.local:
            if self._files.exists(self._full(path)):
                raise FileExistsError(self.where(path))
            self._files.pipe_file(self._full(path), data)
            return
        with self._parents(path, make=True) as (fds, name):
            fd = fds[-1]
            fresh = f".{name}.{os.getpid()}.{os.urandom(4).hex()}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with open(self._open_file(fd, fresh, path, flags), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(fresh, name, src_dir_fd=fd, dst_dir_fd=fd)
            finally:
                os.unlink(fresh, dir_fd=fd)
            _sync_all(fds)

    def _sync(self, path: str) -> None:
        with self._parents(path) as (fds, _):
            _sync_all(fds)

    def _read(self, path: str, most: int) -> bytes:
        if not self.local:
            return bytes(self._files.cat_file(self._full(path), start=0, end=most + 1))
        with self._parents(path) as (fds, name):
            file = self._open_file(fds[-1], name, path, os.O_RDONLY)
            try:
                size = os.fstat(file).st_size
                if size > most:  # before memory is taken for it
                    raise Corrupt(
                        self.where(path), f"expected at most {most} bytes, got {size} bytes"
                    )
                return pread_all(file, size, 0)
            finally:
                os.close(file)

    def _exists(self, path: str) -> bool:
        if not self.local:
            return bool(self._files.exists(self._full(path)))
        try:
            with self._parents(path) as (fds, name):
                return _mode(name, fds[-1]) != 0
        except FileNotFoundError:
            return False

    def _directories(self, path: str) -> list[str]:
        if not self.local:
            with suppress(FileNotFoundError):
                found = self._files.ls(self._full(path), detail=True)
                names = (each["name"] for each in found if each["type"] == "directory")
                return [str(name).rstrip("/").rsplit("/", 1)[-1] for name in names]
            return []
        try:
            with self._parents(f"{path}/." if path else ".") as (fds, _), os.scandir(fds[-1]) as at:
                return [
                    each.name
                    for each in at
                    if each.is_symlink() or each.is_dir(follow_symlinks=False)
                ]
        except FileNotFoundError:
            return []

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            if not self.local:
                self._files.rm(self._full(path), recursive=True)
                return
            with self._parents(path) as (fds, name):
                if stat.S_ISDIR(_mode(name, fds[-1])):
                    shutil.rmtree(name, dir_fd=fds[-1])
                else:
                    os.unlink(name, dir_fd=fds[-1])
                os.fsync(fds[-1])


class Output:
    """A file that is being written. Computes the xxh3_128 of its bytes.

    bytes  bytes written so far
    """

    def __init__(self, file: Any, where: str, local: bool, deadlines: Deadlines) -> None:
        self._file = file
        self._where = where
        self._local = local
        self._deadlines = deadlines
        self._digest = xxh3_128()
        self._buffer = bytearray()
        self.bytes = 0

    def write(self, parts: Sequence[Any]) -> None:
        """Append buffers, one after another. The caller may reuse them afterwards."""
        views = [memoryview(part).cast("B") for part in parts]
        for view in views:
            self._digest.update(view)
            self.bytes += len(view)
        if len(self._buffer) + sum(map(len, views)) <= BUFFER_BYTES:
            self._buffer += b"".join(views)
            return
        buffer, self._buffer = self._buffer, bytearray()
        self._run(lambda: _write_all(self._file, [memoryview(buffer), *views]))

    def close(self) -> str:
        """Finish the file. Returns the hexadecimal xxh3_128 of its bytes."""
        self._run(self._close)
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Stop writing and close the file. The part written so far stays in the store."""
        with suppress(StorageError):
            self._run(self._file.close)

    def _close(self) -> None:
        _write_all(self._file, [memoryview(self._buffer)])
        if self._local:
            os.fsync(self._file.fileno())
        self._file.close()

    def _run(self, function: Callable[[], None]) -> None:
        def call() -> None:
            with _translated(self._where):
                function()

        self._deadlines.call(self._where, call)


def _shown(url: str) -> str:
    """Return a URL for messages: without the password that it may have."""
    return _PASSWORD.sub(r"\1:***@", url)


def _write_all(file: Any, views: Sequence[memoryview]) -> None:
    for view in views:
        left = view
        while len(left):
            left = left[file.write(left) :]  # an unbuffered file may write less


def _sync_all(fds: Sequence[int]) -> None:
    for fd in reversed(fds):
        os.fsync(fd)


def _mode(name: str, fd: int) -> int:
    """Return ``st_mode`` of a file in directory ``fd``; 0 if it is missing.

    Does not follow a symbolic link.
    """
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0


@contextmanager
def _translated(where: str) -> Iterator[None]:
    """Raise DiskFull or StoreFailed instead of an OSError or other error that the block raises.

    where  URL of the file, for errors

    FileNotFoundError, FileExistsError and StorageError are raised unchanged.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError):
        raise
    except OSError as error:
        if error.errno in NO_SPACE:
            raise DiskFull(where, 0) from error
        raise StoreFailed(where, f"{type(error).__name__}: {error}") from error
    except Exception as error:  # a driver has errors of its own
        raise StoreFailed(where, f"{type(error).__name__}: {error}") from error


def _protocols(files: Any) -> tuple[str, ...]:
    names = files.protocol
    return (names,) if isinstance(names, str) else tuple(names)
