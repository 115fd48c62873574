"""A client of the same-host lane that sends what it is told to, right or wrong."""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
from ctypes import CDLL, c_long
from typing import Any, Self

import numpy as np

from psclient import Client
from psproto import lanes
from psproto import ps_pb2 as pb

SIZE = 1 << 20
KEEP_SIZE = 1  # flag of fallocate: the size of the file stays
INFO = "/ps.v1.InfoService/GetServerInfo"


def offer_of(client: Client, shard: int = 0) -> pb.Lane:
    """Return the lane that a shard offers."""
    link = client._connect().links[shard]
    return pb.GetServerInfoResponse.FromString(link.channel.call(INFO, b"", 20.0)).lane


def mapped(pid: int) -> int:
    """Return the number of regions of lanes that a process has mapped."""
    with open(f"/proc/{pid}/maps") as maps:
        return sum("memfd:ps-lane" in line for line in maps)


def reason(reply: pb.StreamResponse) -> str:
    """Return the reason of an error; "" for a success."""
    if not reply.HasField("error"):
        return ""
    return pb.ErrorInfo.FromString(reply.error.details[0].value).reason


class Memory:
    """Memory to register, valid unless it is told otherwise.

    size    bytes of the file
    claimed  size in the header; None: the true one
    holes   leave a hole in the file
    beyond  leave a hole in the file, and allocate as much memory after its end
    """

    def __init__(
        self,
        token: bytes,
        *,
        size: int = SIZE,
        seals: int = fcntl.F_SEAL_SHRINK,
        magic: bytes = lanes.MAGIC,
        claimed: int | None = None,
        holes: bool = False,
        beyond: bool = False,
    ) -> None:
        self.size = size
        self.fd = os.memfd_create("ps-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        if beyond:
            allocate = CDLL(None).fallocate
            assert allocate(self.fd, KEEP_SIZE, c_long(size), c_long(size)) == 0
        elif not holes:
            os.posix_fallocate(self.fd, 0, size)
        self.memory = mmap.mmap(self.fd, size)
        header = lanes.HEADER.pack(magic, size if claimed is None else claimed, token)
        self.memory[: len(header)] = header
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def put(self, at: int, values: np.ndarray) -> None:
        np.frombuffer(self.memory, values.dtype, values.size, at)[:] = values.reshape(-1)

    def get(self, at: int, count: int) -> np.ndarray:
        return np.frombuffer(self.memory, np.float32, count, at).copy()

    def close(self) -> None:
        os.close(self.fd)


class RawLane:
    """A connection to a lane."""

    def __init__(self, path: str, token: bytes | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        if token is not None:
            reply = self.ask(pb.LaneRequest(id=1, token=token))
            assert reason(reply) == "", reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.socket.sendmsg([data], rights)
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def receive(self) -> pb.StreamResponse | None:
        """Return the next reply; None if the server closed the connection."""
        data = b""
        try:
            while len(data) < 4 or len(data) < 4 + lanes.LENGTH.unpack_from(data)[0]:
                piece = self.socket.recv(1 << 16)
                if not piece:
                    return None
                data += piece
        except ConnectionError:
            return None
        return lanes.decode_response(data[4:])

    def ask(self, request: Any, fds: tuple[int, ...] = ()) -> pb.StreamResponse:
        """Send a request, and return the reply."""
        self.send(lanes.framed(request.SerializeToString()), fds)
        reply = self.receive()
        assert reply is not None, "the server closed the connection"
        return reply

    def register(self, memory: Memory, number: int = 0, **fields: Any) -> pb.StreamResponse:
        """Register memory. ``fields`` replace those of the LaneRegion."""
        region = {"region": number, "kind": pb.LANE_KIND_MEMFD, "size": memory.size, **fields}
        return self.ask(pb.LaneRequest(id=7, regions=[pb.LaneRegion(**region)]), (memory.fd,))


def push(
    table: str, n: int, dim: int, *, region: int = 0, at: int = 64, step: int = 0
) -> pb.LanePush:
    """A push whose keys are at ``at`` in a region, and the gradients after them."""
    return pb.LanePush(
        header=pb.PushHeader(table=table, step=step),
        keys=pb.Slice(region=region, offset=at, size=8 * n),
        gradients=pb.Slice(region=region, offset=at + 8 * n, size=4 * n * dim),
    )


def pull(table: str, n: int, dim: int, *, region: int = 0, at: int, room: int) -> pb.LanePull:
    """A pull whose keys are at ``at`` in a region, and its room at ``room``."""
    return pb.LanePull(
        header=pb.PullHeader(table=table),
        keys=pb.Slice(region=region, offset=at, size=8 * n),
        room=pb.Slice(region=region, offset=room, size=4 * n * dim),
    )
