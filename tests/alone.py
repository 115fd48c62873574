"""Tests that measure their process run in one of their own."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

CHILD = """
import functools, importlib, pickle, sys
module, name, instance, arguments = pickle.load(sys.stdin.buffer)
test = functools.reduce(getattr, name.split("."), importlib.import_module(module))
test.__wrapped__(*instance, **arguments)
"""


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a new process, where no other test takes memory, opens files or starts threads.

    The process that runs all tests holds what earlier ones left behind, and frees it at any moment.
    The fixtures of the test are paths, strings or lists of strings.
    """

    @functools.wraps(test)
    def start(*instance: Any, **arguments: Any) -> None:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", CHILD],
            input=pickle.dumps((test.__module__, test.__qualname__, instance, arguments)),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode(errors="replace")

    return start
