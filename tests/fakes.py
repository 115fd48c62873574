"""A server that answers as a test says, for what real servers do rarely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from psproto import ps_pb2 as pb
from psproto import routing

Method = Callable[[bytes, Any], bytes]
Stream = Callable[[bytes, Any], Iterator[bytes]]


def info(shards: int = 1) -> bytes:
    """The answer to GetServerInfo of shard 0."""
    table = routing.even_map(shards).shard_of_bucket.astype("<u2").tobytes()
    return pb.GetServerInfoResponse(
        shard_map=pb.ShardMap(epoch=1, shards=shards, shard_of_bucket=table),
        limits=pb.Limits(message_bytes=1 << 24, keys=1 << 20),
    ).SerializeToString()


@contextmanager
def fake_server(
    methods: dict[str, Method],
    threads: int = 64,
    streams: dict[str, Stream] | None = None,
    port: int = 0,
) -> Iterator[str]:
    """Serve methods ("TableService/Evict"); yields the address.

    methods  answer one reply
    streams  answer several replies
    port     where to listen; 0: a free port
    """
    known: dict[str, Method] = {"InfoService/GetServerInfo": lambda _, __: info(), **methods}

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            name = details.method.removeprefix("/ps.v1.")
            if streams is not None and name in streams:
                return grpc.unary_stream_rpc_method_handler(streams[name])
            method = known.get(name)
            return None if method is None else grpc.unary_unary_rpc_method_handler(method)

    server = grpc.server(ThreadPoolExecutor(threads), handlers=[Handler()])
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
