"""Long calls that are repeated after a failure, against a server that fails as a test says."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from fakes import fake_server

from psclient import calls
from psclient.calls import Repeat, on_all, stream
from psclient.channel import Channel
from psclient.errors import SchemaMismatch, Unavailable
from psclient.retry import FIRST_PAUSE
from psclient.routes import Route
from psclient.rows import RowBatch, read_rows
from psclient.session import pause_before
from psproto import ps_pb2 as pb

METHOD, REQUEST = "VerifyCheckpoint", pb.VerifyCheckpointRequest(name="c")
RETRY = "type.googleapis.com/google.rpc.RetryInfo"
Replies = Callable[[int, Any], Iterator[Any]]  # (number of the call, gRPC's context)


class Served:
    """Links to a server that answers one method.

    calls  number of calls so far
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.calls = 0

    def links(self, replies: Replies, method: str = METHOD, count: int = 1) -> list[Any]:
        """Begin to serve; return connections to ``count`` shards, all of which are this server."""

        def answer(_: bytes, context: Any) -> Iterator[bytes]:
            self.calls += 1
            for each in replies(self.calls, context):
                yield each.SerializeToString()

        streams = {f"CheckpointService/{method}": answer}
        address = self._stack.enter_context(fake_server({}, streams=streams))
        made = []
        for _ in range(count):
            channel = Channel(Route(address))
            self._stack.callback(channel.close)
            made.append(SimpleNamespace(where="the shard", channel=channel))
        return made


@pytest.fixture
def served() -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(stack)


def progress(done: int) -> pb.CheckpointProgress:
    return pb.CheckpointProgress(bytes=done, total=9)


def lose(context: Any) -> None:
    context.abort(grpc.StatusCode.UNAVAILABLE, "lost")


def always(seconds: float) -> Repeat:
    return Repeat(seconds, lambda _: False)


@pytest.mark.parametrize("repeat", [None, always(60)])
def test_a_call_that_was_stopped_is_not_repeated(
    served: Served, monkeypatch: pytest.MonkeyPatch, repeat: Repeat | None
) -> None:
    def replies(_: int, context: Any) -> Iterator[Any]:
        yield progress(1)
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(60)

    links = served.links(replies, count=2)
    monkeypatch.setattr(calls, "links", lambda _: links)
    opened, open_stream = [], Channel.open_stream

    def recorded(channel: Channel, *args: Any) -> Any:
        opened.append(channel)
        return open_stream(channel, *args)

    monkeypatch.setattr(Channel, "open_stream", recorded)
    seen: list[int] = []

    def take(shard: int, _: Any) -> None:
        seen.append(shard)
        if len(seen) == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        calls.all_streams(
            None,
            METHOD,
            REQUEST,
            pb.CheckpointProgress,
            take,
            repeat=repeat,  # type: ignore[arg-type]
        )
    assert sorted(seen) == [0, 1]
    assert len(opened) == 2


def test_a_pause_ends_when_the_calls_are_stopped() -> None:
    streams = calls._Streams(lambda *_: (_ for _ in ()), [None], lambda *_: None, None)  # type: ignore[arg-type,return-value]
    paused: list[bool] = []
    thread = threading.Thread(target=lambda: paused.append(streams.pause(600)), daemon=True)
    thread.start()
    streams.run(lambda *_: None)
    thread.join(60)
    assert paused == [False]


def test_an_exchange_is_not_sent_again_without_a_pause() -> None:
    error, call = Unavailable("busy"), SimpleNamespace(deadline=math.inf)
    assert pause_before(call, error) is None  # type: ignore[arg-type]
    error.retry_after = 0.0
    assert pause_before(call, error) == FIRST_PAUSE  # type: ignore[arg-type]


def test_a_server_that_wants_no_pause_is_not_called_without_a_pause(served: Served) -> None:
    status = pb.Status(code=14, message="busy")
    status.details.add(type_url=RETRY, value=pb.RetryInfo().SerializeToString())

    def replies(_: int, context: Any) -> Iterator[Any]:
        details = ("grpc-status-details-bin", status.SerializeToString())
        context.set_trailing_metadata((details,))
        context.abort(grpc.StatusCode.UNAVAILABLE, "busy")
        yield progress(0)

    [link] = served.links(replies)
    with pytest.raises(Unavailable, match="busy"):
        list(stream(link, METHOD, REQUEST, pb.CheckpointProgress, repeat=always(0.5)))
    assert 2 <= served.calls <= 26


def test_a_call_that_ran_for_long_may_be_repeated_again(served: Served) -> None:
    def replies(number: int, context: Any) -> Iterator[Any]:
        yield progress(number)
        if number == 2:
            time.sleep(0.6)
            yield progress(number)
        if number < 3:
            lose(context)

    [link] = served.links(replies)
    answers = stream(link, METHOD, REQUEST, pb.CheckpointProgress, repeat=always(0.5))
    assert [each.bytes for each in answers] == [1, 2, 2, 3]


def test_a_call_that_always_fails_soon_is_given_up(served: Served) -> None:
    def replies(_: int, context: Any) -> Iterator[Any]:
        yield progress(1)
        lose(context)

    [link] = served.links(replies)
    with pytest.raises(Unavailable, match="lost; the operation was not completed"):
        list(stream(link, METHOD, REQUEST, pb.CheckpointProgress, repeat=always(0.5)))
    assert served.calls >= 2


def test_the_bytes_done_of_a_repeated_call_never_become_less(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replies(number: int, context: Any) -> Iterator[Any]:
        for done in (2, 6) if number == 1 else (2, 6, 9):
            yield progress(done)
        if number == 1:
            lose(context)

    links, seen = served.links(replies), []
    monkeypatch.setattr(calls, "links", lambda _: links)
    on_all(None, METHOD, REQUEST, lambda *each: seen.append(each), repeat=always(60))  # type: ignore[arg-type]
    assert [done for done, _ in seen] == [2, 6, 6, 6, 9]


@pytest.mark.parametrize("again", [3, 4])
def test_rows_that_do_not_fit_the_schema_are_not_delivered(
    served: Served, monkeypatch: pytest.MonkeyPatch, again: int
) -> None:
    """The shard is lost before it sends rows; then the table has the dim ``again``."""

    def replies(number: int, context: Any) -> Iterator[Any]:
        dim = 3 if number == 1 else again
        yield pb.Delta(header=pb.DeltaHeader(width=dim, schema=pb.TableSchema(name="t", dim=dim)))
        if number == 1:
            lose(context)
        yield pb.Delta(
            header=pb.DeltaHeader(width=dim),
            keys=np.arange(2, dtype="<u8").tobytes(),
            rows=np.zeros(2 * dim, "<f4").tobytes(),
            versions=bytes(16),
            steps=bytes(16),
            frequencies=bytes(16),
        )

    links = served.links(replies, "ReadRows")
    monkeypatch.setattr("psclient.rows.links", lambda _: links)
    answers = read_rows(SimpleNamespace(_timeout=60.0), "t")  # type: ignore[arg-type]
    schema, empty = next(answers), next(answers)
    assert isinstance(schema, pb.TableSchema)
    assert isinstance(empty, RowBatch)
    assert (schema.dim, empty.rows.shape) == (3, (0, 3))
    if again == 3:
        assert [each.rows.shape for each in answers if isinstance(each, RowBatch)] == [(2, 3)]
        return
    with pytest.raises(SchemaMismatch, match="now have dim 4 and width 4; read it again"):
        next(answers)
