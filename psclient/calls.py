"""Calls to one shard or to all shards: unary calls, and long calls that stream their progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import grpc

from psclient.client import Client
from psclient.errors import PsError, Unavailable, answer_of
from psclient.link import Link
from psclient.retry import pause_after, retry, rpc_error
from psclient.signals import Condition, Shield
from psproto import ps_pb2 as pb

OnProgress = Callable[[int, int], Any]  # called with (bytes done, estimated total; 0: unknown)
SERVICE = "CheckpointService"
LOOK_SECONDS = 0.02  # seconds between two checks whether shard 0 has accepted a call


@dataclass(frozen=True, slots=True)
class Repeat:
    """When to repeat a streaming call after a failure that may pass, such as a lost shard.

    seconds   how long after the first failure the call may be repeated. If a repeated call runs for
              longer than this and then fails, the time begins anew
    delivers  whether a reply has contents that the caller must not get twice: delivers(reply). A
              call that has yielded such a reply is not repeated
    """

    seconds: float
    delivers: Callable[[Any], bool]


def links(client: Client) -> Sequence[Link]:
    """Return the client's connections to all shards, in order. Connects first if needed."""
    return client._connect().links


def call(
    client: Client,
    link: Link,
    method: str,
    request: Any,
    answer: Any,
    seconds: float = 0.0,
    *,
    service: str = SERVICE,
) -> Any:
    """Call a unary method of one shard and return the reply; retry until the timeout.

    link     connection to the shard
    method   name of an idempotent method, such as "ListCheckpoints"
    request  message to send
    answer   class of the reply message
    seconds  timeout in seconds; 0: the client's timeout
    service  name of the gRPC service that has the method

    Raises a PsError if the call fails for good, or when the timeout has passed.
    """
    message = request.SerializeToString()

    def attempt(left: float) -> bytes:
        return link.channel.call(f"/ps.v1.{service}/{method}", message, left)

    deadline = time.monotonic() + (seconds or client._timeout)
    return answer_of(answer, retry(attempt, link.channel, link.where, deadline), link.where)


def stream(
    link: Link,
    method: str,
    request: Any,
    answer: Any,
    *,
    service: str = SERVICE,
    opened: Callable[[Any], None] | None = None,
    repeat: Repeat | None = None,
    pause: Callable[[float], bool] | None = None,
) -> Generator[Any, None, None]:
    """Call a method of one shard that streams its replies; yield them.

    link     connection to the shard
    method   name of the method, such as "ReadRows"
    request  message to send
    answer   class of the reply messages
    service  name of the gRPC service that has the method
    opened   called with gRPC's call object each time that the call has started; None: not called
    repeat   when to repeat the call after a failure; None: never
    pause    waits before the call is repeated: pause(seconds) returns whether to repeat it; None:
             it always is

    Closing the generator cancels the call. Raises a PsError if the call fails for good.
    """
    message = request.SerializeToString()
    attempts, deadline, delivered = 0, 0.0, False
    while True:
        first = last = 0.0  # times of the first and the last reply
        call = link.channel.open_stream(f"/ps.v1.{service}/{method}", iter([message]))
        try:
            if opened is not None:
                opened(call)
            for data in _replies(link, call):
                reply = answer_of(answer, data, link.where)
                last = time.monotonic()
                first = first or last
                delivered = delivered or (repeat is not None and repeat.delivers(reply))
                yield reply
            return
        except grpc.RpcError as error:
            failure = rpc_error(error, link.channel, link.where)
        finally:
            link.channel.cancel(call)
        if repeat is None or delivered:
            raise _incomplete(failure)
        now = time.monotonic()
        if not deadline or last - first > repeat.seconds:
            attempts, deadline = 0, now + repeat.seconds
        seconds = pause_after(failure, attempts)
        if seconds is None or now + seconds >= deadline or not (pause or _sleep)(seconds):
            raise _incomplete(failure)
        attempts += 1


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def _replies(link: Link, call: Any) -> Iterator[bytes]:
    """Yield the encoded replies of a streaming call until it ends."""
    while True:
        try:
            data = link.channel.read(call)
        except StopIteration:
            return
        yield data


def _incomplete(failure: PsError) -> PsError:
    """Return the error of a streaming call that failed for good.

    If the shard was not reached or was lost, the error says what to do.
    """
    if not isinstance(failure, Unavailable):
        return failure
    told = Unavailable(
        f"{failure}; the operation was not completed: repeat it once the shard serves"
    )
    told.reason, told.retry_after = failure.reason, failure.retry_after
    return told


def proceed(
    client: Client, id: str, step: pb.ContinueRequest.Step, shards: Sequence[int] | None = None
) -> None:
    """Tell shards that a long call, which waits there for permission, may begin its next step.

    id      random id of the call, chosen by the client that started it
    step    step that may begin
    shards  numbers of the shards to tell; None: all

    Raises the PsError of the first shard that fails.
    """
    request = pb.ContinueRequest(id=id, step=step)
    for shard, link in enumerate(links(client)):
        if shards is None or shard in shards:
            call(client, link, "Continue", request, pb.ContinueResponse)


def on_all(
    client: Client,
    method: str,
    request: Any,
    progress: OnProgress | None,
    *,
    on_stage: Callable[[int, Sequence[pb.CheckpointProgress]], None] | None = None,
    in_turn: bool = False,
    repeat: Repeat | None = None,
) -> list[pb.CheckpointProgress]:
    """Run a long call on all shards and wait for its end. Returns the last message of each shard.

    method    name of a method of CheckpointService, such as "WriteCheckpoint"
    request   message to send to every shard
    progress  called with (bytes done, estimated total bytes), summed over the shards; 0: unknown.
              The bytes done never become less: those of a repeated call are counted from its start,
              so they stay the same for a while
    on_stage  called as on_stage(stage, newest message of each shard) each time that all shards have
              reached a further stage
    in_turn   True: call the other shards only after shard 0 has reported its first stage, which
              shows that it accepted the call. False: call all shards at once
    repeat    when to repeat the call to one shard after a failure; None: never

    The first failure stops the call on all shards and is raised.
    """
    shards = len(links(client))
    latest = [pb.CheckpointProgress()] * shards
    reached, most = pb.CheckpointProgress.STAGE_UNSPECIFIED, 0
    accepted = threading.Event()

    def take(shard: int, message: pb.CheckpointProgress) -> None:
        nonlocal reached, most
        latest[shard] = message
        if message.stage:
            accepted.set()
        if progress is not None:
            most = max(most, sum(each.bytes for each in latest))
            progress(most, sum(each.total for each in latest))
        stage = min(each.stage for each in latest)
        if stage > reached:
            reached = stage
            if on_stage is not None:
                on_stage(stage, latest)

    wait_for = accepted if in_turn else None
    return all_streams(
        client, method, request, pb.CheckpointProgress, take, wait_for=wait_for, repeat=repeat
    )


def all_streams(
    client: Client,
    method: str,
    request: Any,
    answer: Any,
    take: Callable[[int, Any], None],
    *,
    service: str = SERVICE,
    wait_for: threading.Event | None = None,
    repeat: Repeat | None = None,
) -> list[Any]:
    """Call a method that streams its replies on all shards; wait until all calls have ended.

    method    name of the method
    request   message to send to every shard
    answer    class of the reply messages
    take      called as take(shard number, reply) for each reply; never by two threads at once
    service   name of the gRPC service that has the method
    wait_for  event that ``take`` sets. Shard 0 is called first; the other shards are called after
              the event is set or the call to shard 0 has ended. None: all are called at once
    repeat    when to repeat the call to one shard after a failure; None: never

    Returns the last reply of each shard. The first failure stops all calls and is raised.
    """

    def open_(shard: int, opened: Callable[[Any], None]) -> Generator[Any, None, None]:
        return stream(
            shards[shard], method, request, answer,
            service=service, opened=opened, repeat=repeat, pause=streams.pause,
        )  # fmt: skip

    shards = links(client)
    streams = _Streams(open_, [answer() for _ in shards], take, wait_for)
    streams.run(lambda shard, call: shards[shard].channel.cancel(call))
    return streams.last


class _Streams:
    """Calls to all shards that stream their replies; one thread per shard reads them.

    open_     starts the call to a shard: open_(shard, opened) yields its replies, after it has
              called ``opened`` with gRPC's call object
    last      last reply of each shard; at first an empty message
    take      called as take(shard, reply) for each reply; never by two threads at once
    wait_for  event; the other shards are called after it is set or the call to shard 0 has ended.
              None: all are called at once
    """

    def __init__(
        self,
        open_: Callable[[int, Callable[[Any], None]], Generator[Any, None, None]],
        last: list[Any],
        take: Callable[[int, Any], None],
        wait_for: threading.Event | None,
    ) -> None:
        self.last = last
        self._open = open_
        self._take = take
        self._wait_for = wait_for
        self._taking = threading.Lock()
        self._changed = Condition()
        self._running: set[int] = set()
        self._calls: dict[int, Any] = {}
        self._failure: BaseException | None = None
        self._stopped = False

    def run(self, cancel: Callable[[int, Any], None]) -> None:
        """Read the replies of all shards until all calls have ended.

        cancel  cancels the call to a shard: cancel(shard, gRPC's call object)

        A failure cancels the calls to all shards; it is raised once all threads have ended.
        """
        try:
            with Shield():
                for shard in range(len(self.last)):
                    self._running.add(shard)
                    threading.Thread(
                        target=self._work, args=(shard,), name="psclient-work", daemon=True
                    ).start()
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or not self._running)
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
                calls = list(self._calls.items())
            for shard, call in calls:
                cancel(shard, call)
            with self._changed:
                self._changed.wait_for(lambda: not self._running)
        if self._failure is not None:
            raise self._failure

    def pause(self, seconds: float) -> bool:
        """Wait before the call to a shard is repeated. Returns False if all calls are stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, seconds)
        return not self._stopped

    def _work(self, shard: int) -> None:
        """Call one shard and read its replies; a failure stops the calls to all shards."""
        try:
            if self._may_begin(shard):
                self._read(shard)
        except BaseException as error:
            with self._changed:
                if not self._stopped:
                    self._failure, self._stopped = error, True
        finally:
            with self._changed:
                self._running.discard(shard)
                self._changed.notify_all()

    def _may_begin(self, shard: int) -> bool:
        """Wait until a shard may be called. Returns False if it must not, after a failure."""
        if self._wait_for is not None and shard:
            while not (self._wait_for.is_set() or self._stopped or 0 not in self._running):
                self._wait_for.wait(LOOK_SECONDS)
        return not self._stopped

    def _read(self, shard: int) -> None:
        """Pass the replies of one shard to ``take`` until its call ends or all are stopped."""

        def opened(call: Any) -> None:
            with self._changed:
                self._calls[shard] = call
                if self._stopped:  # too late for ``run`` to cancel it
                    raise Unavailable("the call was stopped")

        with closing(self._open(shard, opened)) as messages:
            for message in messages:
                if self._stopped:
                    return
                with self._taking:
                    self._take(shard, message)
                self.last[shard] = message
