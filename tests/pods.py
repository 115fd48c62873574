"""Servers that only answer GetServerInfo, at 127.0.0.x, and the DNS name that leads to them."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from psproto import ps_pb2 as pb
from psproto import routing
from psserver.errors import Refused
from psserver.status import code_of, status_of


def info(shard: int, shards: int, *, cluster: str = "", start: int = 0, advertise: str = "") -> Any:
    """The answer of a shard; ``start`` is a number of its own by default."""
    table = routing.even_map(shards).shard_of_bucket.astype("<u2").tobytes()
    return pb.GetServerInfoResponse(
        shard=shard,
        shard_map=pb.ShardMap(epoch=1, shards=shards, shard_of_bucket=table),
        limits=pb.Limits(message_bytes=1 << 20, keys=1000),
        cluster=cluster,
        start=start or hash((shard, shards, cluster)) % (1 << 62) + 1,
        advertise=advertise,
    )


class Pod(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A server at host:port that answers with ``says``: a message, its bytes, or an error.

    Calls wait while ``may_answer`` is not set.
    """

    def __init__(self, host: str, port: int, says: Any) -> None:
        self.says = says
        self.asked = 0
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.address = f"{host}:{port}"
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(self.address)
        self._server.start()

    def service(self, _: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        self.asked += 1
        self.may_answer.wait(20)
        if isinstance(self.says, Refused):
            status = status_of(self.says)
            context.set_trailing_metadata(
                (("grpc-status-details-bin", status.SerializeToString()),)
            )
            context.abort(code_of(status), status.message)
        if isinstance(self.says, bytes):
            return self.says
        return self.says.SerializeToString()  # type: ignore[no-any-return]

    def stop(self) -> None:
        self._server.stop(0).wait()


def no_such_name() -> OSError:
    """The error of a look-up of a name that does not exist."""
    return socket.gaierror(socket.EAI_NONAME, "Name or service not known")
