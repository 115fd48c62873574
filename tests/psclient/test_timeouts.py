"""No call outlasts its timeout, whatever others do; calls that a server cancels are made again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from alone import alone
from fakes import fake_server
from numpy.testing import assert_array_equal
from servers import Cluster, free_ports
from tables import summing

from psclient import Client, PsError
from psclient.aio import THREADS, AsyncClient
from psclient.connection import started
from psclient.errors import DeadlineExceeded, InvalidArgument, ServerFailure, Unavailable
from psproto import codec
from psproto import ps_pb2 as pb


def described(_: bytes, __: Any) -> bytes:
    schema = pb.TableSchema(name="t", dim=1, durability=pb.DURABILITY_LOG)
    return pb.DescribeTableResponse(schema=schema).SerializeToString()


def exchanged(_: bytes, __: Any) -> bytes:
    return codec.encode_exchanged(codec.Exchanged([pb.PushResponse(version=1)], []))


class Stuck:
    """A method that answers once the test ends."""

    def __init__(self) -> None:
        self.calls = 0
        self.end = threading.Event()

    def __call__(self, _: bytes, __: Any) -> bytes:
        self.calls += 1
        self.end.wait(60)
        return b""


def seconds(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


class TestLongCalls:
    def test_calls_that_take_an_hour_keep_no_other_one_waiting(self) -> None:
        stuck = Stuck()
        methods = {"TableService/Evict": stuck, "TableService/DescribeTable": described}
        with fake_server(methods) as address, Client([address], timeout=3.0) as client:
            threads = [
                threading.Thread(target=client.evict, args=("t",), kwargs={"timeout": 60.0})
                for _ in range(8)
            ]
            for thread in threads:
                thread.start()
            while stuck.calls < 8:
                time.sleep(0.01)
            for _ in range(3):
                assert seconds(lambda: client.describe_table("t")) < 2
            stuck.end.set()
            for thread in threads:
                thread.join(20)

    def test_nor_do_those_of_an_asyncio_client(self) -> None:
        stuck = Stuck()
        methods = {"TableService/Evict": stuck, "TableService/DescribeTable": described}

        async def work(address: str) -> None:
            async with AsyncClient([address], timeout=5.0) as client:
                await client.describe_table("t")
                evicting = [
                    asyncio.create_task(client.evict("t", timeout=60.0)) for _ in range(THREADS + 2)
                ]
                while stuck.calls < len(evicting):
                    await asyncio.sleep(0.01)
                await asyncio.wait_for(client.describe_table("t"), 3)
                stuck.end.set()
                await asyncio.gather(*evicting)

        with fake_server(methods) as address:
            asyncio.run(work(address))

    def test_a_wait_for_a_free_thread_is_part_of_the_timeout(self) -> None:
        stuck = Stuck()

        async def work(address: str) -> None:
            async with AsyncClient([address], timeout=1.0) as client:
                begun = time.monotonic()
                calls = [client.describe_table("t") for _ in range(3 * THREADS)]
                results = await asyncio.gather(*calls, return_exceptions=True)
                assert time.monotonic() - begun < 3
                assert {type(result) for result in results} == {DeadlineExceeded}
                stuck.end.set()

        with fake_server({"TableService/DescribeTable": stuck}) as address:
            asyncio.run(work(address))

    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", 1e300])
    def test_a_timeout_that_is_none_is_refused(self, timeout: Any) -> None:
        client = Client(["127.0.0.1:1"])
        with pytest.raises(InvalidArgument, match="timeout must be "):
            client.evict("t", timeout=timeout)

    @pytest.mark.slow
    @alone
    def test_all_parts_of_an_operation_share_its_timeout(self) -> None:
        """Connecting, asking for the dim, and the request itself."""

        def slow(data: bytes, context: Any) -> bytes:
            time.sleep(0.6)
            return described(data, context)

        stuck = Stuck()
        methods = {"TableService/DescribeTable": slow, "RowService/Exchange": stuck}
        with (
            fake_server(methods) as address,
            Client([address], timeout=1.0, transport="unary") as client,
        ):
            client.batch([1])  # loads the kernels
            begun = time.monotonic()
            with pytest.raises(PsError):
                client.pull({"t": [1]})
            assert 0.9 < time.monotonic() - begun < 1.5
            stuck.end.set()

    def test_threads_that_wait_for_another_one_to_connect_have_their_own_timeout(self) -> None:
        client = Client(["127.0.0.1:1"], timeout=0.5)
        with client._connecting:
            errors: list[PsError] = []

            def pull() -> None:
                try:
                    client.pull({"t": [1]})
                except PsError as error:
                    errors.append(error)

            thread = threading.Thread(target=pull)
            assert seconds(lambda: (thread.start(), thread.join(10))) < 2
        assert [type(error) for error in errors] == [DeadlineExceeded]

    @pytest.mark.slow
    @alone
    def test_a_request_to_wait_longer_than_the_timeout_is_not_obeyed(self) -> None:
        def refuse(_: bytes, context: Any) -> bytes:
            retry = pb.RetryInfo()
            retry.retry_delay.seconds = 30
            status = pb.Status(code=8, message="busy")
            detail = status.details.add()
            detail.type_url = "type.googleapis.com/google.rpc.RetryInfo"
            detail.value = retry.SerializeToString()
            context.set_trailing_metadata(
                (("grpc-status-details-bin", status.SerializeToString()),)
            )
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
            raise AssertionError

        methods = {"TableService/DescribeTable": refuse, "RowService/Exchange": refuse}
        with (
            fake_server(methods) as address,
            Client([address], timeout=1.0, transport="unary") as client,
        ):
            client._dims["u"] = 1
            for call in (lambda: client.describe_table("t"), lambda: client.pull({"u": [1]})):
                begun = time.monotonic()
                with pytest.raises(PsError, match="busy"):
                    call()
                assert time.monotonic() - begun < 15

    @pytest.mark.slow
    @alone
    def test_an_operation_may_have_begun_before(self) -> None:
        client = Client(["127.0.0.1:1"], timeout=5.0)
        token = started.set(time.monotonic() - 4.8)
        try:
            begun = time.monotonic()
            with pytest.raises(Unavailable):
                client.list_tables()
            assert time.monotonic() - begun < 3
        finally:
            started.reset(token)


class Cancelling:
    """Answers CANCELLED without details, some times, as gRPC does above its limits."""

    def __init__(self, times: int, answer: Callable[[bytes, Any], bytes]) -> None:
        self.left = times
        self.answer = answer

    def __call__(self, data: bytes, context: Any) -> bytes:
        self.left -= 1
        if self.left >= 0:
            context.abort(grpc.StatusCode.CANCELLED, "")
        return self.answer(data, context)


class TestCancelled:
    """A CANCELLED without details that the caller did not ask for is repeated."""

    def test_every_kind_of_unary_call_is_repeated(self) -> None:
        methods = {
            "TableService/DescribeTable": Cancelling(3, described),
            "RowService/Exchange": Cancelling(3, exchanged),
            "RowService/Delete": Cancelling(
                3, lambda _, __: pb.DeleteResponse(deleted=1).SerializeToString()
            ),
            "TableService/DropTable": Cancelling(
                3, lambda _, __: pb.DropTableResponse().SerializeToString()
            ),
        }
        with (
            fake_server(methods) as address,
            Client([address], timeout=10.0, transport="unary") as client,
        ):
            table = client.table("t")
            table.push([1], np.ones((1, 1), np.float32))
            assert table.delete([1]) == 1
            client.drop_table("t")
        assert [method.left for method in methods.values()] == [-1] * 4

    @pytest.mark.slow
    @alone
    def test_but_not_beyond_the_timeout(self) -> None:
        method = Cancelling(10**6, described)
        methods = {"TableService/DescribeTable": method}
        with fake_server(methods) as address, Client([address], timeout=2.0) as client:
            begun = time.monotonic()
            late = (Unavailable, DeadlineExceeded)  # the last call ended before the timeout, or not
            with pytest.raises(late, match=f"shard 0 at {address}"):
                client.table("t")
            assert time.monotonic() - begun < 10
            assert method.left < 10**6 - 1

    def test_other_codes_are_not(self) -> None:
        calls = Stuck()

        def refuse(_: bytes, context: Any) -> bytes:
            calls.calls += 1
            context.abort(grpc.StatusCode.INTERNAL, "broken")
            raise AssertionError

        with (
            fake_server({"TableService/DescribeTable": refuse}) as address,
            Client([address], timeout=5.0) as client,
            pytest.raises(ServerFailure, match="broken"),
        ):
            client.table("t")
        assert calls.calls == 1


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "problem"),
        [
            ("localhost", "the port is missing; write it as in 'localhost:7000'"),
            ("10.0.0.1", "the port is missing; write it as in '10.0.0.1:7000'"),
            ("host:", "an address must be host:port"),
            (":7000", "an address must be host:port"),
            ("host:0", "the port must be in 1..65535"),
            ("host:70000", "the port must be in 1..65535"),
            ("host:abc", "an address must be host:port"),
            ("", "the port is missing"),
            ("::1", "write an IPv6 address in brackets and with its port, such as '[::1]:7000'"),
            ("[::1]", "an address must be host:port"),
            ("http://host:7000", "write host:port, without a scheme such as http://"),
            ("host:7000/x", "an address must be host:port"),
            ("a b:7000", "an address must be host:port"),
        ],
    )
    def test_one_that_is_not_host_and_port_is_refused_by_name(
        self, address: str, problem: str
    ) -> None:
        with pytest.raises(InvalidArgument) as caught:
            Client(["ok:7000", address])
        assert str(caught.value).startswith(f"addresses: shard 1 at {address!r}: {problem}")

    @pytest.mark.parametrize(
        "address", ["[::1]:7000", "a-b.c_d:1", "unix:/tmp/x", "10.0.0.1:65535"]
    )
    def test_others_are_taken(self, address: str) -> None:
        Client([address])

    def test_a_name_that_cannot_be_resolved_is_named(self) -> None:
        address = "no-such-host.invalid:7000"
        with (
            Client([address], timeout=0.5) as client,
            pytest.raises(Unavailable, match=f"shard 0 at {address}: .*cannot be resolved"),
        ):
            client.list_tables()


class TestProxy:
    """The environment's HTTP proxy, which is for web pages, is not used."""

    def test_a_proxy_of_the_environment_is_not_used(
        self, cluster1: Cluster, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)}")
        monkeypatch.delenv("no_proxy", raising=False)
        with Client(cluster1.addresses, timeout=10.0) as client:
            table = summing(client, name)
            assert_array_equal(table.pull([1]), np.zeros((1, 4), np.float32))

    def test_it_is_used_on_request(
        self, cluster1: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{free_ports(1)}")
        monkeypatch.delenv("no_proxy", raising=False)
        with (
            Client(cluster1.addresses, timeout=0.7, proxy=True) as client,
            pytest.raises(
                Unavailable, match=r"proxy of the environment variable http_proxy \(proxy=True\)"
            ) as caught,
        ):
            client.list_tables()
        assert "secret" not in str(caught.value)

    def test_an_error_says_that_it_is_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("https_proxy", "http://user:secret@127.0.0.1:3128")
        with (
            Client([f"127.0.0.1:{free_ports(1)}"], timeout=0.5) as client,
            pytest.raises(
                Unavailable, match=r"https_proxy names a proxy, which the client does not use"
            ) as caught,
        ):
            client.list_tables()
        assert "secret" not in str(caught.value)
