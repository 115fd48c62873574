"""Files by path or by URL. URLs need the Python package fsspec: pip install 'embedding-ps[export]'.

Everywhere in an import, a location is a string: the path of a local file or directory, or a URL
such as s3://bucket/rows.npy, for which fsspec and its package for the protocol must be installed.
"""

from __future__ import annotations

import fnmatch
import os
import posixpath
import stat
from pathlib import Path
from typing import IO, Any

from psclient.errors import InvalidArgument

URL = "://"  # a location with these characters is a URL


def is_url(location: str) -> bool:
    """Return whether a location is a URL, not a local path."""
    return URL in location


def open_file(location: str) -> IO[bytes]:
    """Open a file for reading, at any position. Raises InvalidArgument if that fails."""
    try:
        if is_url(location):
            system, path = _system(location)
            return system.open(path, "rb")  # type: ignore[no-any-return]
        _require_regular(location)
        return Path(location).open("rb")
    except InvalidArgument:
        raise
    except Exception as error:  # a file system of fsspec may raise anything
        raise InvalidArgument(f"{location}: cannot be opened: {_reason(error)}") from error


def size_of(location: str) -> int:
    """Return the size of a file in bytes. Raises InvalidArgument if there is no such file."""
    with open_file(location) as file:
        return file.seek(0, os.SEEK_END)


def identity(location: str) -> list[str]:
    """Return the location of a file, and values that differ once its contents differ.

    The values are the size and the time of the last change. For a URL, they are the tag that its
    file system gives the file.
    """
    if is_url(location):
        system, path = _system(location)
        return [location, str(system.ukey(path))]
    state = os.stat(location)
    return [os.path.abspath(location), str(state.st_size), str(state.st_mtime_ns)]


def is_directory(location: str) -> bool:
    """Return whether a location is an existing directory."""
    if is_url(location):
        system, path = _system(location)
        return bool(system.isdir(path))
    return os.path.isdir(location)


def joined(directory: str, name: str) -> str:
    """Return the location of the file ``name`` in a directory. An absolute name or URL stays."""
    if is_url(name) or os.path.isabs(name):
        return name
    return posixpath.join(directory, name) if is_url(directory) else os.path.join(directory, name)


def parent_of(location: str) -> str:
    """Return the location of the directory that a file is in."""
    return posixpath.dirname(location) if is_url(location) else os.path.dirname(location)


def files_in(directory: str, pattern: str = "*") -> list[str]:
    """Return the locations of the files in a directory whose names match a pattern, sorted.

    pattern  such as "*-keys"

    Raises InvalidArgument if there is no such directory.
    """
    if not is_directory(directory):
        raise InvalidArgument(f"{directory} must be a directory, but it is not or does not exist")
    if is_url(directory):
        system, path = _system(directory)
        names = [posixpath.basename(each.rstrip("/")) for each in system.ls(path, detail=False)]
    else:
        names = [each.name for each in os.scandir(directory) if each.is_file()]
    return [joined(directory, name) for name in sorted(fnmatch.filter(names, pattern))]


def is_file(location: str) -> bool:
    """Return whether a location is an existing file."""
    if is_url(location):
        system, path = _system(location)
        return bool(system.isfile(path))
    return os.path.isfile(location)


def files_below(location: str) -> list[str]:
    """Return the location itself if it is a file, or all files below a directory, sorted."""
    if not is_url(location):
        if not os.path.isdir(location):
            return [location]
        return sorted(str(each) for each in Path(location).rglob("*") if each.is_file())
    system, path = _system(location)
    if not system.isdir(path):
        return [location]
    head = location[: location.index(URL) + len(URL)]
    return [each if URL in each else head + each.lstrip("/") for each in system.find(path)]


def local(location: str, kind: str) -> Path:
    """Return a location as a local path. Raises InvalidArgument for a URL: ``kind`` needs a file
    that can be mapped into memory, or a library that opens only local files."""
    if is_url(location):
        raise InvalidArgument(
            f"{location}: files of the kind {kind!r} must be local; copy the file first"
        )
    if not os.path.exists(location):
        raise InvalidArgument(f"{location} does not exist")
    return Path(location)


def _system(location: str) -> tuple[Any, str]:
    """Return (file system of fsspec, path in it) for a URL."""
    try:
        import fsspec
    except ImportError as error:
        raise InvalidArgument(
            f"{location}: URLs need fsspec: pip install 'embedding-ps[export]'"
        ) from error
    try:
        system, path = fsspec.core.url_to_fs(location)
    except Exception as error:  # an unknown protocol, or a package that is missing
        raise InvalidArgument(f"{location}: cannot be opened: {_reason(error)}") from error
    return system, path


def _require_regular(location: str) -> None:
    """Raise InvalidArgument unless a local path is an ordinary file."""
    if not os.path.exists(location):
        raise InvalidArgument(f"{location} does not exist")
    if not stat.S_ISREG(os.stat(location).st_mode):
        raise InvalidArgument(f"{location} must be a file, but it is not")


def _reason(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
