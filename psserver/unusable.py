"""The error of a setting that cannot be used, with reason and advice.

Imports nothing large: ``psserver up`` must start quickly.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from pathlib import Path


class ConfigError(Exception):
    """A setting has an unknown name or an invalid value, or cannot be used on this machine."""


def unusable(directory: Path, error: OSError) -> ConfigError:
    """Return a one-line error with reason and advice for a data directory that cannot be used.

    error  raised by the operating system
    """
    path = Path(os.fsdecode(error.filename)) if error.filename else directory
    reason, advice = os.strerror(error.errno or 0), "choose another data_dir"
    match error.errno:
        case errno.EROFS:
            advice = "mount it for writing, or choose another data_dir"
        case errno.EACCES | errno.EPERM:
            reason += f" for user {_user(os.geteuid())}; {_owner(path)}"
            advice = "start the server as its owner, change the owner, or choose another data_dir"
        case errno.ENOTDIR | errno.EEXIST:
            reason = "it is not a directory"
        case errno.ENOSPC | errno.EDQUOT:
            advice = "free some space, or choose another data_dir"
    return ConfigError(f"data_dir: cannot use {path}: {reason}; {advice}")


def _owner(path: Path) -> str:
    """Return the owner and mode of ``path`` or its nearest existing parent directory, as text."""
    for each in (path, *path.parents):
        try:
            found = each.stat()
        except OSError:
            continue
        return f"{each} belongs to {_user(found.st_uid)}, mode {stat.S_IMODE(found.st_mode):o}"
    return "its owner is unknown"


def _user(uid: int) -> str:
    """Return name and number of a user as text."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
