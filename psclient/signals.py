"""Signal handlers, kept out of code that they would break.

Python runs the handler of a signal between any two bytecodes of the main thread. A handler that
raises an exception there (KeyboardInterrupt, say) leaves the locks of a threading.Condition locked
and gRPC's calls in unknown states; one that makes calls of its own may wait for a lock that the
interrupted code has. Inside of ``with Shield():`` handlers are delayed to the end of the block.

A block that waits for a server gives ``wake``, which ends the wait. Threads that look after calls
run ``wake_delayed`` several times per second, so a handler is delayed by that at most.

Only locks written in C, taken by ``with``, are safe without a shield. ``Condition`` is one.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.getsignal looks up an enum: 20 times slower
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

NAMES = (
    *("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGVTALRM"),
    *("SIGPROF", "SIGIO", "SIGCHLD", "SIGWINCH", "SIGCONT", "SIGTSTP", "SIGPIPE", "SIGURG"),
    *("SIGXCPU", "SIGABRT"),
)
SIGNALS = tuple(int(getattr(signal, name)) for name in NAMES if hasattr(signal, name))

Handler = Callable[[int, Any], Any]


class _Delay:
    """Stands in for a handler: notes the signal while the shield is up."""

    __slots__ = ("handler", "shield")

    def __init__(self, handler: Handler, shield: Shield) -> None:
        self.handler = handler
        self.shield = shield

    def __call__(self, number: int, frame: Any) -> None:
        if self.shield.up:
            self.shield.delayed.append((self.handler, number, frame))
        else:
            self.handler(number, frame)


class Shield:
    """Delays signal handlers to the end of the block.

    wake  ends the wait that the block is in; other threads call it
    """

    __slots__ = ("_kept", "delayed", "up", "wake")

    def __init__(self, wake: Callable[[], object] | None = None) -> None:
        self.wake = wake
        self.up = False
        self.delayed: list[tuple[Handler, int, Any]] = []
        self._kept: list[tuple[int, Handler]] = []

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:  # no other thread runs handlers
            return
        self.up = True
        try:
            for number in SIGNALS:
                handler = _signal.getsignal(number)
                if callable(handler):
                    self._kept.append((number, handler))
                    _signal.signal(number, _Delay(handler, self))
            if self.wake is not None:
                _waiting.append(self)
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *_: object) -> None:
        if self.up:
            self._restore()
            for handler, number, frame in self.delayed:
                handler(number, frame)

    def _restore(self) -> None:
        self.up = False  # first: a stand-in that another signal leaves in place then does no harm
        for number, handler in self._kept:
            _signal.signal(number, handler)
        if self.wake is not None:
            with suppress(ValueError):
                _waiting.remove(self)


class Condition(threading.RLock().__class__):  # type: ignore[misc]
    """threading.Condition for the main thread too: an exception in ``wait`` leaves it usable.

    ``with`` takes it as it takes any lock written in C. Hold it once, not twice, in ``wait``.
    """

    def __init__(self) -> None:
        self._waiters: list[Any] = []

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock until notified; return False after ``timeout`` seconds."""
        waiter = threading.Lock()
        waiter.acquire()
        try:
            self._waiters.append(waiter)
            self.release()
            return waiter.acquire(timeout=-1 if timeout is None else max(timeout, 0.0))
        finally:
            if not self._is_owned():
                self.acquire()
            with suppress(ValueError):
                self._waiters.remove(waiter)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        """Wait until the predicate is true; return its last value."""
        end = None if timeout is None else time.monotonic() + timeout
        while not (result := predicate()):
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def notify_all(self) -> None:
        """Wake all who wait. The lock is held."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.release()


def wake_delayed() -> None:
    """End the waits of the main thread that delay a handler."""
    for shield in list(_waiting):
        if shield.delayed and shield.wake is not None:
            shield.wake()


_waiting: list[Shield] = []  # of the main thread
