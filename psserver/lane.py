"""Serve the same-host lane: exchanges over a Unix socket, with arrays in shared memory.

Each connection (laneconnection.py) is a stream (stream.py). Only processes with the user id of the
server may connect. psproto/lanes.py describes the messages, regions.py the memory.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

import structlog

from psproto import cudaipc, lanes
from psproto import ps_pb2 as pb
from psserver.errors import BadRequest, Refused, Unauthenticated
from psserver.laneconnection import PIECE, Connection
from psserver.limits import Limits
from psserver.regions import Regions
from psserver.security.guard import Actor, Guard, Proof
from psserver.stream import Streams
from psserver.unusable import ConfigError

BACKLOG = 128  # connections that wait to be accepted
NO_DESCRIPTORS_SECONDS = 1.0  # pause after a connection for which there was no descriptor
METHOD = "Lane"  # name under which failed requests are counted

log = structlog.get_logger()


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
        self._buffer = memoryview(bytearray(PIECE))

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
            self._forget_revoked()
            token = self._tokens[proof] = secrets.token_bytes(16)
            self._proofs[token] = proof
        return pb.Lane(path=self._offer.path, token=token, gpu=self._offer.gpu)

    def actor_of(self, token: bytes) -> Actor:
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
        try:
            return self._guard.of_lane(proof, f"unix:{self.path}")
        except Unauthenticated:
            self._forget(proof)
            raise

    def _forget_revoked(self) -> None:
        """Forget the tokens of credentials that the policy no longer accepts."""
        for proof in [each for each in self._tokens if not self._guard.knows(each)]:
            self._forget(proof)

    def _forget(self, proof: Proof) -> None:
        """Forget the token of one credential, so that it opens no connection any more."""
        self._proofs.pop(self._tokens.pop(proof, b""), None)

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
        client = Connection(
            connection,
            self._loop,
            self.actor_of,
            self.regions,
            self._limits,
            watching,
            self._buffer,
        )
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
