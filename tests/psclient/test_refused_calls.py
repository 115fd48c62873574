"""Whether a client repeats a request that the server refuses for now is the caller's choice."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from fakes import info

from psclient import Client
from psclient.errors import ResourceExhausted, Unavailable
from psproto import ps_pb2 as pb

CODES = {8: (ResourceExhausted, "OVERLOADED"), 14: (Unavailable, "STARTING")}


def refusal(code: int) -> pb.Status:
    """Return a status in which the server asks for another attempt after 40 ms."""
    status = pb.Status(code=code, message="not now")
    retry, why = pb.RetryInfo(), pb.ErrorInfo(reason=CODES[code][1])
    retry.retry_delay.nanos = 40_000_000
    for name, detail in (("RetryInfo", retry), ("ErrorInfo", why)):
        url = f"type.googleapis.com/google.rpc.{name}"
        status.details.add(type_url=url, value=detail.SerializeToString())
    return status


class Refusing(grpc.GenericRpcHandler):
    """Refuses every exchange of rows, over a stream or as a unary call, and counts them."""

    def __init__(self, code: int) -> None:
        self.status, self.calls = refusal(code), 0

    def service(self, details: Any) -> Any:
        if details.method.endswith("/GetServerInfo"):
            return grpc.unary_unary_rpc_method_handler(lambda _, __: info())
        if details.method.endswith("/Stream"):
            return grpc.stream_stream_rpc_method_handler(self.stream)
        return grpc.unary_unary_rpc_method_handler(self.unary)

    def unary(self, _: bytes, context: Any) -> bytes:
        self.calls += 1
        details = self.status.SerializeToString()
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        code = next(each for each in grpc.StatusCode if each.value[0] == self.status.code)
        context.abort(code, self.status.message)
        raise AssertionError

    def stream(self, requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
        for each in requests:
            self.calls += 1
            id = pb.StreamRequest.FromString(each).header.id
            yield pb.StreamResponse(id=id, error=self.status).SerializeToString()


@contextmanager
def served(handler: Refusing) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("transport", ["stream", "unary"])
@pytest.mark.parametrize("code", CODES)
def test_a_client_that_does_not_repeat_raises_the_first_refusal(code: int, transport: Any) -> None:
    handler = Refusing(code)
    kind, reason = CODES[code]
    with (
        served(handler) as address,
        Client([address], transport=transport, retry_refused=False, timeout=30.0) as client,
    ):
        client._dims["t"] = 2
        calls = (
            lambda: client.pull({"t": [1]}),
            lambda: client.push({"t": ([1], np.ones((1, 2), np.float32))}),
            lambda: client.start_pull({"t": [1]}).result(),
        )
        for count, call in enumerate(calls, 1):
            with pytest.raises(kind, match="not now") as caught:
                call()
            assert (caught.value.reason, caught.value.retry_after) == (reason, 0.04)
            assert handler.calls == count


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_other_clients_repeat_until_their_timeout(transport: Any) -> None:
    handler = Refusing(8)
    with (
        served(handler) as address,
        Client([address], transport=transport, timeout=2.0) as client,
    ):
        client._dims["t"] = 2
        with pytest.raises(ResourceExhausted, match="not now"):
            client.pull({"t": [1]})
    assert handler.calls > 2


def test_the_choice_is_pickled() -> None:
    client = Client(["127.0.0.1:1"], retry_refused=False)
    assert pickle.loads(pickle.dumps(client))._retry_refused is False  # noqa: S301
