"""Coroutines that begin where they are made.

A task begins at a later turn of the event loop, which costs more than many an answer. What needs
no wait is over at once instead; only the rest is awaited.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Begun(Generic[Result]):
    """A coroutine that has run as far as it could without waiting. Await it once, for the rest.

    What it raises is raised by ``await``, or lost if nobody awaits.
    """

    __slots__ = ("_coroutine", "_error", "_result", "_waits")

    def __init__(self, coroutine: Coroutine[Any, Any, Result]) -> None:
        self._coroutine = coroutine
        self._error: BaseException | None = None
        self._go_on()

    def _go_on(self) -> None:
        self._waits: Any = None  # the future that it waits for
        try:
            self._waits = self._coroutine.send(None)
        except StopIteration as end:
            self._result: Result = end.value
        except BaseException as error:
            self._error = error

    @property
    def over(self) -> bool:
        """Whether ``result`` can be had now."""
        while self._waits is not None and self._waits.done():
            self._go_on()
        return self._waits is None

    def result(self) -> Result:
        """What the coroutine returned, or its error; it must be over."""
        if self._error is not None:
            raise self._error
        return self._result

    def __await__(self) -> Generator[Any, None, Result]:
        try:
            while not self.over:
                yield self._waits
        finally:
            self._coroutine.close()
        return self.result()
