"""Calls that wait, in the middle of their work, until their client lets them go on.

A client calls a method on every shard, and each shard answers when it is ready. Only when all are
ready does the client send Continue to all. So a refusal by one shard comes before any shard has
changed anything.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from psproto import ps_pb2 as pb
from psserver.errors import BadRequest, UnknownCall
from psserver.stored import require_id
from psserver.work import Progress

Step = pb.ContinueRequest
LOOK_SECONDS = 0.05  # between two looks whether the client is gone
MAX_ENDED = 64  # ids of ended calls that are kept, for Continue requests that come again


class Call:
    """A call that waits for Continue."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._reached = Step.STEP_UNSPECIFIED
        self._changed = threading.Event()

    def wait(self, step: pb.ContinueRequest.Step) -> None:
        """Return once the client has sent ``step``. Raises Draining if it is gone."""
        while self._reached < step:
            self._changed.wait(LOOK_SECONDS)
            self._changed.clear()
            self._progress.require_wanted()

    def advance(self, step: pb.ContinueRequest.Step) -> None:
        """Let the call go on up to the wait after ``step``. Not by two threads at once."""
        self._reached = max(self._reached, step)
        self._changed.set()


class Calls:
    """The calls of one shard that wait for Continue, by id. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Call] = {}
        self._ended: deque[str] = deque(maxlen=MAX_ENDED)

    @contextmanager
    def open(self, id: str, progress: Progress) -> Iterator[Call]:
        """Let Continue find a call by its id. Raises BadRequest for an id that was used before."""
        require_id("id", id)
        call = Call(progress)
        with self._lock:
            if id in self._open or id in self._ended:
                raise BadRequest("INVALID_ARGUMENT", f"id {id} was used before")
            self._open[id] = call
        try:
            yield call
        except BaseException:
            with self._lock:
                del self._open[id]
            raise
        with self._lock:
            del self._open[id]
            self._ended.append(id)

    def proceed(self, request: pb.ContinueRequest) -> pb.ContinueResponse:
        """Let a call go on. Idempotent. Raises UnknownCall unless it waits or ended well."""
        with self._lock:
            call = self._open.get(request.id)
            if call is None and request.id not in self._ended:
                raise UnknownCall(
                    f"no call {request.id[:16]!r} waits here: it ended or never began"
                )
            if call is not None:
                call.advance(request.step)
        return pb.ContinueResponse()
