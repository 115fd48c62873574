"""LanePipe: a pipe through the same-host lane of a server.

The arrays of requests and answers are in shared memory (regions.py); messages without arrays go
over a Unix socket. psproto/lanes.py describes them.
"""

from __future__ import annotations

import array
import os
import select
import socket
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from psclient.errors import NoLane
from psclient.gpuregions import GpuRegions
from psclient.pipe import PipeLost
from psclient.regions import Chunk, Region, Regions
from psclient.session import Call
from psclient.signals import Shield
from psproto import codec, lanes
from psproto import ps_pb2 as pb

HELLO_SECONDS = 5.0  # maximum time for the server to answer the first message
PIECE = 1 << 16  # maximum bytes that one call reads from the socket
LANE_REASONS = ("LANE_REFUSED", "LANE_LIMIT")


class LanePipe:
    """Pipe through the same-host lane of a server.

    offer    the server's answer to GetServerInfo: the path of its socket, and the token
    seconds  maximum time to wait for the server's answer to the first message

    refused      why the server refused the memory of this client; "": it did not
    gpu_regions  GPU memory that the server writes rows to

    Raises NoLane with the reason if the lane cannot be used.
    """

    def __init__(self, offer: pb.Lane, seconds: float = HELLO_SECONDS) -> None:
        self.refused = ""
        self._regions, self.gpu_regions = Regions(offer.token), GpuRegions(offer.gpu)
        # by id of the call: its memory, its request, and the offset of the room of each pull
        self._waiting: dict[int, tuple[Chunk, codec.Exchange, list[int]]] = {}
        self._received = bytearray()  # the beginning of a message that is not complete
        # messages, and the regions that each registers
        self._unsent: deque[tuple[bytes, list[Region]]] = deque()
        self._sending = threading.Lock()
        with Shield():
            self._socket = _connected(offer.path)
            _pipes.add(self)
            self._greet(offer, seconds)

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()

    def send(self, call: Call) -> None:
        for pull in call.exchange.pulls:
            if pull.device is not None:
                self._find_room(pull, pull.device)
        chunk = self._regions.take(lanes.exchange_bytes(call.exchange))
        region = chunk.region
        request, rooms = lanes.encode_request(
            call.stream_header(), call.exchange, region.memory, region.number, chunk.start
        )
        call.handle = chunk
        self._waiting[call.id] = chunk, call.exchange, rooms
        fresh = self._regions.fresh
        if fresh:
            request += _registration(fresh).SerializeToString()  # protobuf merges them
        self._put(lanes.framed(request), list(fresh))
        fresh.clear()

    def _find_room(self, pull: codec.PullMessage, device: int) -> None:
        """Take GPU memory for the rows of a pull; ask the server to map more if it is too little.

        Until the server has answered, rows go through shared memory.

        device  number of the GPU that needs the rows
        """
        regions = self.gpu_regions
        pull.gpu_room = regions.room(device, 4 * len(pull.keys) * pull.dim)
        if (region := regions.fresh) is not None:
            regions.fresh = None
            self._put(lanes.framed(region.registration().SerializeToString()), [])

    def receive(self) -> tuple[int, codec.Exchanged | pb.Status]:
        reply = lanes.decode_response(self._message())
        if reply.id >= lanes.REGISTRATION:
            self.gpu_regions.answered(reply.error.message)
            return reply.id, codec.Exchanged([], [])
        sent = self._waiting.pop(reply.id, None)
        if reply.HasField("error"):
            if _reason(reply.error) in LANE_REASONS:
                self.refused = reply.error.message
            if not reply.id or self.refused:
                raise PipeLost(reply.error.message)
            return reply.id, reply.error
        if sent is None:
            return reply.id, codec.Exchanged([], [])
        chunk, exchange, rooms = sent
        return reply.id, lanes.exchanged(reply.exchange, exchange, chunk.region.memory, rooms)

    def answered(self, id: int) -> None:
        pass

    def delay(self) -> float:
        return 0.0

    def end(self) -> None:
        pass

    def cancel(self) -> None:
        with suppress(OSError):  # it is not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)

    def leave_to_parent(self) -> None:
        """In a forked child: close the socket, and forget the memory. The parent keeps both."""
        self._socket.close()
        self._regions.forget()
        self.gpu_regions.forget()
        self._waiting.clear()
        self._unsent.clear()

    # ---- bytes of the socket

    def _greet(self, offer: pb.Lane, seconds: float) -> None:
        """Send the token, and wait for the answer. Raises NoLane."""
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(
                lanes.framed(pb.LaneRequest(token=offer.token).SerializeToString())
            )
            reply = lanes.decode_response(self._message())
        except (OSError, PipeLost, codec.Malformed) as error:
            raise NoLane(f"the server at {offer.path} did not answer: {error}") from error
        if reply.HasField("error"):
            raise NoLane(reply.error.message)
        self._socket.settimeout(None)

    def _message(self) -> bytes:
        """Return the bytes of the next message. Raises OSError if the socket was closed."""
        received, head = self._received, lanes.LENGTH.size
        while True:
            if len(received) >= head:
                end = head + lanes.LENGTH.unpack_from(received)[0]
                if len(received) >= end:
                    message = bytes(received[head:end])
                    del received[:end]
                    return message
            if self._unsent and not self._readable():
                continue
            try:
                self._wait()
                data = self._socket.recv(PIECE)
            except OSError as error:
                if error.errno is None:  # a signal handler raised it
                    raise
                data = b""
            if not data:
                raise PipeLost("the server closed the lane")
            if not received and _is_whole(data):
                return data[head:]  # the usual case
            received += data

    def _wait(self) -> None:
        """Wait until the socket has data or is closed; without limit, so not if it has a timeout.

        A thread that waits in ``recv`` instead wakes up for nothing, once per request, when the
        server has read the request: the kernel tells it that there is room for more.
        """
        if self._socket.gettimeout() is None:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            poll.poll()

    def _readable(self) -> bool:
        """Wait until the socket has data, or room for messages that wait, and send those.

        Returns whether it has data, or is closed. The server may be waiting for the rest of a
        message: then there is no answer to wait for.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLOUT)
        ((_, events),) = poll.poll()
        with Shield(), self._sending:
            self._flush()
        return bool(events & ~select.POLLOUT)

    def _put(self, message: bytes, regions: list[Region]) -> None:
        """Send a message as soon as the socket has room, after those that wait.

        regions  the regions that it registers

        The caller holds the lock of the link. If a signal handler raises here, the caller drops the
        pipe.
        """
        if not self._unsent and not regions:
            try:
                message = message[self._socket.send(message, socket.MSG_DONTWAIT) :]
            except OSError as error:
                if error.errno is None:  # a signal handler raised it
                    raise
            if not message:
                return
        with Shield(), self._sending:
            self._unsent.append((message, regions))
            self._flush()

    def _flush(self) -> None:
        """Send messages that wait, as far as the socket has room.

        While it has none, the server has requests to answer: the thread that reads the answers
        sends the rest. Errors are left to this thread. The caller holds the lock ``_sending``.
        """
        while self._unsent:
            message, regions = self._unsent[0]
            try:
                if regions:
                    fds = array.array("i", [each.fd for each in regions])
                    rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, fds
                    sent = self._socket.sendmsg([message], [rights], socket.MSG_DONTWAIT)
                else:
                    sent = self._socket.send(message, socket.MSG_DONTWAIT)
            except OSError:
                return
            for each in regions:
                each.sent()
            if sent == len(message):
                self._unsent.popleft()
            else:
                self._unsent[0] = message[sent:], []


def _is_whole(data: bytes) -> bool:
    """Return whether bytes from the socket are one message, no more and no less."""
    head = lanes.LENGTH.size
    return len(data) >= head and int(lanes.LENGTH.unpack_from(data)[0]) == len(data) - head


def _registration(regions: Sequence[Region]) -> pb.LaneRequest:
    """Return a message that registers regions."""
    return pb.LaneRequest(
        regions=[
            pb.LaneRegion(region=each.number, kind=pb.LANE_KIND_MEMFD, size=len(each.memory))
            for each in regions
        ]
    )


def _connected(path: str) -> socket.socket:
    """Return a socket that is connected to the server at ``path``. Raises NoLane."""
    if not hasattr(os, "memfd_create"):
        raise NoLane("this system has no memfd_create, which Linux has")
    connection = socket.socket(socket.AF_UNIX)
    try:
        with lanes.reachable(Path(path)) as short:
            connection.settimeout(HELLO_SECONDS)
            connection.connect(short)
    except OSError as error:
        connection.close()
        raise NoLane(
            f"cannot connect to {path}: {error.strerror or error}; {_advice(error)}"
        ) from error
    if (user := lanes.peer_user(connection)) != os.geteuid():
        connection.close()
        raise NoLane(
            f"the process that listens at {path} has the user id {user}, and this one"
            f" {os.geteuid()}: client and server must run as the same user"
        )
    return connection


def _advice(error: OSError) -> str:
    """Return what may cause an error of ``connect``."""
    if isinstance(error, PermissionError):
        return "client and server must run as the same user"
    return (
        "the server is on a different host, or in a container that does not share the directory of"
        " the socket under the same path"
    )


def _reason(status: pb.Status) -> str:
    """Return the reason of an error, such as "LANE_LIMIT"; "" if it has none."""
    for detail in status.details:
        if detail.type_url.endswith("ErrorInfo"):
            return str(pb.ErrorInfo.FromString(detail.value).reason)
    return ""


_pipes: weakref.WeakSet[LanePipe] = weakref.WeakSet()


def _in_child() -> None:
    """In a forked child: leave all lanes to the parent."""
    for pipe in list(_pipes):
        pipe.leave_to_parent()
    _pipes.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
