"""Exceptions raised by signal handlers, at any moment of a call.

The oracle is that of tests/fault/crash.py: push i adds 4^(i % 8) to the rows of group i // 8, so a
digit of a row, in base 4, says how often its push was applied.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster, eventually
from tables import DIM, summing

from psclient import Client, Follower, PsError, Subscriber, calls
from psclient.follower import _Following
from psclient.shardstream import ShardStream
from psclient.signals import Condition
from psproto import ps_pb2 as pb

DIGITS = 8
WIDTH = 5  # keys of a group
TRANSPORTS = pytest.mark.parametrize("transport", ["stream", "unary", "lane"])


class Stop(BaseException):
    """What the handler raises."""


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGINT, stop)
    yield
    signal.signal(signal.SIGINT, before)


class Bell:
    """A thread that sends SIGINT to this process when it is asked to."""

    def __init__(self) -> None:
        self._delays: SimpleQueue[float | None] = SimpleQueue()
        self._rung: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def ring(self, after: float) -> None:
        self._delays.put(after)

    def wait(self) -> None:
        self._rung.get()

    def end(self) -> None:
        self._delays.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (delay := self._delays.get()) is not None:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGINT)
            self._rung.put(None)


@pytest.fixture
def bell() -> Iterator[Bell]:
    bell = Bell()
    yield bell
    bell.end()


def interrupted(bell: Bell, call: Callable[[], object], after: float) -> bool:
    """Run a call with SIGINT after so many seconds; return whether it ended by that."""
    ended = False
    try:
        bell.ring(after)
        call()
        ended = True
        for _ in range(1000):
            time.sleep(0.01)
    except Stop:
        bell.wait()
        return not ended
    raise AssertionError("the signal is lost")


def digits(value: float) -> list[int]:
    """How often each push of a group was applied."""
    return [int(value) // 4**digit % 4 for digit in range(DIGITS)]


class Oracle:
    """Pushes by one client to one table, and what became of each."""

    def __init__(self, client: Client, name: str) -> None:
        self.table = client.create_table(name, 1, optimizer="sgd", lr=1.0, initializer="zeros")
        self.applied: list[bool | None] = []  # None: unknown

    def push(self) -> None:
        i = len(self.applied)
        self.applied.append(None)
        keys = np.arange(WIDTH) + i // DIGITS * WIDTH
        self.table.push(keys, np.full((WIDTH, 1), -(4.0 ** (i % DIGITS)), np.float32))
        self.applied[i] = True

    def check(self) -> None:
        groups = -(-len(self.applied) // DIGITS)
        rows = self.table.pull(np.arange(groups * WIDTH)).reshape(groups, WIDTH)
        for group, row in enumerate(rows):
            expected = self.applied[group * DIGITS : (group + 1) * DIGITS]
            for value in row:
                for count, known in zip(digits(float(value)), expected, strict=False):
                    assert count == 1 if known else count in (0, 1)


def test_the_call_that_a_signal_interrupts_does_not_ruin_the_next(
    any_client: Client, name: str
) -> None:
    table = summing(any_client, name)
    table.push([1], np.ones((1, DIM), np.float32))
    real = any_client._connect().links[0].channel
    for method in ("read", "result"):

        def stop(*_: object) -> None:
            raise Stop

        keep = getattr(real, method)
        setattr(real, method, stop)
        for link in any_client._connect().links:
            setattr(link.channel, method, stop)
        with suppress(Stop):
            table.pull([1])
        for link in any_client._connect().links:
            delattr(link.channel, method)
        assert getattr(real, method) == keep
    for _ in range(3):
        assert_array_equal(table.pull([1]), -np.ones((1, DIM), np.float32))
        table.exchange([1], ([2], np.ones((1, DIM), np.float32)))


@pytest.mark.quick(2)
@TRANSPORTS
@pytest.mark.parametrize("shards", [1, 3])
def test_an_interrupted_push_is_applied_once_or_not_at_all(
    request: pytest.FixtureRequest, connect: Any, name: str, transport: str, shards: int, bell: Bell
) -> None:
    client = connect(request.getfixturevalue(f"cluster{shards}"), transport=transport)
    oracle = Oracle(client, name)
    rng = random.Random(shards)
    cut = 0
    for _ in range(150):
        oracle.push()
        cut += interrupted(bell, oracle.push, rng.choice((2e-5, 2e-4, 6e-4, 2e-3)) * rng.random())
    assert cut > 25
    oracle.check()


@TRANSPORTS
def test_calls_of_other_threads_go_on(
    cluster2: Cluster, connect: Any, name: str, transport: str, bell: Bell
) -> None:
    client = connect(cluster2, transport=transport)
    mine, others = Oracle(client, name), [Oracle(client, f"{name}.{n}") for n in range(2)]
    with busy([other.push for other in others]):
        rng = random.Random(7)
        for _ in range(100):
            mine.push()
            interrupted(bell, mine.push, 2e-3 * rng.random())
    for oracle in (mine, *others):
        oracle.check()
    assert all(all(other.applied) for other in others)


@TRANSPORTS
def test_every_other_call_survives_too(
    cluster2: Cluster, connect: Any, name: str, transport: str, bell: Bell
) -> None:
    client = connect(cluster2, transport=transport)
    table = summing(client, name)
    keys, ones = np.arange(20), np.ones((20, DIM), np.float32)
    batch = client.batch(keys)
    calls: list[Callable[[], object]] = [
        lambda: client.describe_table(name),
        client.list_tables,
        lambda: client.evict(name, dry_run=True),
        client.wait_durable,
        lambda: client.barrier("b"),
        lambda: table.delete(keys),
        lambda: table.pull_rows(keys),
        lambda: table.pull_distinct(keys),
        lambda: client.push_distinct({name: (batch, ones)}),
        lambda: table.start_pull(keys).result(),
        lambda: client.start_exchange({name: (keys, ones)}, {name: keys}).result(),
        lambda: client.create_table(f"{name}.2", 2),
        lambda: table.exchange(keys, (keys, ones)),
    ]
    rng = random.Random(3)
    for _ in range(4):
        for call in calls:
            interrupted(bell, call, 2e-3 * rng.random())
            call()
    client.drop_table(name)
    session = client._connect().links[0].session
    eventually(lambda: not session._open, 60)


@TRANSPORTS
def test_a_first_call_may_be_interrupted(
    cluster2: Cluster, connect: Any, name: str, transport: str, bell: Bell
) -> None:
    rng = random.Random(11)
    for _ in range(15):
        client = connect(cluster2, transport=transport)
        interrupted(bell, client.list_tables, 8e-3 * rng.random())
        client.list_tables()
        client.close()


def test_a_request_that_was_given_up_says_so(client: Client, name: str) -> None:
    table = summing(client, name)
    pending = table.start_pull([1])
    for link in client._connect().links:
        link.wait, wait = interrupt, link.wait  # type: ignore[method-assign]
    with pytest.raises(Stop):
        pending.result()
    for link in client._connect().links:
        del link.wait  # type: ignore[misc]
    del wait
    with pytest.raises(PsError, match="interrupted"):
        pending.result()
    table.pull([1])


def for_ever(call: Callable[[], object]) -> None:
    while True:
        call()


def interrupt(*_: object) -> None:
    raise Stop


def test_a_handler_may_call_the_client_that_it_interrupts(
    client: Client, name: str, bell: Bell
) -> None:
    table = summing(client, name)
    table.push([1], np.ones((1, DIM), np.float32))
    seen: list[np.ndarray] = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(table.pull([1])))
    rng = random.Random(5)
    for count in range(1, 31):
        bell.ring(1e-3 * rng.random())
        while len(seen) < count:
            assert_array_equal(table.pull([1]), -np.ones((1, DIM), np.float32))
        bell.wait()
    for rows in seen:
        assert_array_equal(rows, -np.ones((1, DIM), np.float32))


def test_an_exception_of_any_class_is_passed_on_at_once(
    client: Client, name: str, bell: Bell
) -> None:
    """Of a class that psclient catches elsewhere, too."""
    table = summing(client, name)
    for kind in (ValueError, TimeoutError, RuntimeError, LookupError):

        def fail(*_: object, kind: type[Exception] = kind) -> None:
            raise kind("by a signal")

        signal.signal(signal.SIGINT, fail)
        for delay in (1e-4, 5e-4):
            bell.ring(delay)
            with pytest.raises(kind, match="by a signal"):
                for_ever(lambda: table.pull([1]))
            bell.wait()
        assert_array_equal(table.pull([1]), np.zeros((1, DIM), np.float32))


def test_a_condition_stays_usable(bell: Bell) -> None:
    condition, count = Condition(), [0]
    stop = threading.Event()

    def notify() -> None:
        while not stop.is_set():
            with condition:
                count[0] += 1
                condition.notify_all()
            time.sleep(1e-4)

    thread = threading.Thread(target=notify)
    thread.start()
    rng = random.Random(13)

    def wait() -> None:
        for _ in range(20):
            with condition:
                seen = count[0]
                assert condition.wait_for(lambda seen=seen: count[0] > seen, 10)

    try:
        assert sum(interrupted(bell, wait, 3e-3 * rng.random()) for _ in range(200)) > 20
        wait()
        with condition:
            seen = count[0]
            assert not condition.wait_for(lambda: False, 0.02)
            assert condition.wait_for(lambda: count[0] > seen, 60)
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()


def test_a_subscriber_goes_on_after_an_exception(
    cluster1: Cluster, connect: Any, name: str, bell: Bell
) -> None:
    table = summing(connect(cluster1), name, 1)
    keys, rng = np.arange(3), random.Random(17)
    with Subscriber(cluster1.addresses, tables=[name]) as changes:
        for count in range(1, 40):
            table.push(keys, -np.ones((3, 1), np.float32))

            def take(count: int = count) -> None:
                while True:
                    change = changes.next(20.0)
                    assert change is not None
                    if change.kind == "rows" and change.rows[0, 0] == count:
                        return

            if interrupted(bell, take, 3e-3 * rng.random()):
                table.push(keys, np.zeros((3, 1), np.float32))
                take()


@contextmanager
def busy(work: list[Callable[[], object]]) -> Iterator[None]:
    """A thread for each piece of work that repeats it meanwhile."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def loop(call: Callable[[], object]) -> None:
        while not stop.is_set():
            try:
                call()
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=loop, args=(call,)) for call in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert failures == []


def interrupt_while(bell: Bell, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Have SIGINT arrive in the middle of the next call of a method."""
    real = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        result = real(*args, **options)
        bell.ring(0.0)
        bell.wait()
        return result

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("kind", [Subscriber, Follower])
def test_what_a_signal_interrupts_while_it_opens_is_open(
    cluster2: Cluster,
    connect: Any,
    name: str,
    kind: Any,
    bell: Bell,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The signal comes when the first of its threads runs."""
    table = summing(connect(cluster2), name, 1)
    table.push(np.arange(9), -np.ones((9, 1), np.float32))
    opened = kind(cluster2.addresses, tables=[name])
    interrupt_while(bell, monkeypatch, ShardStream if kind is Subscriber else _Following, "open")
    with pytest.raises(Stop):
        opened.open()
    with opened:
        if kind is Follower:
            opened.wait_for([0, 0], 20)
            assert len(opened) == 9
        else:
            shards = set()
            while len(shards) < 2:
                change = opened.next(20)
                assert change is not None
                shards.add(change.shard)


def test_a_signal_ends_a_call_of_all_shards_although_they_are_silent(
    cluster2: Cluster, connect: Any, bell: Bell
) -> None:
    """Subscribers that get no changes stand for checkpoints of a shard that hangs."""
    client, seen = connect(cluster2), []
    request = pb.SubscribeRequest(start=pb.START_LATEST, tables=["none"], progress_ms=60_000)

    def work() -> None:
        calls.all_streams(
            client,
            "Subscribe",
            request,
            pb.Delta,
            lambda shard, _: seen.append(shard),
            service="LogService",
        )

    before = threading.enumerate()
    bell.ring(0.5)
    begun = time.monotonic()
    with pytest.raises(Stop):
        work()
    bell.wait()
    assert time.monotonic() - begun < 10
    left = [each for each in threading.enumerate() if each not in before]
    assert not [each for each in left if "psclient-work" in each.name]
    client.list_tables()
