"""One connection of the same-host lane: its socket, its regions, and the requests on it.

A message that arrives alone, while its task waits for one, is served in the callback of the socket:
this saves two rounds of the event loop. All others are passed to the task.
"""

from __future__ import annotations

import array
import asyncio
import mmap
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

from psproto import codec, lanes
from psproto import ps_pb2 as pb
from psserver.errors import BadRequest, Refused
from psserver.flow import FEW, Accept, Head, Served
from psserver.limits import Limits
from psserver.regions import GpuRegion, Regions
from psserver.security.budgets import Budget
from psserver.security.guard import Actor
from psserver.status import status_of
from psserver.turns import Client

PIECE = 1 << 16  # maximum bytes that one call reads from a socket
MOST_FDS = 16  # maximum number of descriptors that wait for the message that names them
ANCILLARY = socket.CMSG_SPACE(MOST_FDS * array.array("i").itemsize)

Message = tuple[pb.LaneRequest, int]  # a request; the bytes of it and its arrays


class Gone(ConnectionError):
    """The connection was closed before a reply was sent."""


class Connection:
    """A connection of the lane: the Caller of a stream.

    actor_of  returns who uses the connection, given the token in its first message
    regions   has the regions of all clients
    limits    count long messages that are not complete yet
    watching  ends the connection when the policy no longer allows what the client did
    buffer    PIECE bytes into which sockets are read; connections may share it
    """

    prompt, via = True, "shm"
    accept: Accept | None = None

    def __init__(
        self,
        connection: socket.socket,
        loop: asyncio.AbstractEventLoop,
        actor_of: Callable[[bytes], Actor],
        regions: Regions,
        limits: Limits,
        watching: ExitStack,
        buffer: memoryview,
    ) -> None:
        self.client = Client()
        self._socket = connection
        self._fd = connection.fileno()
        self._loop = loop
        self._actor_of = actor_of
        self._regions = regions
        self._limits = limits
        self._watching = watching
        self._buffer, self._buffers = buffer, [buffer]
        self._actor: Actor | None = None  # None: the client has not sent its token yet
        self._token = b""
        self._own: dict[int, mmap.mmap] = {}
        self._own_gpu: dict[int, GpuRegion] = {}
        self._received = bytearray()  # the beginning of a message that is not complete
        self._fds: list[int] = []  # descriptors that no message has named yet
        self._waiter: asyncio.Future[bytes | Served] | None = None  # of the task that reads
        self._waited = False  # whether the task has waited since the last message
        self._listening = False  # whether the loop watches the socket for data
        self._unsent = bytearray()
        self._sent: asyncio.Future[None] | None = None  # done when ``_unsent`` is empty
        self.encode = lanes.encode_response

    def require_same_user(self) -> None:
        """Raise BadRequest if the client's user id is not that of this process."""
        user = lanes.peer_user(self._socket)
        if user != os.geteuid():
            raise BadRequest(
                "LANE_REFUSED",
                f"the lane serves only processes with the user id of the server, {os.geteuid()},"
                f" got {user}",
            )

    def close(self) -> None:
        """Close the socket, and unmap the client's regions."""
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._regions.remove(self._own)
        self._own_gpu.clear()
        if self._sent is not None and not self._sent.done():
            self._sent.set_exception(Gone("the connection was closed"))

    # ---- as stream.py wants it

    @property
    def budget(self) -> Budget | None:
        return None if self._actor is None else self._actor.budget

    async def read(self) -> Message | Served | None:
        while True:
            message = await self._message()
            if message is None or isinstance(message, Served):
                return message
            request = lanes.parse(message)
            if self._actor is not None and not request.regions:
                return request, len(message) + lanes.request_bytes(request)
            try:
                self._register(request)
            except Refused as error:
                await self.write(self.encode(request.id, _status(error)))
                if self._actor is None:
                    return None
                continue
            if request.pushes or request.pulls:
                return request, len(message) + lanes.request_bytes(request)
            await self.write(self.encode(request.id, codec.Exchanged([], [])))

    async def write(self, data: bytes) -> None:
        if not self.send(data):
            assert self._sent is not None
            await asyncio.shield(self._sent)

    def send(self, data: bytes) -> bool:
        """Send a message; keep what the socket has no room for, and send it later.

        Returns whether all of it was sent. Raises OSError if the client is gone.
        """
        message = lanes.framed(data)
        if self._unsent:
            self._unsent += message
            return False
        try:
            sent = self._socket.send(message)
        except BlockingIOError:
            sent = 0
        if sent == len(message):
            return True
        self._unsent += message[sent:]
        self._sent = self._loop.create_future()
        self._loop.add_writer(self._fd, self._send_more)
        return False

    def size(self, message: Message) -> int:
        return message[1]

    def head(self, message: Message) -> Head:
        return message[0]

    def decode(
        self, message: Message, budget: int
    ) -> tuple[pb.LaneRequest, codec.Exchange | Exception]:
        request = message[0]
        try:
            exchange = lanes.decode_request(request, self._own, budget, self._own_gpu)
        except lanes.BadSlice as error:
            return request, BadRequest("INVALID_ARGUMENT", str(error))
        assert self._actor is not None
        return request, self._actor.refusal(exchange) or exchange

    async def refuse(self, error: Exception) -> None:
        """Send an error that ends the connection."""
        await self.write(self.encode(0, _status(error)))

    # ---- registration

    def _register(self, request: pb.LaneRequest) -> None:
        """Check the token of the first message; map the regions of a message.

        Raises BadRequest, Unauthenticated or TooLarge.
        """
        if self._actor is None:
            self._actor = self._actor_of(request.token)
            self._token = request.token
            if self._actor.name:
                self.client = Client(self._limits.share(self._actor.name))
            self._watching.enter_context(self._actor.watched())
        regions = [each for each in request.regions if each.kind != pb.LANE_KIND_CUDA]
        fds, self._fds = self._fds[: len(regions)], self._fds[len(regions) :]
        try:
            if len(fds) < len(regions):
                raise BadRequest(
                    "LANE_REFUSED",
                    f"shared memory: expected {len(regions)} descriptors with the message,"
                    f" got {len(fds)}",
                )
            for region, fd in zip(regions, fds, strict=True):
                self._regions.add(self._own, region, fd, self._token)
        finally:
            for fd in fds:
                os.close(fd)
        for region in request.regions:
            if region.kind == pb.LANE_KIND_CUDA:
                self._regions.add_gpu(self._own_gpu, region)

    # ---- bytes of the socket

    async def _message(self) -> bytes | Served | None:
        """Return the bytes of the next message; None at the end; SERVED if ``accept`` has taken it.

        Lets other connections be served first, if the message was there already. Raises Malformed;
        Overloaded if the message is long and there is no room for it.
        """
        message = await self._next()
        if not self._waited:
            await asyncio.sleep(0)
        self._waited = False
        return message

    async def _next(self) -> bytes | Served | None:
        """Return the same as ``_message``, which has the errors too."""
        received, reservation = self._received, None
        try:
            while True:
                end = _end(received)
                if 0 < end <= len(received):
                    message = bytes(received[lanes.LENGTH.size : end])
                    del received[:end]
                    return message
                if end > PIECE and reservation is None:
                    reservation = self._limits.admit(end - lanes.LENGTH.size)
                data = await self._receive()
                if isinstance(data, Served):
                    return data
                if not data:
                    return None
                received += data
        finally:
            if reservation is not None:
                reservation.release()

    async def _receive(self) -> bytes | Served:
        """Wait for bytes, and return them; b"" at the end of the connection; SERVED if they were a
        message that ``accept`` has taken.
        """
        try:
            return self._take()
        except BlockingIOError:
            pass
        self._waited = True
        self._waiter = self._loop.create_future()
        if not self._listening:
            self._listening = True
            self._loop.add_reader(self._fd, self._readable)
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def _readable(self) -> None:
        """Serve a message that arrived alone, or pass what arrived to the task that waits for it.

        The loop calls this.
        """
        waiter = self._waiter
        if waiter is None or waiter.done():  # the task is busy: it will listen again
            self._loop.remove_reader(self._fd)
            self._listening = False
            return
        try:
            data = self._take()
            served = False if self._received else self._serve(data)
            if served is not None:
                waiter.set_result(served or data)
        except BlockingIOError:
            pass
        except Exception as error:
            waiter.set_exception(error)

    def _serve(self, data: bytes) -> Served | Literal[False] | None:
        """Serve a message that arrived alone, if that can be done at once.

        data  bytes that have arrived

        Returns None if it was answered; SERVED if it was begun, or refused, and the task must go
        on; False if nothing was done with ``data``. Raises Malformed.
        """
        if self.accept is None or self._actor is None or self._fds:
            return False
        if not data or _end(data) != len(data):
            return False
        request = lanes.parse(data[lanes.LENGTH.size :])
        if request.regions or len(request.pushes) + len(request.pulls) > FEW:
            return False
        return self.accept((request, len(data) + lanes.request_bytes(request)))

    def _take(self) -> bytes:
        """Return bytes that have arrived, and keep the descriptors that came with them.

        Raises BlockingIOError if none have. Raises Malformed if there are too many descriptors.
        """
        try:
            size, ancillary, flags, _ = self._socket.recvmsg_into(
                self._buffers, ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return b""
        if ancillary:
            fds = array.array("i")
            for level, kind, contents in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(contents[: len(contents) - len(contents) % fds.itemsize])
            self._fds += fds
        if flags & socket.MSG_CTRUNC or len(self._fds) > MOST_FDS:
            raise codec.Malformed(f"more than {MOST_FDS} descriptors arrived without their message")
        return bytes(self._buffer[:size])

    def _send_more(self) -> None:
        """Send what is left. The loop calls this when the socket has room."""
        sent = self._sent
        assert sent is not None
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            self._loop.remove_writer(self._fd)
            if not sent.done():
                sent.set_exception(error)
            return
        if not self._unsent:
            self._loop.remove_writer(self._fd)
            if not sent.done():
                sent.set_result(None)


def _status(error: Exception) -> pb.Status:
    status: pb.Status = pb.Status.FromString(status_of(error).SerializeToString())
    return status


def _end(received: bytes | bytearray) -> int:
    """Return the end of the first message in the bytes that were received; 0: not known yet.

    Raises Malformed if the message is too long.
    """
    if len(received) < lanes.LENGTH.size:
        return 0
    size: int = lanes.LENGTH.unpack_from(received)[0]
    if size > lanes.MOST_MESSAGE:
        raise codec.Malformed(f"a message must have at most {lanes.MOST_MESSAGE} bytes, got {size}")
    return lanes.LENGTH.size + size
