"""Serve the same-host lane: exchanges over a Unix socket, with arrays in shared memory.

Each connection is a stream (stream.py). Only processes with the user id of the server may connect.
psproto/lanes.py describes the messages, regions.py the memory.
"""

from __future__ import annotations

import array
import asyncio
import errno
import mmap
import os
import secrets
import socket
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

import structlog

from psproto import codec, cudaipc, lanes
from psproto import ps_pb2 as pb
from psserver.errors import BadRequest, Refused
from psserver.flow import Head
from psserver.limits import Limits
from psserver.regions import GpuRegion, Regions
from psserver.security.budgets import Budget
from psserver.security.guard import Actor, Guard, Proof
from psserver.status import status_of
from psserver.stream import Streams
from psserver.turns import Client
from psserver.unusable import ConfigError

PIECE = 1 << 16  # maximum bytes that one call reads from a socket
MOST_FDS = 16  # maximum number of descriptors that wait for the message that names them
BACKLOG = 128  # connections that wait to be accepted
NO_DESCRIPTORS_SECONDS = 1.0  # pause after a connection for which there was no descriptor
ANCILLARY = socket.CMSG_SPACE(MOST_FDS * array.array("i").itemsize)
METHOD = "Lane"  # name under which failed requests are counted

log = structlog.get_logger()


class Gone(ConnectionError):
    """The connection was closed before a reply was sent."""


class Lanes:
    """The same-host lane of a server, from ``listen`` to ``close``. Must be used on the event loop.

    path   path of the Unix socket
    most   maximum total size of the memory that clients register, in bytes
    guard  decides which exchanges the policy allows

    regions  the memory that clients have registered

    Each credential gets its own token for the lane, so that the server knows who uses a connection.
    """

    def __init__(self, path: Path, most: int, guard: Guard) -> None:
        self.regions = Regions(most)
        self._offer = pb.Lane(path=str(path))
        self._guard = guard
        self._tokens: dict[Proof, bytes] = {}  # credential -> token
        self._proofs: dict[bytes, Proof] = {}  # the reverse
        self.path = path
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def use_gpu(self) -> None:
        """Let clients register memory of the first GPU that this process sees; call it before
        ``open``. If CUDA cannot tell its id, they cannot.
        """
        try:
            self.regions.gpu = cudaipc.gpu()
        except cudaipc.CudaError as error:
            log.warning("clients cannot share GPU memory with this server", error=str(error))
        else:
            self._offer.gpu = self.regions.gpu.uuid

    def offer_to(self, proof: Proof) -> pb.Lane:
        """Return what GetServerInfo tells a client about the lane.

        proof  credential of the client; NOBODY without a policy
        """
        token = self._tokens.get(proof)
        if token is None:
            token = self._tokens[proof] = secrets.token_bytes(16)
            self._proofs[token] = proof
        return pb.Lane(path=self._offer.path, token=token, gpu=self._offer.gpu)

    def actor_of(self, token: bytes, peer: str) -> Actor:
        """Return who uses a connection whose first message has ``token``.

        Raises BadRequest for a token that was not given out, and Unauthenticated if the credential
        of its client was revoked.
        """
        proof = self._proofs.get(token)
        if proof is None:
            raise BadRequest(
                "LANE_REFUSED",
                "the first message must have the token of the lane that GetServerInfo returns; the"
                " server there may be a different one",
            )
        return self._guard.of_lane(proof, peer)

    @property
    def clients(self) -> int:
        """Number of connected clients."""
        return len(self._tasks)

    def listen(self) -> None:
        """Create the socket. Raises ConfigError if its path cannot be used."""
        self._loop = asyncio.get_running_loop()
        try:
            self._listener = _listen(self.path)
        except OSError as error:
            raise ConfigError(f"lane: cannot listen on {self.path}: {error}") from error

    def open(self, streams: Streams, limits: Limits) -> None:
        """Serve the connections from now on, after ``listen``.

        streams  serves the connections
        limits   limits the number of connections, together with the calls in progress
        """
        assert self._listener is not None
        self._streams, self._limits = streams, limits
        self._loop.add_reader(self._listener.fileno(), self._accept)

    async def close(self, grace: float) -> None:
        """Close the socket, and end the connections that remain after ``grace`` seconds."""
        if self._listener is None:
            return
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        with suppress(OSError):
            self.path.unlink()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self) -> None:
        """Accept one connection, and serve it in a task."""
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._loop.remove_reader(self._listener.fileno())  # else it is called all the time
                self._loop.call_later(NO_DESCRIPTORS_SECONDS, self._listen_again)
            return  # or the client is gone already
        connection.setblocking(False)
        task = self._loop.create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _listen_again(self) -> None:
        """Accept connections again after a pause, unless the lane was closed meanwhile."""
        if self._listener is not None and self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    async def _serve(self, connection: socket.socket) -> None:
        """Serve one connection until its end."""
        began, watching = False, ExitStack()
        client = _Client(connection, self._loop, self, self._limits, watching)
        try:
            client.require_same_user()
            self._limits.begin_call()
            began = True
            with watching:
                broken = await self._streams.serve(client, METHOD)
            if broken is not None:
                await client.refuse(broken)
        except Refused as error:
            with suppress(OSError):
                await client.refuse(error)
        except OSError:
            pass
        finally:
            if began:
                self._limits.end_call()
            client.close()


class _Client:
    """A connection of the lane: the Caller of a stream.

    served    knows who uses the connection, and has the regions of all clients
    limits    count long messages that are not complete yet
    watching  ends the connection when the policy no longer allows what the client did
    """

    prompt, via = True, "shm"
    budget: Budget | None = None

    def __init__(
        self,
        connection: socket.socket,
        loop: asyncio.AbstractEventLoop,
        served: Lanes,
        limits: Limits,
        watching: ExitStack,
    ) -> None:
        self.client = Client()
        self._socket = connection
        self._fd = connection.fileno()
        self._loop = loop
        self._served = served
        self._regions = served.regions
        self._limits = limits
        self._watching = watching
        self._actor: Actor | None = None  # None: the client has not sent its token yet
        self._token = b""
        self._own: dict[int, mmap.mmap] = {}
        self._own_gpu: dict[int, GpuRegion] = {}
        self._received = bytearray()  # the beginning of a message that is not complete
        self._fds: list[int] = []  # descriptors that no message has named yet
        self._waiter: asyncio.Future[bytes] | None = None  # of the task that reads
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

    async def read(self) -> pb.LaneRequest | None:
        while True:
            message = await self._message()
            if message is None:
                return None
            request = lanes.parse(message)
            if self._actor is not None and not request.regions:
                return request
            try:
                self._register(request)
            except Refused as error:
                await self.write(self.encode(request.id, _status(error)))
                if self._actor is None:
                    return None
                continue
            if request.pushes or request.pulls:
                return request
            await self.write(self.encode(request.id, codec.Exchanged([], [])))

    async def write(self, data: bytes) -> None:
        message = lanes.framed(data)
        if self._unsent:
            self._unsent += message
        else:
            try:
                sent = self._socket.send(message)
            except BlockingIOError:
                sent = 0
            if sent == len(message):
                return
            self._unsent += message[sent:]
            self._sent = self._loop.create_future()
            self._loop.add_writer(self._fd, self._send_more)
        assert self._sent is not None
        await asyncio.shield(self._sent)

    def size(self, message: pb.LaneRequest) -> int:
        return int(message.ByteSize()) + lanes.request_bytes(message)

    def head(self, message: pb.LaneRequest) -> Head:
        return message

    def decode(
        self, message: pb.LaneRequest, budget: int
    ) -> tuple[pb.LaneRequest, codec.Exchange | Exception]:
        try:
            exchange = lanes.decode_request(message, self._own, budget, self._own_gpu)
        except lanes.BadSlice as error:
            return message, BadRequest("INVALID_ARGUMENT", str(error))
        assert self._actor is not None
        return message, self._actor.refusal(exchange) or exchange

    async def refuse(self, error: Exception) -> None:
        """Send an error that ends the connection."""
        await self.write(self.encode(0, _status(error)))

    # ---- registration

    def _register(self, request: pb.LaneRequest) -> None:
        """Check the token of the first message; map the regions of a message.

        Raises BadRequest, Unauthenticated or TooLarge.
        """
        if self._actor is None:
            self._actor = self._served.actor_of(request.token, f"unix:{self._served.path}")
            self._token = request.token
            self.budget = self._actor.budget
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

    async def _message(self) -> bytes | None:
        """Return the bytes of the next message; None at the end.

        Lets other connections be served first, if the message was there already. Raises Malformed;
        Overloaded if the message is long and there is no room for it.
        """
        message = await self._next()
        if not self._waited:
            await asyncio.sleep(0)
        self._waited = False
        return message

    async def _next(self) -> bytes | None:
        """Return the bytes of the next message; None at the end. ``_message`` has the errors."""
        received, reservation = self._received, None
        try:
            while True:
                if len(received) >= lanes.LENGTH.size:
                    (size,) = lanes.LENGTH.unpack_from(received)
                    if size > lanes.MOST_MESSAGE:
                        raise codec.Malformed(
                            f"a message must have at most {lanes.MOST_MESSAGE} bytes, got {size}"
                        )
                    end = lanes.LENGTH.size + size
                    if len(received) >= end:
                        message = bytes(received[lanes.LENGTH.size : end])
                        del received[:end]
                        return message
                    if size > PIECE and reservation is None:
                        reservation = self._limits.admit(size)
                data = await self._receive()
                if not data:
                    return None
                received += data
        finally:
            if reservation is not None:
                reservation.release()

    async def _receive(self) -> bytes:
        """Wait for bytes, and return them; b"" at the end of the connection."""
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
        """Pass received bytes to the task that waits for them. The loop calls this."""
        waiter = self._waiter
        if waiter is None or waiter.done():  # the task is busy: it will listen again
            self._loop.remove_reader(self._fd)
            self._listening = False
            return
        try:
            waiter.set_result(self._take())
        except BlockingIOError:
            pass
        except Exception as error:
            waiter.set_exception(error)

    def _take(self) -> bytes:
        """Return bytes that have arrived, and keep the descriptors that came with them.

        Raises BlockingIOError if none have. Raises Malformed if there are too many descriptors.
        """
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                PIECE, ANCILLARY, socket.MSG_CMSG_CLOEXEC
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
        return data

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


def _listen(path: Path) -> socket.socket:
    """Return a socket that listens at ``path``, which only this user can open.

    Removes the socket file of a server that was killed. Raises OSError.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        with lanes.reachable(path) as short:
            with suppress(FileNotFoundError):
                if not stat.S_ISSOCK(os.lstat(path).st_mode):
                    raise FileExistsError(f"{path} exists, and is not a socket")
                _require_unused(short)
                path.unlink()
            listener.bind(short)
        path.chmod(0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _require_unused(path: str) -> None:
    """Raise OSError if another server listens at ``path``."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0)  # a server that hangs may have no room for another connection
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            pass
    raise FileExistsError("another server listens there")
