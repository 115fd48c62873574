"""Calls to one shard or to all: unary ones, and long ones that stream their progress."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any

import grpc

from psclient.client import Client
from psclient.link import Link
from psclient.retry import retry, rpc_error
from psproto import ps_pb2 as pb

OnProgress = Callable[[int, int], Any]  # bytes done, bytes in all (0: unknown)
SERVICE = "CheckpointService"
LOOK_SECONDS = 0.02  # between two looks whether shard 0 has accepted a call


def links(client: Client) -> Sequence[Link]:
    """Return the links to all shards, in their order. Connects the client if need be."""
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
    """Call a unary method, which must be idempotent, and retry it until the timeout.

    answer   class of the answer
    seconds  timeout; 0: that of the client
    """
    message = request.SerializeToString()

    def attempt(left: float) -> bytes:
        return link.channel.call(f"/ps.v1.{service}/{method}", message, left)

    deadline = time.monotonic() + (seconds or client._timeout)
    return answer.FromString(retry(attempt, link.where, deadline, itertools.count()))


def stream(
    link: Link, method: str, request: Any, answer: Any, *, service: str = SERVICE
) -> Generator[Any, None, None]:
    """Call a method with a stream of answers. Closing the generator cancels the call."""
    requests = iter([request.SerializeToString()])
    call = link.channel.open_stream(f"/ps.v1.{service}/{method}", requests)
    try:
        while True:
            try:
                data = link.channel.read(call)
            except StopIteration:
                return
            yield answer.FromString(data)
    except grpc.RpcError as error:
        raise rpc_error(error, link.where) from None
    finally:
        link.channel.cancel(call)


def proceed(
    client: Client, id: str, step: pb.ContinueRequest.Step, shards: Sequence[int] | None = None
) -> None:
    """Let a call of this id go on, on all shards or on some."""
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
) -> list[pb.CheckpointProgress]:
    """Let all shards do a long piece of work. Returns the last message of each.

    progress  called with the bytes done and an estimate of all (0: unknown)
    on_stage  called once for each stage, when all shards have reached it, with their messages
    in_turn   begin on shard 0, and on the others once it has accepted the call: it reached a stage

    The first failure ends the work on all shards.
    """
    shards = len(links(client))
    latest = [pb.CheckpointProgress()] * shards
    reached = pb.CheckpointProgress.STAGE_UNSPECIFIED
    accepted = threading.Event()

    def take(shard: int, message: pb.CheckpointProgress) -> None:
        nonlocal reached
        latest[shard] = message
        if message.stage:
            accepted.set()
        if progress is not None:
            progress(sum(each.bytes for each in latest), sum(each.total for each in latest))
        stage = min(each.stage for each in latest)
        if stage > reached:
            reached = stage
            if on_stage is not None:
                on_stage(stage, latest)

    wait_for = accepted if in_turn else None
    return all_streams(client, method, request, pb.CheckpointProgress, take, wait_for=wait_for)


def all_streams(
    client: Client,
    method: str,
    request: Any,
    answer: Any,
    take: Callable[[int, Any], None],
    *,
    service: str = SERVICE,
    wait_for: threading.Event | None = None,
) -> list[Any]:
    """Call a method with a stream of answers on all shards. Returns the last answer of each.

    answer    class of the answers
    take      called with a shard and an answer of it; never by two threads at once
    wait_for  set by ``take``: the other shards are called once it is, or shard 0 has ended

    The first failure ends all calls and is raised.
    """
    shards = links(client)
    taking = threading.Lock()
    stop, ended = threading.Event(), threading.Event()

    def work(shard: int) -> Any:
        if wait_for is not None and shard:
            while not (wait_for.is_set() or ended.is_set()):
                wait_for.wait(LOOK_SECONDS)
            if stop.is_set():
                return None
        last = answer()
        answers = stream(shards[shard], method, request, answer, service=service)
        with closing(answers) as messages:
            for last in messages:
                if stop.is_set():
                    break
                with taking:
                    take(shard, last)
        return last

    def first_ended(_: Any) -> None:
        if running[0].exception() is not None:
            stop.set()
        ended.set()

    with ThreadPoolExecutor(len(shards), "psclient-work") as pool:
        running = [pool.submit(work, shard) for shard in range(len(shards))]
        running[0].add_done_callback(first_ended)
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # each ends with its next message
            ended.set()
    for each in running:
        if (error := each.exception()) is not None:
            raise error
    return [each.result() for each in running]
