"""Calls that pause in the middle of their work until their client sends a Continue request.

A client calls the same method on every shard, and each shard reports when it is ready. Only after
all shards are ready does the client send Continue to all. So if one shard refuses, no shard has
changed anything yet.
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
LOOK_SECONDS = 0.05  # seconds between two checks whether the client is gone
MAX_ENDED = 64  # number of ended calls whose ids are kept, so that a repeated Continue succeeds


class Call:
    """A running call that pauses until the client allows its next step with a Continue request.

    progress  progress of the call; knows whether the client still waits for the result

    principal  name of the principal that made the call, the only one that may continue it
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.principal = progress.principal
        self._reached = Step.STEP_UNSPECIFIED
        self._changed = threading.Event()

    def wait(self, step: pb.ContinueRequest.Step) -> None:
        """Block until the client has sent a Continue with ``step`` or a later step.

        Raises Draining if the client is gone or the server stops.
        """
        while self._reached < step:
            self._changed.wait(LOOK_SECONDS)
            self._changed.clear()
            self._progress.require_wanted()

    def advance(self, step: pb.ContinueRequest.Step) -> None:
        """Let each ``wait`` for ``step``, or for an earlier step, return.

        Two threads must not call this at the same time.
        """
        self._reached = max(self._reached, step)
        self._changed.set()


class Calls:
    """Registry of the calls of one shard that wait for Continue requests. Thread-safe.

    Each call has an id, which its client chose.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Call] = {}
        # (id, principal) of each
        self._ended: deque[tuple[str, str]] = deque(maxlen=MAX_ENDED)

    @contextmanager
    def open(self, id: str, progress: Progress) -> Iterator[Call]:
        """Register a call under ``id`` while the block runs, so that Continue requests can find it.

        Raises BadRequest if the id is malformed or was used before. After an error in the block,
        the id may be used again.
        """
        require_id("id", id)
        call = Call(progress)
        with self._lock:
            if id in self._open or any(id == ended for ended, _ in self._ended):
                raise BadRequest(
                    "INVALID_ARGUMENT", f"id {id} was used before: choose a new random id"
                )
            self._open[id] = call
        try:
            yield call
        except BaseException:
            with self._lock:
                del self._open[id]
            raise
        with self._lock:
            del self._open[id]
            self._ended.append((id, call.principal))

    def proceed(self, request: pb.ContinueRequest, principal: str = "") -> pb.ContinueResponse:
        """Answer a Continue request: let a waiting call start or finish its work.

        The request has the call's id, and STEP_START or STEP_FINISH. Idempotent. Raises UnknownCall
        unless the call is running, or ended recently without an error, and belongs to the same
        principal as the request.

        principal  name of the principal that continues it; "": there is no policy
        """
        with self._lock:
            call = self._open.get(request.id)
            if call is not None and call.principal != principal:
                call = None
            if call is None and (request.id, principal) not in self._ended:
                raise UnknownCall(
                    f"no call with id {request.id[:16]!r} is in progress on this shard: it failed,"
                    " ended long ago or never began"
                )
            if call is not None:
                call.advance(request.step)
        return pb.ContinueResponse()
