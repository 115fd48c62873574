"""Tests of psserver/eventloop.py: a busy loop gets all events of gRPC at once."""

from __future__ import annotations

import asyncio
import threading
import time
from queue import SimpleQueue
from typing import Any

import grpc
import uvloop

from psserver.eventloop import Loop

STREAMS = 400  # more than the pair of sockets has room for


async def rounds_to_read(streams: int) -> int:
    """Let one message arrive on each stream while the loop is busy. Return the number of rounds in
    which the loop then reads them.
    """
    read = opened = 0
    all_read = asyncio.Event()

    async def serve(_: Any, context: Any) -> None:
        nonlocal read, opened
        opened += 1
        await context.read()
        read += 1
        if read == streams:
            all_read.set()

    server = grpc.aio.server()
    handlers = {"Stream": grpc.stream_stream_rpc_method_handler(serve)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        outboxes: list[SimpleQueue[bytes | None]] = [SimpleQueue() for _ in range(streams)]
        stream = channel.stream_stream("/Echo/Stream")
        calls = [stream(iter(outbox.get, None)) for outbox in outboxes]
        while opened < streams:
            await asyncio.sleep(0.01)

        def send() -> None:
            for outbox in outboxes:
                outbox.put(b"message")

        sender = threading.Thread(target=send)
        sender.start()
        time.sleep(1)  # the loop is busy
        sender.join()
        rounds = 0
        while not all_read.is_set():
            await asyncio.sleep(0)
            rounds += 1
        for call, outbox in zip(calls, outboxes, strict=True):
            call.cancel()
            outbox.put(None)
    await server.stop(None)
    return rounds


def test_a_busy_loop_gets_all_messages_that_have_arrived_in_a_few_rounds() -> None:
    assert uvloop.run(rounds_to_read(STREAMS), loop_factory=Loop) < STREAMS / 10


def test_uvloop_alone_gets_one_message_per_round() -> None:
    """If this fails, grpcio needs no help any more, and eventloop.py can go."""
    assert uvloop.run(rounds_to_read(STREAMS)) > STREAMS / 10
