"""Call functions on an event loop from other threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


def post(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *args: Any) -> bool:
    """Schedule ``call(*args)`` on the thread of ``loop``. Returns False if the loop is closed.

    If the loop is closed, nothing is called and nothing is raised.
    """
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        return False
    return True
