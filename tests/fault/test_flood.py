"""A flood of requests beside a quiet client and an administrator, with the server in a cgroup."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cgroups import Group, limited
from lanes import Memory, RawLane, offer_of, pull, reason
from servers import free_ports, serve_in

from benchmarks.flood import DIM, HELD, ROWS, TABLE
from benchmarks.overload import Generator, Watch
from benchmarks.servers import helper
from benchmarks.work import keys_of
from psclient import Client
from psproto import lanes
from psproto import ps_pb2 as pb

ROOT = Path(__file__).parents[2]
LIMIT = 1 << 30  # bytes of the cgroup; a flood has 2 GB of requests
RATE = 9000.0  # requests per second: more than a core serves
SECONDS = 3.0
FLOODS: dict[str, dict[str, Any]] = {
    "streams": {"streams": 16},
    "unary": {"streams": 0},
    "everything": {"streams": 16, "patient": False},
}


@dataclass
class Flooded:
    """What a flood did. Times are in seconds.

    outcome  what became of each request
    hint     time after which the server asks to retry; 0: it does not ask
    slow     median time until an answer to a request of the flood
    watch    times of the calls of a quiet client and of an administrator meanwhile
    after    times of pulls after the flood
    """

    outcome: Any
    hint: Any
    slow: float
    watch: Watch
    after: list[float]


@dataclass
class Served:
    """A server that gets floods.

    group      its memory cgroup; None: there is none
    unlimited  why there is none
    """

    address: str
    process: subprocess.Popen[str]
    generator: Generator
    group: Group | None
    unlimited: str


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with ExitStack() as stack:
        group, why = None, ""
        try:
            group = stack.enter_context(limited(LIMIT))
        except pytest.skip.Exception as error:
            why = str(error)
        enter: Callable[[], None] | None = None if group is None else group.enter
        port = free_ports(1)
        lane = stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-test-"))
        process = serve_in(enter, "--port", str(port), "--metrics-port", "0", "--lane", lane)
        stack.callback(process.communicate)
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        address = f"127.0.0.1:{port}"
        with Client([address], lane="never") as client:
            table = client.create_table(TABLE, DIM, optimizer="adagrad")
            table.push(keys_of(np.arange(ROWS)), np.zeros((ROWS, DIM), np.float32))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PYTHONPATH", f"{ROOT / 'proto'}:{ROOT}")
        generator = Generator(stack.enter_context(helper("benchmarks.flood")), address)
        yield Served(address, process, generator, group, why)


@pytest.fixture(scope="module", params=list(FLOODS))
def flooded(server: Served, request: pytest.FixtureRequest) -> Flooded:
    with Watch(server.address) as watch:
        found = server.generator.run(RATE, SECONDS, **FLOODS[request.param])
    served = found["outcome"] == "served"
    assert served.any()
    slow = float(np.median((found["answered"] - found["intended"])[served]))
    with Client([server.address], lane="never", timeout=60.0) as client:
        table, keys = client.table(TABLE), keys_of(np.arange(1000))
        after = [timed(lambda: table.pull(keys)) for _ in range(20)]
    return Flooded(found["outcome"], found["hint"], slow, watch, after)


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.slow
class TestFlood:
    """Calls of others take a small part of ``slow``, the time of a request of the flood.

    If the server reads all requests that arrive, and begins them in the order of arrival, nine of
    ten pulls of the quiet client take up to half of it beside the flood "everything".
    """

    def test_a_quiet_client_does_not_wait_for_the_flood(self, flooded: Flooded) -> None:
        assert len(flooded.watch.quiet) >= 5
        assert np.isfinite(flooded.watch.quiet).all()
        assert np.quantile(flooded.watch.quiet, 0.9) < flooded.slow / 15

    def test_health_checks_and_administrators_are_answered(self, flooded: Flooded) -> None:
        for name, times in flooded.watch.admin.items():
            assert times, name
            assert np.median(times) < flooded.slow / 2, name

    def test_what_is_too_much_is_refused_with_a_hint(self, flooded: Flooded) -> None:
        refused = flooded.outcome == "OVERLOADED"
        assert refused.any() or (flooded.outcome == HELD).any()
        assert (flooded.hint[refused] > 0).all()

    def test_pulls_are_quick_again_after_the_flood(self, flooded: Flooded) -> None:
        assert np.median(flooded.after) < flooded.slow / 5

    def test_the_memory_stays_within_its_limit(self, server: Served, flooded: Flooded) -> None:
        assert server.process.poll() is None
        if server.group is None:
            pytest.skip(server.unlimited)
        assert server.group.kills == 0
        assert server.group.anonymous < LIMIT


def replies(lane: RawLane, count: int) -> Iterator[pb.StreamResponse]:
    """Yield the next replies to requests that were sent without waiting."""
    data = b""
    for _ in range(count):
        while len(data) < 4 or len(data) < 4 + lanes.LENGTH.unpack_from(data)[0]:
            piece = lane.socket.recv(1 << 16)
            assert piece, "the server closed the connection"
            data += piece
        end = 4 + lanes.LENGTH.unpack_from(data)[0]
        yield lanes.decode_response(data[4:end])
        data = data[end:]


@pytest.mark.slow
def test_a_flood_through_the_same_host_lane_does_not_delay_others(server: Served) -> None:
    """Its client sends as fast as the socket takes it: that costs it little."""
    keys, count, sent, waited = keys_of(np.arange(10_000)), 3000, dict[int, float](), list[float]()
    with Client([server.address], lane="never") as client:
        offer = offer_of(client)
    memory = Memory(offer.token, size=4 << 20)
    memory.put(64, keys)
    part = pull(TABLE, len(keys), DIM, at=64, room=64 + keys.nbytes)
    with RawLane(offer.path, offer.token) as lane, Watch(server.address) as watch:
        assert reason(lane.register(memory)) == ""

        def send() -> None:
            for id in range(10, 10 + count):
                sent[id] = time.perf_counter()
                lane.send(lanes.framed(pb.LaneRequest(id=id, pulls=[part]).SerializeToString()))

        sender = threading.Thread(target=send)
        sender.start()
        reasons = []
        for reply in replies(lane, count):
            waited.append(time.perf_counter() - sent[reply.id])
            reasons.append(reason(reply))
        sender.join()
    memory.close()
    assert set(reasons) <= {"", "OVERLOADED"}
    assert len(watch.quiet) >= 5
    assert np.isfinite(watch.quiet).all()
    assert np.median(watch.quiet) < np.median(waited) / 3
    assert all(watch.admin.values())
