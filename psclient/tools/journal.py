"""How far an import got: a file that lets a repeated import continue where a killed one stopped.

file = JSON {"import": id of the import, "piece": p, "row": r}: all rows of the pieces before piece
p and the rows before row r of piece p were written, and are on the servers' disks if they have any

The id is a hash of the servers' addresses, the table, the arguments, and the names, sizes and times
of the files. So the file is ignored if any of them changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


class Journal:
    """Remembers how far one import got.

    path  the file, which is created with its directory; errors on writing it are not raised,
          because an import without it is only slower to repeat
    """

    def __init__(self, path: Path, identity: str) -> None:
        """Remember the import with the id ``identity``."""
        self.path = path
        self._identity = identity

    def position(self) -> tuple[int, int] | None:
        """Return (piece, row) at which to continue. None: this import was not begun."""
        try:
            saved = json.loads(self.path.read_text())
            if saved["import"] == self._identity:
                return int(saved["piece"]), int(saved["row"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def save(self, piece: int, row: int) -> None:
        """Replace the file: the rows before row ``row`` of piece ``piece`` were written."""
        text = json.dumps({"import": self._identity, "piece": piece, "row": row})
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            os.replace(temporary, self.path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()

    def remove(self) -> None:
        """Delete the file: the import is complete."""
        with suppress(OSError):
            self.path.unlink()


def journal_of(directory: Path | None, identity: Sequence[object]) -> Journal:
    """Return the journal of an import.

    directory  where its file is; None: ``default_directory()``
    identity   everything by which the import differs from others, as JSON values
    """
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    return Journal((directory or default_directory()) / f"import-{digest}.json", digest)


def default_directory() -> Path:
    """Return ~/.local/state/embedding-ps, or what XDG_STATE_HOME says; without a home directory, a
    directory for temporary files."""
    state = os.environ.get("XDG_STATE_HOME")
    home = Path(state) if state else Path(os.path.expanduser("~")) / ".local" / "state"
    if not home.is_absolute() or not os.access(_existing(home), os.W_OK):
        home = Path(tempfile.gettempdir())
    return home / "embedding-ps"


def _existing(path: Path) -> Path:
    """Return the nearest directory above ``path``, or ``path`` itself, that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
