"""The process that lives in the node's network: it serves DNS and sends probes to pods.

    python -m tests.deploy.simulator.node ADDRESS

Reads one JSON object per line from standard input:

    {"names": {NAME: [ADDRESS, ...]}}                 answer queries from these names from now on
    {"ask": KEY, "address": ADDRESS, "probe": {...}}  send a probe, given as in a manifest

Writes {"key": KEY, "good": BOOL} after each probe, and {"key": "listening"} at the start.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.simulator.names import Names

Probe = dict[str, Any]


async def is_good(address: str, probe: Probe) -> bool:
    """Send one probe. An error, or no answer within its timeout, is a bad result."""
    try:
        async with asyncio.timeout(probe.get("timeoutSeconds", 1)):
            if "grpc" in probe:
                return await _grpc(f"{address}:{probe['grpc']['port']}", probe["grpc"])
            if "httpGet" in probe:
                return await _http(address, probe["httpGet"])
            if "tcpSocket" in probe:
                _, writer = await asyncio.open_connection(address, probe["tcpSocket"]["port"])
                writer.close()
                return True
    except (grpc.RpcError, OSError, TimeoutError, ValueError):
        return False
    raise NotImplementedError(f"the simulator has no probe {sorted(probe)}")


async def _grpc(target: str, fields: Probe) -> bool:
    request = health_pb2.HealthCheckRequest(service=fields.get("service", ""))
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(request)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def _http(address: str, fields: Probe) -> bool:
    reader, writer = await asyncio.open_connection(address, fields["port"])
    writer.write(f"GET {fields.get('path', '/')} HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
    words = (await reader.readline()).split()
    writer.close()
    return 200 <= int(words[1]) < 400 if len(words) > 1 else False


def _tell(key: str, good: bool) -> None:
    print(json.dumps({"key": key, "good": good}), flush=True)


async def serve(address: str) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    _, names = await loop.create_datagram_endpoint(Names, local_addr=(address, 53))
    lines = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    _tell("listening", True)
    running = set[asyncio.Task[None]]()

    async def probe(order: Probe) -> None:
        _tell(order["ask"], await is_good(order["address"], order["probe"]))

    async for line in lines:
        order = json.loads(line)
        if "names" in order:
            names.names = order["names"]
        else:
            task = asyncio.create_task(probe(order))
            running.add(task)
            task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
