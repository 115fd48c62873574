"""One DNS name leads to all shards: in any order, among others, and where they move to."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pods import Pod, info, no_such_name
from servers import eventually, free_ports

from psclient import discovery, lookup
from psclient.access import PLAIN
from psclient.discovery import Discovery
from psclient.errors import InvalidArgument, PsError, Unavailable
from psclient.places import Named
from psserver.errors import BadRequest, Starting

SOON = 60.0  # seconds within which a search that can succeed does so
SHORT = 3.0  # seconds after which a search that must fail does so
NONSENSE = b"\xff"  # an answer that is not a protobuf message


class Service:
    """A DNS name with a port, and the pods that it leads to."""

    def __init__(self) -> None:
        self.port = free_ports(1)
        self.name = f"ps:{self.port}"
        self.addresses: list[str] = []
        self.missing = False
        self.pods: list[Pod] = []

    def add(self, number: int, says: Any, *, listed: bool = True) -> Pod:
        """Start a pod at 127.0.0.number."""
        pod = Pod(f"127.0.0.{number}", self.port, says)
        self.pods.append(pod)
        if listed:
            self.addresses.append(pod.address)
        return pod

    def look_up(self, name: str) -> list[str]:
        assert name == self.name
        if self.missing:
            raise no_such_name()
        return list(self.addresses)

    def places(self) -> Named:
        return Named(self.name, PLAIN)

    def found(self, seconds: float = SOON) -> list[str]:
        """The addresses of the shards, in order."""
        return [each.address for each in self.places().routes(time.monotonic() + seconds)]

    def refuses(self, kind: type[PsError] = Unavailable) -> str:
        """The error of a search that fails."""
        with pytest.raises(kind) as caught:
            self.found(SHORT)
        assert type(caught.value) is kind
        return str(caught.value)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service()
    monkeypatch.setattr(discovery, "look_up", made.look_up)
    yield made
    for pod in made.pods:
        pod.stop()


def later(seconds: float, action: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()


class TestFind:
    def test_addresses_need_no_order(self, service: Service) -> None:
        pods = {shard: service.add(10 + shard, info(shard, 3)) for shard in (2, 0, 1)}
        assert service.found() == [pods[shard].address for shard in range(3)]

    def test_waits_for_a_shard_that_the_name_does_not_lead_to_yet(self, service: Service) -> None:
        service.add(10, info(0, 2))
        late = service.add(11, info(1, 2), listed=False)
        later(0.7, lambda: service.addresses.append(late.address))
        assert service.found() == [each.address for each in service.pods]

    def test_waits_for_a_shard_that_starts(self, service: Service) -> None:
        service.add(10, info(0, 2))
        slow = service.add(11, Starting())
        later(0.7, lambda: setattr(slow, "says", info(1, 2)))
        assert service.found() == [each.address for each in service.pods]

    def test_waits_for_a_name_that_does_not_exist_yet(self, service: Service) -> None:
        service.add(10, info(0, 1))
        service.missing = True
        later(0.7, lambda: setattr(service, "missing", False))
        assert service.found() == [service.pods[0].address]

    def test_waits_until_a_thread_can_be_started(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.add(10, info(0, 1))
        start, refused = threading.Thread.start, []

        def refuse_once(thread: threading.Thread) -> None:
            if thread.name == "psclient-lookup" and not refused:
                refused.append(thread)
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse_once)
        assert service.found() == [service.pods[0].address]
        assert refused

    def test_look_ups_may_return_some_of_the_addresses(self, service: Service) -> None:
        pods = [service.add(10 + shard, info(shard, 3)) for shard in range(3)]
        service.addresses = [pods[0].address]
        later(0.3, lambda: setattr(service, "addresses", [pods[1].address]))
        later(1.2, lambda: setattr(service, "addresses", [pods[2].address]))
        assert service.found() == [pod.address for pod in pods]

    @pytest.mark.parametrize(
        "other",
        [
            info(5, 6),
            info(5, 5),
            Starting(),
            BadRequest("NOT_A_SHARD", "shard 3 of 3"),
            NONSENSE,
        ],
        ids=[
            "of a cluster with another number of shards",
            "that answers nonsense",
            "starting",
            "beyond the shard count",
            "that is not a parameter server",
        ],
    )
    def test_another_pod_disturbs_nobody(self, service: Service, other: Any) -> None:
        pods = [service.add(10 + shard, info(shard, 3)) for shard in range(3)]
        service.add(20, other)
        start = time.monotonic()
        assert service.found() == [pod.address for pod in pods]
        assert time.monotonic() - start < discovery.ASK_SECONDS

    def test_an_address_where_nobody_listens_disturbs_nobody(self, service: Service) -> None:
        service.add(10, info(0, 1))
        service.addresses.append(f"127.0.0.20:{service.port}")
        assert service.found() == [service.pods[0].address]

    def test_one_process_at_two_addresses_is_one_shard(self, service: Service) -> None:
        first, second = (service.add(number, info(0, 1, start=7)) for number in (11, 10))
        assert service.found() == [second.address]
        assert first.asked

    def test_ipv6(self, service: Service) -> None:
        service.pods.append(Pod("[::1]", service.port, info(1, 2)))
        service.addresses.append(service.pods[0].address)
        service.add(10, info(0, 2))
        assert service.found() == [f"127.0.0.10:{service.port}", f"[::1]:{service.port}"]

    def test_an_advertised_address_is_used(self, service: Service) -> None:
        service.add(10, info(0, 1, advertise="ps-0.ps:7000"))
        assert service.found() == ["ps-0.ps:7000"]

    def test_calls_name_the_shard(self, service: Service) -> None:
        service.add(11, info(1, 2, cluster="prod"))
        service.add(10, info(0, 2, cluster="prod"))
        routes = service.places().routes(time.monotonic() + SOON)
        assert [route.metadata for route in routes] == [
            (("ps-shard", f"{shard}/2/prod"),) for shard in range(2)
        ]

    def test_servers_that_do_not_know_the_name_of_their_cluster_yet(self, service: Service) -> None:
        pods = [service.add(10 + n, info(n, 3, cluster="prod" if n else "")) for n in range(3)]
        assert service.found() == [pod.address for pod in pods]


@pytest.mark.slow  # each waits until a search has failed
class TestRefusal:
    def test_names_the_shards_that_are_missing(self, service: Service) -> None:
        service.add(10, info(1, 3, cluster="prod"))
        service.add(11, Starting())
        text = service.refuses()
        assert text.startswith(
            f"{service.name}: found 1 of 3 shards of cluster 'prod'; missing: shard 0, 2; "
            f"127.0.0.11:{service.port}: the shard is starting"
        )

    def test_names_an_address_of_another_service(self, service: Service) -> None:
        other = service.add(10, NONSENSE)
        assert f"{other.address}: its answer is not a valid message" in service.refuses()

    def test_names_two_clusters(self, service: Service) -> None:
        service.add(10, info(0, 1, cluster="a"))
        service.add(11, info(0, 1, cluster="b"))
        assert service.refuses(InvalidArgument) == (
            f"{service.name}: the name leads to more than one cluster: cluster 'a' of 1 shards at"
            f" 127.0.0.10:{service.port}; cluster 'b' of 1 shards at 127.0.0.11:{service.port}."
            " Use a name that leads to the shards of one cluster"
        )

    def test_a_cluster_never_takes_the_place_of_another_that_is_incomplete(
        self, service: Service
    ) -> None:
        service.add(10, info(0, 2, cluster="a"))
        service.add(11, info(0, 1, cluster="b"))
        assert "more than one cluster" in service.refuses(InvalidArgument)

    def test_two_clusters_without_names_are_not_mixed(self, service: Service) -> None:
        for number in range(4):
            service.add(10 + number, info(number % 2, 2, start=1 + number))
        text = service.refuses()
        for shard in range(2):
            where = f"127.0.0.{10 + shard}:{service.port} and 127.0.0.{12 + shard}:{service.port}"
            assert f"shard {shard} answers at {where}, which are different servers" in text

    def test_a_name_that_does_not_exist(self, service: Service) -> None:
        service.missing = True
        assert service.refuses() == (
            f"{service.name}: the host name cannot be resolved: Name or service not known"
        )

    def test_one_address_for_several_shards(self, service: Service) -> None:
        service.add(10, info(1, 2))
        text = service.refuses()
        assert "missing: shard 0; the name has one address only" in text
        assert "headless Service" in text


class TestFollow:
    @pytest.fixture
    def places(self, service: Service) -> Named:
        for shard in range(3):
            service.add(10 + shard, info(shard, 3, cluster="prod"))
        places = service.places()
        places.routes(time.monotonic() + SOON)
        return places

    @staticmethod
    def move(service: Service, shard: int, number: int, says: Any) -> str:
        """Stop the pod of a shard, and start another pod at 127.0.0.number."""
        service.pods[shard].stop()
        service.addresses.remove(service.pods[shard].address)
        return service.add(number, says).address

    def test_a_shard_that_moved_is_found(self, service: Service, places: Named) -> None:
        routes = places.routes(0)
        asked = [pod.asked for pod in service.pods]
        there = self.move(service, 1, 20, info(1, 3, cluster="prod", start=99))
        routes[1].failed(routes[1].address)
        eventually(lambda: routes[1].address == there, 2.0)
        assert [pod.asked for pod in service.pods[:1] + service.pods[2:3]] == asked[::2]
        assert not places._searching or eventually(lambda: not places._searching)

    def test_a_shard_that_restarts_where_it_was_is_found(
        self, service: Service, places: Named
    ) -> None:
        routes = places.routes(0)
        before = routes[1].address
        service.pods[1].says = info(1, 3, cluster="prod", start=99)
        routes[1].failed(before)
        eventually(lambda: not places._searching)
        assert routes[1].address == before

    @pytest.mark.parametrize(
        "other",
        [info(1, 3, cluster="b"), info(1, 4, cluster="prod"), Starting()],
        ids=["another cluster", "another number of shards", "starting"],
    )
    def test_no_other_server_is_followed(self, service: Service, places: Named, other: Any) -> None:
        routes = places.routes(0)
        before = routes[1].address
        self.move(service, 1, 20, other)
        routes[1].failed(before)
        eventually(lambda: service.pods[-1].asked >= 2)
        assert routes[1].address == before
        there = service.add(21, info(1, 3, cluster="prod", start=99)).address
        eventually(lambda: routes[1].address == there, 3.0)

    def test_shards_that_swap_addresses_are_found(self, service: Service, places: Named) -> None:
        routes = places.routes(0)
        first, second = (route.address for route in routes[:2])
        service.pods[0].says, service.pods[1].says = (
            info(1, 3, cluster="prod", start=98),
            info(0, 3, cluster="prod", start=99),
        )
        for route in routes[:2]:
            route.failed(route.address)
        eventually(lambda: (routes[0].address, routes[1].address) == (second, first), SOON)

    def test_shards_that_swap_addresses_are_found_if_one_fails_later(
        self, service: Service, places: Named
    ) -> None:
        routes = places.routes(0)
        (first, second), asked = (route.address for route in routes[:2]), service.pods[0].asked
        service.pods[0].says, service.pods[1].says = (
            info(1, 3, cluster="prod", start=98),
            info(0, 3, cluster="prod", start=99),
        )
        routes[0].failed(first)
        eventually(lambda: service.pods[0].asked > asked)
        assert routes[0].address == first  # the other shard is not lost, so it is not asked
        start = time.monotonic()
        routes[1].failed(second)
        eventually(lambda: (routes[0].address, routes[1].address) == (second, first))
        assert time.monotonic() - start < discovery.SPARE_SECONDS / 2

    def test_a_shard_is_found_while_many_calls_fail(self, service: Service, places: Named) -> None:
        routes = places.routes(0)
        before = routes[1].address
        there = self.move(service, 1, 20, info(1, 3, cluster="prod", start=99))
        end = time.monotonic() + SOON
        while routes[1].address == before:
            routes[1].failed(before)
            assert time.monotonic() < end
        assert routes[1].address == there

    def test_a_shard_is_found_at_the_address_of_one_that_nobody_calls(
        self, service: Service, places: Named, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(discovery, "SPARE_SECONDS", 1.0)
        routes = places.routes(0)
        there = routes[1].address
        service.pods[0].says, service.pods[1].says = Starting(), info(0, 3, cluster="prod", start=9)
        routes[0].failed(routes[0].address)
        eventually(lambda: routes[0].address == there, 4.0)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_search_that_failed_is_followed_by_another(
        self, service: Service, places: Named, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise MemoryError

        routes = places.routes(0)
        there = self.move(service, 1, 20, info(1, 3, cluster="prod", start=99))
        with monkeypatch.context() as patch:
            patch.setattr(Discovery, "step", fail)
            routes[1].failed(routes[1].address)
            eventually(lambda: not places._searching)
        assert routes[1].address != there
        routes[1].failed(routes[1].address)
        eventually(lambda: routes[1].address == there, 3.0)

    def test_a_failure_at_a_former_address_starts_no_search(self, places: Named) -> None:
        places.routes(0)[1].failed("127.0.0.99:1")
        assert not places._searching

    def test_a_forked_child_searches_too(self, service: Service, places: Named) -> None:
        routes = places.routes(0)
        places._searching = True  # as if the parent's thread ran
        there = self.move(service, 1, 20, info(1, 3, cluster="prod", start=99))
        places._prepare()
        routes[1].failed(routes[1].address)
        eventually(lambda: routes[1].address == there, 3.0)


class TestLookUp:
    def test_all_addresses_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = [
            (2, 1, 6, "", ("10.0.0.2", 7000)),
            (10, 1, 6, "", ("fd00::1", 7000, 0, 0)),
            (2, 1, 6, "", ("10.0.0.1", 7000)),
            (2, 1, 6, "", ("10.0.0.2", 7000)),
        ]
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
        assert lookup.look_up("ps:7000") == ["10.0.0.1:7000", "10.0.0.2:7000", "[fd00::1]:7000"]

    def test_a_fork_waits_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, end = threading.Event(), threading.Event()

        def slow(*_: Any, **__: Any) -> list[Any]:
            begun.set()
            end.wait(SOON)
            return []

        monkeypatch.setattr("socket.getaddrinfo", slow)
        threading.Thread(target=lookup.look_up, args=("ps:7000",), daemon=True).start()
        begun.wait(SOON)
        later(0.3, end.set)
        start = time.monotonic()
        child = os.fork()
        if not child:
            os._exit(0 if lookup.look_up("ps:7000") == [] else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert 0.2 < time.monotonic() - start < lookup.FORK_PATIENCE


def test_addresses_that_look_ups_no_longer_return_are_forgotten(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "FORGET_SECONDS", 0.5)
    gone = f"127.0.0.30:{service.port}"
    service.addresses.append(gone)
    search = Discovery(service.name, PLAIN)
    while gone not in search.errors:
        search.step(time.monotonic() + 1)
    service.addresses.clear()
    eventually(lambda: search.step(time.monotonic() + 0.1) or not search.errors)
    search.close()
