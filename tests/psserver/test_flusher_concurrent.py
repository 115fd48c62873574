"""Flushes while pushes go on: rows that are copied while they change."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import Home, change, contents, push, schema

from psserver.engine import Engine
from psserver.shard import Shard
from storage.optimizers import make_optimizer


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(schema())
        yield home


def assert_restarts_equal(home: Home) -> None:
    """Stopped and started again, the shard holds what it held."""
    before = contents(home.shard)
    home.reopen()
    assert contents(home.shard) == before


class Paused:
    """A scan that lets the engine work between finding rows and copying them."""

    def __init__(self, scan: Any, between: Callable[[], None]) -> None:
        self._scan = scan
        self._between = between

    def dirty(self, *args: Any) -> Any:
        return self._scan.dirty(*args)

    def copy(self, *args: Any) -> Any:
        self._between()
        return self._scan.copy(*args)


def flush_with(home: Home, meanwhile: Callable[[Shard], None]) -> None:
    """A flush during which ``meanwhile`` happens, after rows were found."""
    captured = home.shard.capture()
    done = []

    def once() -> None:
        if not done:
            done.append(1)
            meanwhile(home.shard)

    tables = tuple(replace(each, scan=Paused(each.scan, once)) for each in captured.tables)
    changed = replace(captured, tables=tables)
    engine = home.flusher._engine
    calls = iter([changed])

    class First:
        def run(self, call: Callable[[], Any]) -> Any:
            return next(calls, None) or engine.run(call)

    home.flusher._engine = First()
    try:
        home.flush()
    finally:
        home.flusher._engine = engine


def push_some(shard: Shard) -> None:
    shard.exchange([push([2, 3], 4.0)], [])


def delete_some(shard: Shard) -> None:
    shard.delete(change([2, 3]))


def move_up(shard: Shard) -> None:
    """Key 1 leaves its slot, which stays empty, and comes back in key 2's."""
    shard.delete(change([1]))
    shard.delete(change([2]))
    shard.exchange([push([1], 7.0)], [])


def move_down(shard: Shard) -> None:
    """Key 2 leaves its slot, which stays empty, and comes back in key 1's."""
    shard.delete(change([2]))
    shard.delete(change([1]))
    shard.exchange([push([2], 7.0)], [])


def move_all(shard: Shard) -> None:
    """Every key comes back in another slot."""
    shard.delete(change([1, 2, 3, 4]))
    shard.exchange([push([4, 2, 3, 1], 7.0)], [])


def replace_one(shard: Shard) -> None:
    shard.delete(change([3]))
    shard.exchange([push([99], 4.0)], [])


def drop(shard: Shard) -> None:
    shard.drop_table("t")


def drop_and_create(shard: Shard) -> None:
    shard.drop_table("t")
    shard.create_table(schema())
    shard.exchange([push([1, 4])], [])


MEANWHILE = (
    push_some,
    delete_some,
    move_up,
    move_down,
    move_all,
    replace_one,
    drop,
    drop_and_create,
)


@pytest.mark.quick(12)
@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("restart", [False, True])
def test_changes_while_rows_are_copied_are_not_lost(
    home: Home, meanwhile: Callable[[Shard], None], before: int, restart: bool
) -> None:
    home.shard.exchange([push([1, 2, 3, 4], 2.0)], [])
    for _ in range(before):
        home.flush()
        home.shard.exchange([push([1, 2, 3, 4])], [])
    flush_with(home, meanwhile)
    if restart:
        assert_restarts_equal(home)
    home.flush()
    assert_restarts_equal(home)
    if "t" in home.shard.tables():
        home.shard.delete(change([1, 2, 3, 4]))
        home.flush()
        assert_restarts_equal(home)
        home.shard.exchange([push([1, 2, 3, 4])], [])
        assert_restarts_equal(home)


@contextmanager
def working_engine() -> Iterator[Engine]:
    engine, loop = Engine(), asyncio.new_event_loop()
    engine.open(loop)
    yield engine
    engine.close()
    loop.close()


@contextmanager
def flushes_meanwhile(home: Home) -> Iterator[list[int]]:
    """One flush after the other; the versions at which they stood."""
    stop = threading.Event()
    failed: list[BaseException] = []
    made: list[int] = []

    def run() -> None:
        try:
            while not stop.is_set():
                home.flush()
                assert home.base.state is not None
                made.append(home.base.state.version)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()
    assert failed == []


operations = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.lists(st.integers(0, 40), unique=True, max_size=12)),
        st.tuples(st.just("push"), st.lists(st.integers(0, 9), unique=True, max_size=4)),
        st.tuples(st.just("delete"), st.lists(st.integers(0, 40), unique=True, max_size=6)),
        st.tuples(st.sampled_from(["drop", "create"]), st.just([])),
    ),
    min_size=1,
    max_size=60,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(operations, st.sampled_from([0, 3, 1000]), st.randoms(use_true_random=False))
def test_flushes_beside_a_working_engine_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    work: list[tuple[str, list[int]]],
    tombstones: int,
    rng: random.Random,
) -> None:
    options = {"segment_bytes": 8192, "max_tombstones": tombstones}
    directory = tmp_path_factory.mktemp("shard")
    with working_engine() as engine, Home(directory, engine=engine, **options) as home:
        home.shard.create_table(schema())
        with flushes_meanwhile(home):
            for kind, keys in work:
                engine.run(partial(act, home.shard, kind, keys))
                if rng.random() < 0.1:
                    home.written()
        assert_restarts_equal(home)


def act(shard: Shard, kind: str, keys: list[int]) -> None:
    """One change, or none where it makes no sense."""
    there = "t" in shard.tables()
    if kind == "create":
        shard.create_table(schema())
    elif kind == "drop" and there:
        shard.drop_table("t")
    elif kind == "push" and there:
        shard.exchange([push(keys, float(shard.version))], [])
    elif kind == "delete" and there:
        shard.delete(change(keys))


@pytest.mark.slow
def test_long_flushes_beside_large_pushes_lose_nothing(tmp_path: Path) -> None:
    """Blocks take long enough to be copied that pushes and deletes come in between."""
    rng, options = np.random.default_rng(3), {"segment_bytes": 8 << 20}
    made = schema(dim=64, optimizer=make_optimizer("adam", 0.1, {}))
    with working_engine() as engine, Home(tmp_path / "shard", engine=engine, **options) as home:
        home.shard.create_table(made)
        with flushes_meanwhile(home) as versions:
            pushed = 0
            while pushed < 300 or len(set(versions)) <= 5:
                pushed += 1
                keys = rng.choice(20_000, 500, replace=False).tolist()
                gone = rng.choice(20_000, 300, replace=False).tolist()
                gradients = rng.normal(size=(500, 64)).astype(np.float32)
                pushes = [push(keys, gradients=gradients)]
                engine.run(partial(home.shard.exchange, pushes, []))
                engine.run(partial(home.shard.delete, change(gone)))
                if pushed % 50 == 0:  # the log has room for so many
                    home.written()
        dump, version = home.shard.dump()["t"], home.shard.version
        home.reopen()
        again = home.shard.dump()["t"]
        assert home.shard.version == version
        for field in ("keys", "rows", "meta"):
            np.testing.assert_array_equal(getattr(again, field), getattr(dump, field))
