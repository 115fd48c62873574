"""Numbers of pushes: what a client says it was answered, and identities that outlive a process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster, alive, eventually

from psclient import Client, PsError, Table
from psclient.channel import Channel
from psclient.errors import SessionExpired, Unavailable
from psclient.retry import retry
from psclient.routes import Route
from psclient.session import Session
from psproto import ps_pb2 as pb

ONE = -np.ones((1, 1), np.float32)  # a gradient that adds 1 to a row of dim 1


def summing(client: Client, name: str) -> Table:
    return client.create_table(name, 1, optimizer="sgd", lr=1.0, initializer="zeros")


class TestSession:
    @staticmethod
    def numbered(session: Session) -> pb.PushHeader:
        header = pb.PushHeader()
        session.number(header)
        return header

    def test_nothing_is_acknowledged_before_the_first_answer(self) -> None:
        session = Session(7, 1)
        first, second = self.numbered(session), self.numbered(session)
        session.over(first, applied=False)  # given up
        assert self.numbered(session).acknowledged == 0
        session.over(second, applied=True)
        assert self.numbered(session).acknowledged == 2

    def test_what_may_be_sent_again_is_not_acknowledged(self) -> None:
        session = Session(7, 1)
        headers = [self.numbered(session) for _ in range(4)]
        for at, acknowledged in ((2, 0), (0, 1), (1, 3)):
            session.over(headers[at], applied=True)
            assert self.numbered(session).acknowledged == acknowledged
        assert [header.sequence for header in headers] == [1, 2, 3, 4]

    def test_an_incarnation_begins_with_nothing_acknowledged(self) -> None:
        session = Session(7, 1)
        old = self.numbered(session)
        session.over(old, applied=True)
        late = self.numbered(session)
        session.renew()
        session.over(late, applied=True)  # of the incarnation before
        new = self.numbered(session)
        assert (new.incarnation, new.sequence, new.acknowledged) == (2, 1, 0)
        assert self.numbered(session).acknowledged == 0


@pytest.mark.parametrize("transport", ["stream", "unary"])
class TestIdentity:
    def test_uses_of_one_client_id_in_quick_succession_are_told_apart(
        self, cluster1: Cluster, name: str, transport: Any
    ) -> None:
        for times in range(1, 4):
            with Client(cluster1.addresses, client_id=77, transport=transport) as client:
                table = summing(client, name)
                table.push([1], ONE)
                assert_array_equal(table.pull([1]), [[times]])

    def test_an_incarnation_that_did_not_grow_is_refused(
        self, cluster1: Cluster, connect: Any, name: str, transport: Any
    ) -> None:
        who = {"client_id": 78 + (transport == "unary"), "transport": transport}
        ahead = connect(cluster1, incarnation=9, **who)
        summing(ahead, name).push([1], ONE)
        behind = connect(cluster1, incarnation=2, **who)
        table = behind.table(name)
        for call in (lambda: table.push([1], ONE), lambda: table.delete([1])):
            with pytest.raises(SessionExpired, match=r"was replaced by incarnation 9$"):
                call()
        assert_array_equal(ahead.table(name).pull([1]), [[1]])


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_a_push_goes_on_where_only_given_up_ones_came_before(
    start_cluster: Callable[..., Cluster], connect: Any, name: str, transport: Any
) -> None:
    cluster = start_cluster(1)
    client = connect(cluster, transport=transport)
    table = summing(client, name)
    (pid,) = cluster.pids(0)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid))
    client._timeout = 0.1
    with pytest.raises(PsError, match="shard 0 at"):
        table.push([1], ONE)
    client._timeout = 60.0
    table.push([2], ONE)
    assert_array_equal(table.pull([2]), [[1]])


CHANNEL = Channel(Route("127.0.0.1:1"))  # never opened


class TestCancelled:
    """A server that ends cancels calls that it has begun, and nobody else does."""

    class Ended(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.CANCELLED

        def details(self) -> str:
            return "CANCELLED"

        def trailing_metadata(self) -> tuple[()]:
            return ()

    def test_such_a_call_is_made_again(self) -> None:
        left: list[float] = []

        def attempt(seconds: float) -> str:
            left.append(seconds)
            if len(left) < 3:
                raise self.Ended
            return "done"

        assert retry(attempt, CHANNEL, "shard 0", time.monotonic() + 20) == "done"
        assert 20 >= left[0] > left[1] > left[2]

    def test_it_ends_as_unavailable_once_time_is_over(self) -> None:
        def attempt(_: float) -> None:
            raise self.Ended

        with pytest.raises(Unavailable, match=r"^shard 0: CANCELLED$"):
            retry(attempt, CHANNEL, "shard 0", time.monotonic() + 0.01)
