"""Delay signal handlers while they could damage the code that they interrupt.

Python runs a signal handler between any two bytecodes of the main thread. If the handler raises an
exception there (for example KeyboardInterrupt), it leaves the locks of a threading.Condition locked
and gRPC's calls in unknown states. If it makes calls of its own, it may wait for a lock that the
interrupted code holds. Inside ``with Shield():`` handlers are delayed to the end of the block.

A block that waits for a server passes ``wake``, a function that ends the wait. Background threads
call ``wake_delayed`` several times per second, which limits the delay of a handler.

Outside a Shield, only a lock that is written in C and acquired by ``with`` survives a handler that
raises. The class ``Condition`` in this module is such a lock.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.getsignal looks up an enum: 20 times slower
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import compress
from typing import Any

NAMES = (
    *("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGVTALRM"),
    *("SIGPROF", "SIGIO", "SIGCHLD", "SIGWINCH", "SIGCONT", "SIGTSTP", "SIGPIPE", "SIGURG"),
    *("SIGXCPU", "SIGABRT"),
)
SIGNALS = tuple(int(getattr(signal, name)) for name in NAMES if hasattr(signal, name))

Handler = Callable[[int, Any], Any]


class _Delay:
    """Signal handler that a Shield installs in place of the original ``handler``.

    During the Shield's block it records each signal in ``shield.delayed``. After the block it
    calls ``handler`` at once.
    """

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
    """Context manager that delays signal handlers to the end of its block.

    wake  function that ends a wait inside the block, for example by cancelling an RPC. Another
          thread calls it if a signal arrived during the block. None: the block does not wait

    A Shield does nothing outside the main thread, because Python runs signal handlers only there.
    """

    __slots__ = ("_kept", "delayed", "up", "wake")

    def __init__(self, wake: Callable[[], object] | None = None) -> None:
        self.wake = wake
        self.up = False

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:  # no other thread runs handlers
            return
        self.delayed: list[tuple[Handler, int, Any]] = []
        kept: list[tuple[int, Handler]] = []
        self._kept = kept
        self.up = True
        try:
            for number in compress(SIGNALS, map(callable, map(_signal.getsignal, SIGNALS))):
                handler = _signal.getsignal(number)
                kept.append((number, handler))
                _signal.signal(number, _Delay(handler, self))
            if self.wake is not None:
                _waiting.append(self)
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *_: object) -> None:
        if self.up:
            self._restore()
            if self.delayed:
                for handler, number, frame in self.delayed:
                    handler(number, frame)

    def _restore(self) -> None:
        """Reinstall the original signal handlers."""
        self.up = False  # first: a _Delay left in place by an interruption then forwards
        for number, handler in self._kept:
            _signal.signal(number, handler)
        if self.wake is not None and self in _waiting:
            _waiting.remove(self)


class Condition(threading.RLock().__class__):  # type: ignore[misc]
    """Replacement for threading.Condition that stays usable if a signal handler raises in ``wait``.

    The object is itself the lock, an RLock written in C: acquire it by ``with``. A thread that
    calls ``wait`` must have acquired it exactly once (not nested).
    """

    def __init__(self) -> None:
        self._waiters: list[Any] = []

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, wait until another thread calls ``notify_all``, and acquire it again.

        timeout  seconds; None: no limit

        Returns False if the timeout passed first.
        """
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
        """Wait until ``predicate()`` is true, or until ``timeout`` seconds have passed.

        predicate  called with the lock held: at once, and again after each ``notify_all``
        timeout    None: no limit

        Returns the last value of ``predicate()``, which is false if the time ran out.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not (result := predicate()):
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def notify_all(self) -> None:
        """Wake all threads that wait. The caller must hold the lock."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.release()


def wake_delayed() -> None:
    """Call ``wake`` of every Shield whose block is delaying a signal handler, to end the block.

    Any thread may call this function.
    """
    for shield in list(_waiting):
        if shield.delayed and shield.wake is not None:
            shield.wake()


_waiting: list[Shield] = []  # shields that are up and have a ``wake``; outermost first
