"""Compare pulls and pushes with a bare gRPC echo that moves as many bytes in the same kind of call.

Both servers are one process (grpc.aio on uvloop); the client is another process on the same
machine. The messages are built in advance, so that only the server's work is measured: decode,
check, find rows, apply gradients, encode. The keys are the distinct keys of the standard work.

busy   our server, polling for 2 ms before it sleeps
table  the same pull or push on a table in this process, without messages: the reads and writes of
       random rows, which an echo does not do. No server can be faster than echo + table.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc
import numpy as np

from benchmarks.report import Contender, Report, arguments, interleave, milliseconds
from benchmarks.servers import echo, shards
from benchmarks.step import BUSY_POLL, fill, local_table
from benchmarks.work import Work, keys_of, standard_work
from psclient import Client
from psproto import codec
from psproto import ps_pb2 as pb
from storage.table import Table

DIM = 32
NO_LIMIT = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Stream:
    """A gRPC stream on which each request waits for its reply."""

    def __init__(self, channel: grpc.Channel, method: str) -> None:
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._replies = channel.stream_stream(method)(iter(self._outbox.get, None))

    def __call__(self, message: bytes) -> bytes:
        """Send an encoded request; return the encoded reply."""
        self._outbox.put(message)
        return bytes(next(self._replies))

    def close(self) -> None:
        """End the stream."""
        self._outbox.put(None)


def messages(keys: list[Any], gradients: Any) -> dict[str, list[bytes]]:
    """Return encoded requests for each step, by kind of call.

    keys       keys of each step, uint64[n]
    gradients  float32[m, dim], m >= n; each step uses the first n
    """
    pulls = [codec.PullMessage(pb.PullHeader(table="wire"), k) for k in keys]
    pushes = [
        codec.PushMessage(
            pb.PushHeader(table="wire"), k, np.ones(len(k), np.uint32), gradients[: len(k)]
        )
        for k in keys
    ]
    head = pb.StreamRequestHeader(id=1)
    return {
        "pull": [codec.encode_pull(pull) for pull in pulls],
        "push": [codec.encode_push(push) for push in pushes],
        "stream pull": [
            codec.encode_stream_request(head, codec.Exchange([], [pull])) for pull in pulls
        ],
        "stream push": [
            codec.encode_stream_request(head, codec.Exchange([push], [])) for push in pushes
        ],
        "stream exchange": [
            codec.encode_stream_request(head, codec.Exchange([push], [pull]))
            for push, pull in zip(pushes, pulls, strict=True)
        ],
    }


class Local:
    """Does the reads and writes of a call on a table in this process, without messages.

    kind       kind of call, as in ``messages``
    keys       keys of each step, uint64[n]
    gradients  float32[m, dim], m >= n; each step uses the first n
    """

    def __init__(self, table: Table, kind: str, keys: list[Any], gradients: Any) -> None:
        self._table, self._kind, self._keys, self._gradients = table, kind, keys, gradients

    def __call__(self, i: int) -> None:
        """Push, pull, or first push and then pull the keys of step ``i``."""
        keys = self._keys[i % len(self._keys)]
        if not self._kind.endswith("pull"):
            gradients, ones = self._gradients[: len(keys)], np.ones(len(keys), np.uint32)
            self._table.push(keys, gradients, ones, version=i, step=i)
        if not self._kind.endswith("push"):
            self._table.pull(keys, "train", np.empty((len(keys), DIM), np.float32))


def _turn(call: Any, requests: list[bytes], i: int) -> None:
    call(requests[i % len(requests)])


def _row(kind: str, ours: Any, echoed: Any, table: Any, busy: Any) -> dict[str, Any]:
    """Return a row of the report for one kind of call.

    kind                       kind of call
    ours, echoed, table, busy  seconds of each step of the four contenders
    """
    mine, bare, rows, awake = (float(np.median(each)) for each in (ours, echoed, table, busy))
    return {
        "call": kind,
        **milliseconds(ours),
        "echo": bare * 1e3,
        "table": rows * 1e3,
        "x echo (<= 1.3)": mine / bare,
        "x (echo + table)": mine / (bare + rows),
        "busy": awake * 1e3,
        "busy x echo": awake / bare,
    }


class Calls(NamedTuple):
    """The functions that make one kind of call: each sends a request and returns the reply."""

    ours: Any  # to our server
    busy: Any  # to our server that polls
    echo: Any  # to the bare echo server


def calls(stack: ExitStack, ours: str, busy: str, bare: str) -> dict[str, Calls]:
    """Connect to the three servers; return the Calls for each kind of call.

    stack             closes the connections
    ours, busy, bare  addresses of our server, of our server that polls, of the echo server
    """
    channels = [
        stack.enter_context(grpc.insecure_channel(address, options=NO_LIMIT))
        for address in (ours, busy, bare)
    ]
    found = {}
    for kind in ("pull", "push"):
        methods = 2 * [f"/ps.v1.RowService/{kind.title()}"] + ["/Echo/Unary"]
        found[kind] = Calls(*(c.unary_unary(m) for c, m in zip(channels, methods, strict=True)))
    methods = 2 * ["/ps.v1.RowService/Stream"] + ["/Echo/Stream"]
    streams = [Stream(c, m) for c, m in zip(channels, methods, strict=True)]
    for stream in streams:
        stack.callback(stream.close)
    kinds = ("stream pull", "stream push", "stream exchange")
    return found | dict.fromkeys(kinds, Calls(*streams))


def contenders_for(call: Calls, kind: str, requests: list[bytes]) -> dict[str, Contender]:
    """Return the contenders for one kind of call that send messages, by name.

    requests  encoded requests, used in a cycle

    An echo gets requests of equal sizes, and replies with as many bytes as our server.
    """
    replies = [len(call.ours(request)) for request in requests]
    echoed = [
        reply.to_bytes(4, "little") + request[4:]
        for request, reply in zip(requests, replies, strict=True)
    ]
    return {
        kind: partial(_turn, call.ours, requests),
        f"{kind} busy": partial(_turn, call.busy, requests),
        f"{kind} echo": partial(_turn, call.echo, echoed),
    }


def main() -> None:
    """Run the benchmark and print its tables."""
    options = arguments(__doc__).parse_args()
    report = Report("wire", options.json)
    work = Work(rows=200_000 if options.quick else 2_000_000)
    all_keys = keys_of(np.arange(work.rows))
    gradients = np.random.default_rng(0).standard_normal((10_000, DIM), dtype=np.float32)
    with ExitStack() as stack:
        ours, _ = stack.enter_context(shards(1))
        busy, _ = stack.enter_context(shards(1, busy_poll=BUSY_POLL))
        for each in (ours, busy):
            client = stack.enter_context(Client(each))
            fill(client.create_table("wire", DIM, lr=0.05), all_keys)
        table = local_table(all_keys, DIM)
        bare, _ = stack.enter_context(echo())
        by_kind = calls(stack, ours[0], busy[0], bare)
        for batch in (10_000, 1_000):
            steps = standard_work(Work(rows=work.rows, batch=batch), 64)
            keys = [all_keys[distinct].view(np.uint64) for _, distinct, _ in steps]
            requests = messages(keys, gradients)
            contenders: dict[str, Contender] = {}
            for kind, call in by_kind.items():
                contenders |= contenders_for(call, kind, requests[kind])
                contenders[f"{kind} table"] = Local(table, kind, keys, gradients)
            times = interleave(contenders, steps=60 if options.quick else 300, rounds=6)
            report.section(
                f"wire, {np.mean([len(k) for k in keys]):,.0f} distinct keys, dim {DIM}, float32",
                [
                    _row(kind, *(times[kind + more] for more in ("", " echo", " table", " busy")))
                    for kind in by_kind
                ],
            )
    report.close()


if __name__ == "__main__":
    main()
