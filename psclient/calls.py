"""Calls to all shards: unary ones, and long ones that stream their progress."""

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

Tell = Callable[[int, int], Any]  # bytes done, bytes in all (0: unknown)
SERVICE = "CheckpointService"


def links(client: Client) -> Sequence[Link]:
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
    """Call a unary method until it is answered; all of them may be repeated.

    seconds  that it may take; 0: as long as any operation of the client
    """
    message = request.SerializeToString()

    def attempt(left: float) -> bytes:
        return link.channel.call(f"/ps.v1.{service}/{method}", message, left)

    deadline = time.monotonic() + (seconds or client._timeout)
    return answer.FromString(retry(attempt, link.where, deadline, itertools.count()))


def stream(
    link: Link, method: str, request: Any, answer: Any, *, service: str = SERVICE
) -> Generator[Any, None, None]:
    """The messages that a method answers with."""
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


def on_all(
    client: Client, method: str, request: Any, progress: Tell | None
) -> list[pb.CheckpointProgress]:
    """Have all shards do a long piece of work; their last words. The first failure ends all."""
    told = [(0, 0)] * len(links(client))

    def tell(shard: int, message: pb.CheckpointProgress) -> None:
        told[shard] = (message.bytes, message.total)
        if progress is not None:
            progress(*map(sum, zip(*told, strict=True)))

    return all_streams(client, method, request, pb.CheckpointProgress, tell)


def all_streams(
    client: Client,
    method: str,
    request: Any,
    answer: Any,
    tell: Callable[[int, Any], None],
    *,
    service: str = SERVICE,
) -> list[Any]:
    """Read a method's messages from all shards at once; the last of each. The first failure ends
    all.

    tell  is called with a shard and a message of it; not by two threads at once
    """
    shards = links(client)
    telling = threading.Lock()
    stop = threading.Event()

    def work(shard: int) -> Any:
        last = answer()
        answers = stream(shards[shard], method, request, answer, service=service)
        with closing(answers) as messages:
            for last in messages:
                if stop.is_set():
                    break
                with telling:
                    tell(shard, last)
        return last

    with ThreadPoolExecutor(len(shards), "psclient-work") as pool:
        running = [pool.submit(work, shard) for shard in range(len(shards))]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # each ends with its next message
    for each in running:
        if (error := each.exception()) is not None:
            raise error
    return [each.result() for each in running]
