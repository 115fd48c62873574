"""Send requests to a shard at a given rate, whether or not it keeps up. overload.py starts this.

A process reads one Flood as a line of JSON from its standard input, sends its requests, and prints
the path of a new file with JSON: what became of each request. Then it reads the next line.

Requests arrive at random times (a Poisson process). Each has a deadline, counted from its intended
arrival. They are encoded before the start and decoded only as far as needed, so that the generator
takes little of the processor time that it shares with the server.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from tempfile import NamedTemporaryFile
from typing import Any

import grpc
import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks.work import Work, keys_of, standard_work
from psclient.errors import error_of
from psclient.patience import Patience
from psclient.window import Window
from psproto import codec
from psproto import ps_pb2 as pb
from psproto.encoding import varint
from psserver.eventloop import Loop

TABLE, DIM, ROWS = "overload", 32, 200_000
BATCHES = 16  # different requests, used in turn
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]
STREAM = "/ps.v1.RowService/Stream"
ANSWERED = b"\x12"  # tag of StreamResponse.exchange
HELD = "held"  # refused by the client: the server is overloaded, as it has told or as answers show


@dataclass(frozen=True, kw_only=True)
class Flood:
    """Requests to send."""

    address: str
    rate: float  # requests per second
    seconds: float
    deadline: float  # seconds after the intended arrival
    batch: int = 1000  # ids per request, as in the standard work
    kind: str = "exchange"  # a push and a pull; "pull": a pull alone
    connections: int = 2
    streams: int = 4  # per connection; 0: unary calls
    patient: bool = (
        True  # wait as psclient does; False: send what arrives, whatever the server says
    )
    seed: int = 0


@dataclass
class Outcomes:
    """What became of each request, in the order of arrival. Times are in monotonic seconds."""

    intended: list[float]
    answered: list[float]  # time of the answer; 0: none came
    outcome: list[str]  # "served", HELD, "unsent", "lost" or the reason of an error
    hint: list[float]  # seconds after which the server asks to retry; 0: it does not ask


def messages(flood: Flood) -> list[bytes]:
    """Return the encoded exchanges of a flood."""
    work = Work(rows=ROWS, dim=DIM, batch=flood.batch, seed=flood.seed)
    keys = keys_of(np.arange(ROWS)).view(np.uint64)
    found = []
    for _, distinct, gradients in standard_work(work, BATCHES):
        pushed = np.ascontiguousarray(keys[distinct])
        header = pb.PushHeader(table=TABLE)
        push = codec.PushMessage(header, pushed, None, gradients.ravel())
        pull = codec.PullMessage(pb.PullHeader(table=TABLE), pushed)
        pushes = [push] if flood.kind == "exchange" else []
        found.append(codec.encode_exchange(codec.Exchange(pushes, [pull])))
    return found


class _Run:
    """The requests of one flood."""

    def __init__(self, flood: Flood, contents: list[bytes]) -> None:
        self._flood = flood
        self._contents = contents
        gaps = np.random.default_rng(flood.seed).exponential(
            1 / flood.rate, max(int(flood.rate * flood.seconds), 1)
        )
        self._arrivals: NDArray[np.float64] = np.cumsum(gaps)
        count = len(gaps)
        self.found = Outcomes([], [0.0] * count, ["lost"] * count, [0.0] * count)

    async def run(self) -> Outcomes:
        """Send the requests; wait for the answers until the last deadline has passed."""
        flood = self._flood
        channels = [
            grpc.aio.insecure_channel(flood.address, options=OPTIONS)
            for _ in range(flood.connections)
        ]
        for channel in channels:
            await channel.channel_ready()
        lines: list[Any] = [
            _Line(self, channel) for channel in channels for _ in range(max(flood.streams, 1))
        ]
        start = time.monotonic() + 0.05
        self.found.intended = [start + float(at) for at in self._arrivals]
        for number, at in enumerate(self.found.intended):
            if (pause := at - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            elif not number % 32:
                await asyncio.sleep(0)
            lines[number % len(lines)].send(number)
        end = self.found.intended[-1] + flood.deadline + 0.2
        while time.monotonic() < end and "lost" in self.found.outcome:
            await asyncio.sleep(0.05)
        for line in lines:
            line.close()
        for channel in channels:
            await channel.close()
        return self.found

    def left(self, number: int) -> float:
        """Return the seconds until the deadline of a request."""
        return self.found.intended[number] + self._flood.deadline - time.monotonic()

    def content(self, number: int) -> bytes:
        return self._contents[number % len(self._contents)]

    @property
    def patient(self) -> bool:
        return self._flood.patient

    @property
    def unary(self) -> bool:
        return not self._flood.streams

    def served(self, number: int) -> None:
        self.found.answered[number] = time.monotonic()
        self.found.outcome[number] = "served"

    def failed(self, number: int, status: pb.Status) -> pb.Status:
        """Note an error that the server answered, and return it."""
        self.found.answered[number] = time.monotonic()
        reason, hint = str(status.code), 0.0
        for detail in status.details:
            if detail.type_url.endswith("ErrorInfo"):
                reason = pb.ErrorInfo.FromString(detail.value).reason
            elif detail.type_url.endswith("RetryInfo"):
                delay = pb.RetryInfo.FromString(detail.value).retry_delay
                hint = delay.seconds + delay.nanos / 1e9
        self.found.outcome[number], self.found.hint[number] = reason, hint
        return status


class _Line:
    """One stream, or the unary calls on one connection. Waits as psclient does, by its code."""

    def __init__(self, run: _Run, channel: grpc.aio.Channel) -> None:
        self._run = run
        self._outbox: asyncio.Queue[int] = asyncio.Queue()
        self._window: Window[int] = Window()
        self._patience = Patience()
        self._tasks: set[asyncio.Task[None]] = set()
        if run.unary:
            self._call = channel.unary_unary("/ps.v1.RowService/Exchange")
        else:
            self._stream: Any = channel.stream_stream(STREAM)()
            self._start(self._write())
            self._start(self._read())

    def send(self, number: int) -> None:
        """Send a request as soon as the server and the connection take it."""
        run = self._run
        if run.patient and (self._patience.holds() or 2 * self._window.delay() > run.left(number)):
            run.found.answered[number] = time.monotonic()
            run.found.outcome[number] = HELD
        elif not run.patient or self._window.enter(number):
            self._send_now(number)

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()

    def _send_now(self, number: int) -> None:
        self._window.sent(number, len(self._run.content(number)))
        if self._run.unary:
            self._start(self._one(number))
        else:
            self._outbox.put_nowait(number)

    def _answered(self, number: int, status: pb.Status | None) -> None:
        """Note the answer to a request, and send those that waited for it."""
        if status is None:
            self._run.served(number)
        else:
            self._patience.refused(error_of(self._run.failed(number, status), ""))
        self._next(number)

    def _next(self, number: int) -> None:
        for each in self._window.answered(number):
            self._send_now(each)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one(self, number: int) -> None:
        run, left = self._run, self._run.left(number)
        if left <= 0:
            run.found.outcome[number] = "unsent"
            self._next(number)
            return
        try:
            await self._call(run.content(number), timeout=left)
        except grpc.aio.AioRpcError as error:
            details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            status = pb.Status.FromString(details) if details else pb.Status()
            status.code = status.code or error.code().value[0]
            self._answered(number, status)
        else:
            self._answered(number, None)

    async def _write(self) -> None:
        run = self._run
        while True:
            number = await self._outbox.get()
            left = run.left(number)
            if left <= 0:
                run.found.outcome[number] = "unsent"
                self._next(number)
                continue
            head = pb.StreamRequestHeader(id=number + 1, timeout_ms=int(left * 1000) + 1)
            await self._stream.write(enveloped(head.SerializeToString(), run.content(number)))

    async def _read(self) -> None:
        while (data := await self._stream.read()) is not grpc.aio.EOF:
            id, at = _read_varint(data, 1)
            found = None
            if data[at : at + 1] != ANSWERED:
                found = pb.StreamResponse.FromString(data).error
            self._answered(id - 1, found)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a varint that begins at an offset, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7


def enveloped(head: bytes, exchange: bytes) -> bytes:
    """Return an encoded StreamRequest: fields 1 and 2 with their lengths."""
    return b"".join((b"\x0a", bytes([len(head)]), head, b"\x12", varint(len(exchange)), exchange))


def main() -> None:
    """Send floods until the standard input ends."""
    print("ready", flush=True)
    known: dict[tuple[int, str, int], list[bytes]] = {}
    for line in sys.stdin:
        flood = Flood(**json.loads(line))
        kind = (flood.batch, flood.kind, flood.seed)
        if kind not in known:
            known[kind] = messages(flood)
        found = uvloop.run(_Run(flood, known[kind]).run(), loop_factory=Loop)
        with NamedTemporaryFile("w", prefix="ps-flood-", suffix=".json", delete=False) as file:
            json.dump(asdict(found), file)
        print(file.name, flush=True)


if __name__ == "__main__":
    main()
