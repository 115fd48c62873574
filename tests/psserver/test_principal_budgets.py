"""Budgets of principals: requests and bytes per second, and bytes in flight."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from secured import METHOD, Secured, bearer, outcome, requests, section, streamed
from servers import eventually

from psclient import Client
from psclient.errors import PermissionDenied, ResourceExhausted, Unauthenticated
from psproto import codec
from psproto import ps_pb2 as pb
from psserver import turns
from psserver.errors import BudgetExceeded
from psserver.limits import Limits, Reservation
from psserver.security.budgets import LONGEST, Budget, Limit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refused(budget: Budget, size: int) -> BudgetExceeded:
    with pytest.raises(BudgetExceeded) as caught:
        budget.begin(size)
    return caught.value


class TestBudget:
    def test_a_second_of_requests_may_come_at_once(self, clock: Clock) -> None:
        budget = Budget("p", Limit(requests=10), list, clock)
        for _ in range(10):
            budget.begin(1)
        error = refused(budget, 1)
        assert "principal 'p' exceeded: more than requests_per_second=10" in str(error)
        assert error.retry_after == pytest.approx(0.1, abs=0.002)

    @pytest.mark.parametrize("rate", [0.3, 1, 10, 333])
    def test_never_more_than_the_rate_are_accepted(self, clock: Clock, rate: float) -> None:
        """Beyond the burst of a second, however impatient the client is."""
        budget, accepted, began = Budget("p", Limit(requests=rate), list, clock), 0, clock.now
        for step in range(10_000):
            try:
                budget.begin(1)
                accepted += 1
            except BudgetExceeded:
                clock.now += (step % 7) * 1e-3
            allowed = max(rate, 1) + (clock.now - began) * rate
            assert accepted <= allowed + 1e-3
        assert accepted > allowed - 1.2

    @pytest.mark.parametrize("limit", [Limit(requests=10), Limit(requests=0.3), Limit(bytes=3)])
    def test_who_waits_as_asked_is_accepted(self, clock: Clock, limit: Limit) -> None:
        budget = Budget("p", limit, list, clock)
        while clock.now < 1000:
            try:
                budget.begin(10)
            except BudgetExceeded as error:
                clock.now += error.retry_after or 0.0
                budget.begin(10)

    def test_a_message_may_be_larger_than_the_budget_of_a_second(self, clock: Clock) -> None:
        budget = Budget("p", Limit(bytes=1000), list, clock)
        budget.begin(5000)
        assert refused(budget, 1).retry_after == pytest.approx(4.0, abs=0.01)
        clock.now += 4.01
        budget.begin(1)

    def test_replies_count(self, clock: Clock) -> None:
        budget = Budget("p", Limit(bytes=1000), list, clock)
        budget.begin(1)
        budget.add(1999)
        budget.end(2000)
        assert refused(budget, 1).retry_after == pytest.approx(1.0, abs=0.01)

    def test_no_delay_is_longer_than_a_minute(self, clock: Clock) -> None:
        budget = Budget("p", Limit(bytes=1), list, clock)
        budget.begin(1 << 30)
        assert refused(budget, 1).retry_after == LONGEST

    def test_bytes_in_flight_are_limited(self, clock: Clock) -> None:
        budget = Budget("p", Limit(inflight=100), list, clock)
        budget.begin(500)  # alone
        assert "500 bytes in flight + 1 requested > inflight_bytes=100" in str(refused(budget, 1))
        budget.end(500)
        budget.begin(60)
        budget.begin(40)
        refused(budget, 1)
        assert budget.inflight == 100

    def test_a_refused_request_costs_nothing(self, clock: Clock) -> None:
        budget = Budget("p", Limit(requests=1, bytes=10, inflight=1000), list, clock)
        budget.begin(10)
        for _ in range(100):
            refused(budget, 10)
        assert budget.inflight == 10
        clock.now += 1.01
        budget.begin(10)

    def test_other_limits_hold_at_once(self, clock: Clock) -> None:
        budget = Budget("p", Limit(requests=1), list, clock)
        budget.begin(7)
        refused(budget, 1)
        budget.limit(Limit(requests=100))
        budget.begin(1)
        assert budget.inflight == 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    made = Secured(tmp_path_factory.mktemp("budgets"), section("ops", (["*"], ["*"]))).start()
    yield made
    made.stop()


def connected(server: Secured, tmp_path: Path, who: str, transport: str, **more: Any) -> Client:
    """A client with the token of a principal, in a file with a newline at its end."""
    file = tmp_path / f"token-{who}"
    file.write_text(f"{who}\n")
    return Client(
        [server.address],
        timeout=60,
        lane="never",
        transport=transport,
        token_file=str(file),
        token_in_plaintext=True,
        **more,
    )


@pytest.mark.parametrize("transport", ["unary", "stream"])
class TestClient:
    def test_a_client_waits_for_its_budget(
        self, server: Secured, tmp_path: Path, transport: str
    ) -> None:
        """Like after OVERLOADED: the calls take longer, and none fails."""
        ops = section("ops", (["*"], ["*"]))
        rights = (["pull", "create"], ["slow"])
        server.change(ops + section(f"slow-{transport}", rights, requests_per_second=20))
        with connected(server, tmp_path, f"slow-{transport}", transport) as client:
            table = client.create_table("slow", dim=4, optimizer="sgd", lr=1.0)
            began = time.monotonic()
            for _ in range(50):
                table.pull(np.arange(3))
            assert time.monotonic() - began > 1.0
        budget = server.server._guard._budgets[f"slow-{transport}"]
        eventually(lambda: not budget.inflight)

    def test_a_client_that_does_not_repeat_sees_the_reason(
        self, server: Secured, tmp_path: Path, transport: str
    ) -> None:
        who = f"hasty-{transport}"
        rights = (["pull", "create"], ["slow"])
        server.change(section("ops", (["*"], ["*"])) + section(who, rights, bytes_per_second=1000))
        with connected(server, tmp_path, who, transport, retry_refused=False) as client:
            table = client.create_table("slow", dim=4, optimizer="sgd", lr=1.0)
            table.pull(np.arange(3000))
            with pytest.raises(ResourceExhausted, match=f"budget of principal '{who}'") as caught:
                table.pull(np.arange(3000))
        assert caught.value.reason == "BUDGET_EXCEEDED"
        assert caught.value.retry_after is not None

    def test_errors_have_names_and_are_not_repeated(
        self, server: Secured, tmp_path: Path, transport: str
    ) -> None:
        server.change(section("ops", (["*"], ["*"])) + section("reader", (["pull"], ["slow"])))
        with connected(server, tmp_path, "ops", transport) as client:
            client.create_table("slow", dim=4, optimizer="sgd", lr=1.0)
            client.create_table("other", dim=4, optimizer="sgd", lr=1.0)
        began = time.monotonic()
        with connected(server, tmp_path, "reader", transport) as client:
            keys = np.arange(3)
            client.table("slow").pull(keys)
            with pytest.raises(PermissionDenied, match="lacks the verb 'push' on table 'slow'"):
                client.table("slow").push(keys, np.ones((3, 4), np.float32), step=1)
            with pytest.raises(PermissionError, match="has no right on table 'other'"):
                client.table("other")
            client.table("slow").pull(keys)
        with (
            pytest.raises(Unauthenticated, match="no principal of the policy has this"),
            connected(server, tmp_path, "stranger", transport) as client,
        ):
            client.table("slow")
        assert time.monotonic() - began < 30


def test_a_new_limit_holds_for_streams_that_are_open(server: Secured) -> None:
    """Else a principal that floods the server could not be limited until it connects again."""
    ops, rights = section("ops", (["*"], ["*"])), (["pull", "push"], ["*"])
    server.change(ops + section("noisy", rights))
    with grpc.insecure_channel(server.address) as channel:
        created = outcome(
            channel, METHOD["CreateTable"], requests("open")["CreateTable"], bearer("ops")
        )
        assert created == "OK"
        sent: queue.Queue[bytes | None] = queue.Queue()
        replies = channel.stream_stream(METHOD["Stream"].path)(
            iter(sent.get, None), metadata=bearer("noisy"), timeout=60
        )

        def ask(id: int) -> str:
            sent.put(streamed(id, "open.new"))
            _, answer = codec.decode_stream_response(next(replies))
            return answer.message if isinstance(answer, pb.Status) else ""

        assert [ask(id) for id in (1, 2, 3)] == ["", "", ""]
        server.change(ops + section("noisy", rights, requests_per_second=0.001))
        answers = [ask(id) for id in range(4, 8)]
        assert answers[0] == ""  # a budget begins with one request
        assert "budget of principal 'noisy' exceeded" in answers[-1]
        server.change(ops + section("noisy", rights))
        assert ask(8) == ""
        sent.put(None)


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_all_connections_of_a_principal_have_one_share_of_the_server(
    server: Secured, tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = (["*"], ["*"])
    server.change(section("ops", everything) + section("other", everything))
    seen: list[tuple[turns.Client, turns.Share]] = []
    admit = Limits.admit

    def recorded(limits: Limits, size: int, **more: Any) -> Reservation:
        if (client := more.get("client")) is not None:
            seen.append((client, client.share))
        return admit(limits, size, **more)

    monkeypatch.setattr(Limits, "admit", recorded)
    shares = []
    with ExitStack() as stack:
        for who in ("ops", "ops", "other"):
            client = stack.enter_context(connected(server, tmp_path, who, transport))
            table = client.create_table(f"of-{who}", dim=4, optimizer="sgd", lr=1.0)
            seen.clear()
            table.pull(np.arange(3))
            assert len({id(share) for _, share in seen}) == 1
            shares.append(seen[-1])
    (first, of_first), (second, of_second), (_, of_other) = shares
    assert first is not second
    assert of_first is of_second
    assert of_first is not of_other
    eventually(lambda: not of_first.inflight)
