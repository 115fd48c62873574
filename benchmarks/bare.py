"""A gRPC server that answers the requests of a flood at once, and does nothing for them.

It answers with as many bytes as a shard, so it shows what gRPC alone takes. overload.py starts it:
python -m benchmarks.bare PORT
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
import uvloop

from benchmarks.flood import ANSWERED, DIM, OPTIONS, STREAM
from psproto import ps_pb2 as pb
from psproto.encoding import varint
from psserver.eventloop import Loop

ROWS = 1000  # rows in an answer


async def _stream(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    rows = bytes(4 * DIM * ROWS)
    rest = ANSWERED + varint(len(rows)) + rows
    while (data := await context.read()) is not grpc.aio.EOF:
        request: bytes = data
        head = pb.StreamRequestHeader.FromString(request[2 : 2 + request[1]])
        await context.write(b"\x08" + varint(head.id) + rest)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(_stream) if details.method == STREAM else None


async def _serve(port: int) -> None:
    server = grpc.aio.server(options=OPTIONS[1:])
    server.add_generic_rpc_handlers([_Handlers()])
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])), loop_factory=Loop)
