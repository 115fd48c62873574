"""Read several files that belong together, such as a certificate and its key, while they change.

Kubernetes replaces all files of a mounted Secret at once, by moving one symbolic link. Other tools
write one file after the other. So a reader compares the files before and after it reads them. It
must also check that the contents fit together, and read again later if they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FEW_DAYS = 14  # days until a certificate expires that are a warning, as in the alerts
TRIES = 5  # how often to read files that change meanwhile

Signature = tuple[tuple[str, int, int, int], ...]


class Unsteady(OSError):
    """The files changed each time that they were read."""


def signature(paths: Sequence[Path]) -> Signature:
    """Return what differs once one of the files is written or replaced.

    Per file: where its symbolic links lead, its number, its time of change in nanoseconds, and its
    size. Raises OSError if a file is missing.
    """
    found = []
    for path in paths:
        real = path.resolve(strict=True)
        state = real.stat()
        found.append((str(real), state.st_ino, state.st_mtime_ns, state.st_size))
    return tuple(found)


def read(paths: Sequence[Path]) -> tuple[Signature, list[bytes]]:
    """Return the signature and the contents of files, none of which changed while it was read.

    Raises OSError if a file cannot be read, or if the files change each time.
    """
    for attempt in range(TRIES):
        try:
            before = signature(paths)
            contents = [path.read_bytes() for path in paths]
            if signature(paths) == before:
                return before, contents
        except FileNotFoundError:  # it may be replaced at this moment
            if attempt == TRIES - 1:
                raise
    raise Unsteady(f"{', '.join(map(str, paths))}: the files changed {TRIES} times while read")
