"""Read the policy file when the server starts, and again whenever its contents change.

A thread looks at the file every LOOK_SECONDS. A file that cannot be read or is not a valid policy
changes nothing: the last good policy stays in force, and the problem is logged and counted. Replace
the file with ``mv``, so that the server never reads a half-written file. Kubernetes replaces the
files of a Secret like that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from psserver.security.policy import MOST_BYTES, Policy, parse
from psserver.unusable import ConfigError

LOOK_SECONDS = 1.0

log = structlog.get_logger()


class PolicyFile:
    """Keeps the policy of a server equal to its file, from ``open`` to ``close``.

    path  path of the file

    loaded  how often a policy was read and taken
    failed  how often a changed file could not be taken
    """

    look_seconds = LOOK_SECONDS

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ConfigError if it is not a valid policy."""
        self.path = path
        self.loaded = 1
        self.failed = 0
        try:
            self._data = self._read()
            self.first = parse(self._data)
        except (OSError, ConfigError) as error:
            raise ConfigError(f"policy_file: {path}: {error}") from error
        self._problem = ""  # why the file is not in force; "": it is
        self._stop = threading.Event()

    def open(self, take: Callable[[Policy], object]) -> None:
        """Call ``take`` with each new policy from now on, on a thread."""
        run = partial(self._run, take, self.look_seconds)
        threading.Thread(target=run, name="policy", daemon=True).start()

    @property
    def valid(self) -> bool:
        """Whether the file, as last read, is the policy in force."""
        return not self._problem

    def close(self) -> None:
        """Stop the thread. Does not wait for a file system that hangs."""
        self._stop.set()

    def _run(self, take: Callable[[Policy], object], seconds: float) -> None:
        while not self._stop.wait(seconds):
            self.look(take)

    def look(self, take: Callable[[Policy], object]) -> None:
        """Read the file once, and pass its policy to ``take`` if it has changed and is valid."""
        try:
            data = self._read()
            if data == self._data and not self._problem:
                return
            policy = None if data == self._data else parse(data)
        except (OSError, ConfigError) as error:
            self._report(str(error))
            return
        except Exception as error:  # else the thread would end, and nothing be revoked any more
            self._report(f"cannot be read: {type(error).__name__}")
            return
        self._problem = ""
        if policy is None:  # the file is again what is in force
            return
        self._data = data
        self.loaded += 1
        log.info("policy loaded", path=str(self.path), principals=len(policy.principals))
        take(policy)

    def _report(self, problem: str) -> None:
        """Log and count a problem once, however long it lasts."""
        if problem != self._problem:
            self._problem = problem
            self.failed += 1
            log.error(
                "policy file refused",
                path=str(self.path),
                problem=problem,
                advice="the last good policy stays in force; correct the file",
            )

    def _read(self) -> bytes:
        with self.path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
