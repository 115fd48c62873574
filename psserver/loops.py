"""Calls handed to an event loop by other threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


def post(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *args: Any) -> bool:
    """Have ``call`` called on the loop's thread. Returns False if the loop is closed.

    A closed loop is no error: whoever waited on it is gone too.
    """
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        return False
    return True
