"""A server with a policy in this process, on a thread, and everything that its clients can call.

The server records which methods its handlers reach, and ``state`` has all that a call could change.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from servers import eventually, free_ports

from psproto import codec
from psproto import ps_pb2 as pb
from psserver import service as service_module
from psserver.config import load
from psserver.handlers import Handlers, method_of
from psserver.security.policyfile import PolicyFile
from psserver.security.verbs import METHODS
from psserver.server import Server
from psserver.workers import LONG

Metadata = Sequence[tuple[str, str]]
ID = "00112233445566%02x"
KEYS = np.arange(100, dtype=np.uint64)


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def section(name: str, *grants: tuple[Sequence[str], Sequence[str]], **fields: Any) -> str:
    """The section of a principal whose token is its name.

    grants  (verbs, patterns of tables) each
    """
    rights = ", ".join(
        f"{{ verbs = {list(verbs)}, tables = {list(tables)} }}" for verbs, tables in grants
    )
    lines = [f"[principals.{name}]", f'tokens = ["{digest(name)}"]', f"grants = [{rights}]"]
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in fields.items())]) + "\n"


@dataclass(frozen=True)
class Method:
    """A method of a service, as reflection describes it."""

    path: str
    requests: bool  # a stream of requests
    replies: bool  # a stream of replies


def enumerated(channel: grpc.Channel, metadata: Metadata) -> list[Method]:
    """Every method of every service that a server has, by reflection."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest

    def reply(request: Any) -> Any:
        return next(iter(stub.ServerReflectionInfo(iter([request]), metadata=metadata)))

    found = []
    for service in reply(ask(list_services="")).list_services_response.service:
        answer = reply(ask(file_containing_symbol=service.name))
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = FileDescriptorProto.FromString(data)
            for each in file.service:
                if f"{file.package}.{each.name}" == service.name:
                    found += [
                        Method(
                            f"/{service.name}/{one.name}",
                            one.client_streaming,
                            one.server_streaming,
                        )
                        for one in each.method
                    ]
    return found


class Recording(Handlers):
    """Handlers that record which methods they reach.

    gate  while it is not set, operations that send many messages pause before the second
    made  number of messages that these operations have made
    """

    reached: ClassVar[list[str]] = []
    gate: ClassVar[threading.Event] = threading.Event()
    made: ClassVar[int] = 0

    def _seen(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any) -> Any:
            self.reached.append(name)
            return method(*args)

        return seen

    def unary(self, name: str, method: Any, **more: Any) -> Any:
        direct = name in ("Pull", "Push", "Exchange", "Delete", "WriteRows")
        return super().unary(name, self._seen(name, method) if direct else method, **more)

    def message(self, kind: Any, method: Any, **more: Any) -> Any:
        return super().message(kind, self._seen(method_of(kind), method), **more)

    def blocking(self, kind: Any, method: Any, *pool: Any, **more: Any) -> Any:
        return super().blocking(kind, self._seen(method_of(kind), method), *pool, **more)

    def long(self, kind: Any, method: Any) -> Any:
        return super().long(kind, self._seen(method_of(kind), method))

    def many(self, kind: Any, method: Any) -> Any:
        def gated(request: Any) -> Iterator[Any]:
            for message in method(request):
                Recording.made += 1
                yield message
                self.gate.wait(60)

        return super().many(kind, self._seen(method_of(kind), gated))

    def guarded(self, name: str, call: Any) -> Any:
        direct = name in ("Stream", "Subscribe")
        return super().guarded(name, self._seen(name, call) if direct else call)


class Secured:
    """A server of one shard with a policy file, from ``start`` to ``stop``."""

    def __init__(self, directory: Path, policy: str, *flags: str) -> None:
        self.directory = directory
        self.policy = directory / "policy.toml"
        self.audit = directory / "audit.jsonl"
        self.data = directory / "data"
        self.port = free_ports(1)
        self.address = f"127.0.0.1:{self.port}"
        self.restarted = threading.Event()  # set when the process would start again
        self.data.mkdir()
        self.write(policy)
        self._flags = [
            *("--port", str(self.port), "--metrics-port", "0", "--data-dir", str(self.data)),
            *("--policy-file", str(self.policy), "--audit-file", str(self.audit)),
            *("--checkpoint-url", f"file://{directory}/checkpoints", "--flush-seconds", "3600"),
            *("--segment-bytes", str(1 << 20)),
            *flags,
        ]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> Secured:
        self._thread.start()
        Recording.gate.set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service_module, "Handlers", Recording)
            patch.setattr(PolicyFile, "look_seconds", 0.05)
            self.server = Server(load(self._flags), self.restarted.set)
            self.run(self.server.listen())
            self.run(self.server.open())
        return self

    def stop(self) -> None:
        self.run(self.server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def settle(self) -> None:
        """Wait until no long operation runs: one that has lost its client ends a bit later, and
        keeps its checkpoint in use until then.
        """
        eventually(lambda: self.server._service._workers._slots == LONG)

    def checkpoint(self, name: str) -> None:
        """Take a checkpoint, without a call."""
        checkpoints = self.server._service._checkpoints
        request = pb.WriteCheckpointRequest(name=name, attempt=ID % 0)
        done = checkpoints.write(request, checkpoints.work.progress())
        checkpoints.completion.complete(
            pb.CompleteCheckpointRequest(name=name, attempt=ID % 0, parts=[done.part])
        )

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the audit log."""
        return [json.loads(line) for line in self.audit.read_text().splitlines()]

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)])

    def write(self, policy: str) -> None:
        """Replace the policy file, as one does: by a rename."""
        new = self.policy.with_suffix(".new")
        new.write_text(policy)
        new.rename(self.policy)

    def change(self, policy: str) -> None:
        """Replace the policy file, and wait until the server has taken it."""
        guard = self.server._guard
        if policy == self.policy.read_text():
            return
        before = guard._policy
        self.write(policy)
        eventually(lambda: guard._policy is not before)

    def state(self) -> tuple[Any, ...]:
        """Everything that a call could change: versions, tables, rows, and bytes on disk."""
        shard, data = self.server._shard, self.server._data
        assert data is not None
        eventually(lambda: data.log.durable == shard.version)
        return (
            shard.version,
            {name: shard.rows(name) for name in shard.tables()},
            dict(contents(self.data)),
            dict(contents(self.directory / "checkpoints")),
        )


def contents(directory: Path) -> Iterator[tuple[str, str]]:
    """The digest of each file below a directory, without lock files, which readers change."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != "lock.mdb":
            yield str(path), hashlib.sha256(path.read_bytes()).hexdigest()


def schema(name: str, dim: int = 4) -> pb.TableSchema:
    rule = pb.Rule(name="sgd", parameters={"lr": 1.0})
    return pb.TableSchema(name=name, dim=dim, optimizer=rule, initializer=pb.Rule(name="zeros"))


def pull(table: str) -> codec.PullMessage:
    return codec.PullMessage(pb.PullHeader(table=table), KEYS)


def push(table: str) -> codec.PushMessage:
    gradients = np.ones((len(KEYS), 4), np.float32)
    return codec.PushMessage(pb.PushHeader(table=table, step=1), KEYS, None, gradients)


def exchange(*tables: str) -> codec.Exchange:
    return codec.Exchange([push(table) for table in tables], [pull(table) for table in tables])


def streamed(id: int, *tables: str) -> bytes:
    """An encoded StreamRequest that pushes to tables and pulls from them."""
    return bytes(codec.encode_stream_request(pb.StreamRequestHeader(id=id), exchange(*tables)))


def requests(table: str) -> dict[str, bytes]:
    """Short name of a method -> an encoded request with which it would act on a table."""
    parsed = {
        "CreateTable": pb.CreateTableRequest(schema=schema(f"{table}.new")),
        "DescribeTable": pb.DescribeTableRequest(name=table),
        "ListTables": pb.ListTablesRequest(),
        "AlterTable": pb.AlterTableRequest(
            schema=pb.TableSchema(name=table, serving_default=2.0), fields=["serving_default"]
        ),
        "DropTable": pb.DropTableRequest(name=table),
        "Evict": pb.EvictRequest(table=table),
        "WaitDurable": pb.WaitDurableRequest(),
        "Barrier": pb.BarrierRequest(name="mark"),
        "Subscribe": pb.SubscribeRequest(tables=[table]),
        "WriteCheckpoint": pb.WriteCheckpointRequest(name="later", attempt=ID % 1),
        "CompleteCheckpoint": pb.CompleteCheckpointRequest(name="later", attempt=ID % 1),
        "ListCheckpoints": pb.ListCheckpointsRequest(),
        "VerifyCheckpoint": pb.VerifyCheckpointRequest(name="first"),
        "PrepareRestore": pb.PrepareRestoreRequest(name="first", id=ID % 2, replace=True),
        "Restore": pb.RestoreRequest(id=ID % 9, step=pb.RestoreRequest.STEP_HOLD, owner=ID % 3),
        "LoadTable": pb.LoadTableRequest(
            name="first", table=table, into=table, id=ID % 4, replace=True
        ),
        "DeleteCheckpoints": pb.DeleteCheckpointsRequest(names=["first"], id=ID % 5),
        "Continue": pb.ContinueRequest(id=ID % 4, step=pb.ContinueRequest.STEP_START),
        "ReadRows": pb.ReadRowsRequest(table=table),
        "Analyze": pb.AnalyzeRequest(table=table),
        "Inspect": pb.InspectRequest(table=table, keys=KEYS.tobytes()),
        "VerifyRows": pb.VerifyRowsRequest(table=table),
        "GetServerInfo": pb.GetServerInfoRequest(),
        "GetStatus": pb.GetStatusRequest(),
        "Diagnose": pb.DiagnoseRequest(),
        "WriteRows": pb.WriteRowsRequest(
            table=table, width=4, keys=KEYS.tobytes(), rows=bytes(16 * len(KEYS))
        ),
        "ServerReflectionInfo": reflection_pb2.ServerReflectionRequest(list_services=""),
    }
    return {name: bytes(each.SerializeToString()) for name, each in parsed.items()} | {
        "Pull": bytes(codec.encode_pull(pull(table))),
        "Push": bytes(codec.encode_push(push(table))),
        "Exchange": bytes(codec.encode_exchange(exchange(table))),
        "Stream": streamed(1, table),
        "Delete": bytes(codec.encode_delete(pb.PushHeader(table=table), KEYS)),
        "Check": b"",
        "List": b"",
        "Watch": b"",
    }


def call(channel: grpc.Channel, method: Method, data: bytes, metadata: Metadata = ()) -> Any:
    """Make a call, and return its first reply. Raises grpc.RpcError."""
    if method.requests:
        stream = channel.stream_stream(method.path)
        return next(stream(iter([data]), metadata=metadata, timeout=60))
    if method.replies:
        return next(channel.unary_stream(method.path)(data, metadata=metadata, timeout=60))
    return channel.unary_unary(method.path)(data, metadata=metadata, timeout=60)


def outcome(channel: grpc.Channel, method: Method, data: bytes, metadata: Metadata = ()) -> str:
    """Make a call, and return "OK" or the name of its status code.

    On a stream it is that of the first reply.
    """
    try:
        reply = call(channel, method, data, metadata)
    except grpc.RpcError as error:
        return str(error.code().name)
    if method.path.endswith("/Stream"):
        _, answer = codec.decode_stream_response(reply)
        if isinstance(answer, pb.Status):
            return next(code.name for code in grpc.StatusCode if code.value[0] == answer.code)
    return "OK"


REPLIES = (  # short names of the methods that send many replies
    *("Stream", "Subscribe", "Watch", "ServerReflectionInfo"),
    *("WriteCheckpoint", "VerifyCheckpoint", "PrepareRestore", "LoadTable", "DeleteCheckpoints"),
    *("ReadRows", "Analyze", "VerifyRows"),
)
METHOD = {  # short name -> method, for the tests that do not ask the server
    path.rpartition("/")[2]: Method(
        path,
        requests=path.endswith(("/Stream", "/ServerReflectionInfo")),
        replies=path.rpartition("/")[2] in REPLIES,
    )
    for path in METHODS
}


def create(channel: grpc.Channel, table: str, metadata: Metadata) -> None:
    """Create a table, and push rows to it."""
    made = bytes(pb.CreateTableRequest(schema=schema(table)).SerializeToString())
    call(channel, METHOD["CreateTable"], made, metadata)
    call(channel, METHOD["Push"], requests(table)["Push"], metadata)
