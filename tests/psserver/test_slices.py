"""Work on the engine comes in slices, each of a bounded size, whatever the slice meets.

Each place where psserver hands work to the engine is listed here. A new one must be added, with
the reason why a pull does not wait long for it.
"""

from __future__ import annotations

import ast
import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from homes import Homes
from stores import analyses_of, change, schema

import psserver
from psproto import ps_pb2 as pb
from psserver.pace import Pace
from psserver.security.guard import Actor, Guard
from psserver.service import Service
from psserver.stats import ServiceStats
from psserver.sweeper import Sweeper
from storage.admission import counter
from storage.admission.rules import make_admission
from storage.eviction import contract, evictor, rules, timeline
from storage.table import Table
from storage.tiers import host

SLICES = "a slice of bounded work, counted below"
REQUEST = "one request, whose size is bounded by max_keys, or by 1,000 keys for an inspection"
SMALL = "facts of one table, or of none"
ALL_TABLES = "some facts of every table: max_tables bounds it"
SITES = {
    "analysis.py:_live": SMALL,
    "basewriter.py:_adopt": "the rows of one block, or 8,192 rows that were moved",
    "basewriter.py:_choose": "the blocks of one table",
    "basewriter.py:_delete_moved": "the blocks of one table",
    "basewriter.py:_entries": "bits of the rows of 32 blocks",
    "basewriter.py:_store": SMALL,
    "basewriter.py:_write_directory": SMALL,
    "basewriter.py:crowded": ALL_TABLES,
    "checkpoints.py:_end": SLICES,
    "checkpoints.py:_expecting": SMALL,
    "coldruns.py:_trim": "rows that leave at most 4 MiB of memory, per table",
    "coldruns.py:finish": REQUEST,
    "coldruns.py:submit": REQUEST,
    "exchange.py:_finish_delete": SMALL,
    "exchange.py:delete": REQUEST,
    "exchange.py:_exchange": SMALL,
    "flusher.py:_flush": SLICES,
    "inspection.py:_gone": SLICES,
    "inspection.py:_known": REQUEST,
    "loading.py:_accept": SMALL,
    "loading.py:_begin": SMALL,
    "loading.py:_cancel": SMALL,
    "loading.py:_claimed": SMALL,
    "loading.py:_fill": SMALL,
    "loading.py:load": SMALL,
    "pace.py:run": SLICES,
    "packing.py:counters_of": SLICES,
    "preloader.py:_load": "as many rows as take 256 KiB",
    "preloader.py:_run": ALL_TABLES,
    "restore.py:_require_empty": ALL_TABLES,
    "rows.py:_live_rows": SLICES,
    "rows.py:write_rows": SLICES,
    "rowwrites.py:write": SLICES,
    "rowscan.py:_send_rows": "as many rows as take 256 KiB",
    "rowscan.py:_send_tables": "4,096 changes with tombstones, which are not copied",
    "rowscan.py:run": ALL_TABLES,
    "scrubber.py:_endless": ALL_TABLES,
    "scrubber.py:_examine": SMALL,
    "scrubber.py:_examine_suspect": SMALL,
    "scrubber.py:_found": SMALL,
    "scrubber.py:_over": SMALL,
    "scrubber.py:_pause": ALL_TABLES,
    "scrubber.py:verify": "the index of one table, if the keys of lost rows are asked for",
    "service.py:alter_table": SMALL,
    "service.py:barrier": SMALL,
    "service.py:create_table": SMALL,
    "service.py:describe_table": SMALL,
    "service.py:drop_table": SMALL,
    "service.py:list_tables": SLICES,
    "service.py:verify_rows": SMALL,
    "sweeper.py:_evict": SLICES,
    "sweeper.py:_run": SLICES,
}
SLOTS, TABLES, ROWS, KEYS = 300_000, 200, 20, 60_000
MOST = {  # in one slice
    "slots found": 1 << 16,
    "slots swept": 1 << 17,  # two rules
    "rows copied": 1 << 14,
    "rows deleted": 1 << 13,
    "segments of counters": 2,  # one that expires, one that is read
    "tables asked": 64,
    "tables described": 16,
    "policies packed": 0,  # that is done elsewhere
}


def sites() -> Iterator[str]:
    """Yield where psserver calls run or submit of an engine: file and function."""
    for path in Path(psserver.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Attribute) and node.attr in ("run", "submit"):
                        name = ast.unparse(node.value).lstrip("_")
                        if name == "engine" or name.endswith(("._engine", ".engine")):
                            yield f"{path.name}:{function.name}"


def test_every_place_that_hands_work_to_the_engine_is_listed() -> None:
    assert sorted(set(sites())) == sorted(SITES)


class Meter:
    """An engine that counts the work of each call, and who asked for it."""

    def __init__(self) -> None:
        self.work: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.seen: set[str] = set()
        self._inside = False

    def run(self, call: Callable[[], Any]) -> Any:
        frame: Any = sys._getframe(1)
        while frame.f_code.co_filename == __file__ or frame.f_code.co_name.startswith("<"):
            frame = frame.f_back
        name, file = frame.f_code.co_name, Path(frame.f_code.co_filename)
        self.seen.add(f"{file.name}:{name}")
        return self.metered(call)

    async def submit(self, call: Callable[[], Any], deadline: float = 0.0) -> Any:
        return self.run(call)

    def metered(self, call: Callable[[], Any]) -> Any:
        self.work.clear()
        self._inside = True
        try:
            return call()
        finally:
            self._inside = False
            self.most |= self.work

    def counting(self, what: str, function: Any, size: Callable[..., int]) -> Any:
        def counted(*args: Any, **named: Any) -> Any:
            result = function(*args, **named)
            if self._inside:
                self.work[what] += size(result, *args)
            return result

        return counted


@contextmanager
def metered(meter: Meter) -> Iterator[None]:
    def stop(_: Any, __: Any, start: int, end: int, *___: Any) -> int:
        return end - start

    with pytest.MonkeyPatch.context() as patch:

        def count(what: str, where: Any, name: str, size: Callable[..., int]) -> None:
            patch.setattr(where, name, meter.counting(what, getattr(where, name), size))

        count("slots found", host, "find_changed", lambda result, _, start, *__: result[1] - start)
        for kernel in ("_idle_steps", "_score_lru"):
            count("slots swept", rules, kernel, stop)
        for method in ("copy", "measure"):
            count("rows copied", host.HostScan, method, lambda _, __, places, *___: len(places))
        count("rows deleted", Table, "delete", lambda _, table, keys, *__: len(keys))
        count("segments of counters", counter.Counters, "segment", lambda *_: 1)
        count("tables asked", evictor.Evictor, "due", lambda *_: 1)
        count("policies packed", timeline.Timeline, "pack", lambda *_: 1)
        count("tables described", Service, "_describe", lambda *_: 1)
        yield


@pytest.fixture(scope="module")
def meter(tmp_path_factory: pytest.TempPathFactory) -> Meter:
    """Run each kind of work on tables after mass evictions, and count."""
    meter, path = Meter(), tmp_path_factory.mktemp("slices")
    url = f"file://{path}/checkpoints"
    with Homes(path / "home", 1, url, segment_bytes=1 << 26, max_tables=1000) as homes:
        [node] = homes.nodes
        fill(homes)
        node.engine = node.home.flusher._engine = meter  # type: ignore[assignment]
        node._serve(None)
        with metered(meter):
            work(homes, node, meter)
    return meter


def fill(homes: Homes) -> None:
    """Tables of few rows in many slots, of counters that nobody has touched, and of rules."""
    [node] = homes.nodes
    for name in ("sparse", "full"):
        homes.create(schema(name, evictions=(eviction("step_ttl"), eviction("capacity_lru"))))
        for at in range(0, SLOTS, 50_000):
            homes.push(range(at, at + 50_000), table=name, step=5)
    for at in range(0, SLOTS - ROWS, 50_000):
        node.shard.delete(change(range(at, min(at + 50_000, SLOTS - ROWS)), table="sparse"))
    homes.create(schema("waiting", admission=make_admission("counter", {"threshold": 9})))
    for at in range(0, 4 * KEYS, KEYS):
        homes.push(range(at, at + KEYS), table="waiting")
    for number in range(TABLES):
        homes.create(schema(f"t{number}", evictions=(eviction("step_ttl"),)))
    homes.push([1], table="full", step=5000)
    node.home.flush()  # from now on nothing of the counters has changed
    homes.push([1], table="waiting")
    homes.push([2], table="full", step=5000)


def eviction(name: str) -> contract.Eviction:
    return rules.make_eviction(name, {"steps": 1000} if name == "step_ttl" else {"max_rows": 9})


def work(homes: Homes, node: Any, meter: Meter) -> None:
    """Every kind of work that takes slices."""
    shard, rows = node.shard, node.checkpoints.rows
    node.home.flush()
    for _ in rows.read_rows(pb.ReadRowsRequest(table="sparse")):
        pass
    analyses = analyses_of(shard)
    analyses._pace = Pace(meter, 0.0)  # type: ignore[arg-type]
    analyses._inspector._engine = meter  # type: ignore[assignment]
    for table in ("sparse", "waiting"):
        assert list(analyses.analyze(pb.AnalyzeRequest(table=table)))
    keys = np.arange(1000, dtype=np.uint64)
    analyses.inspect(pb.InspectRequest(table="sparse", keys=keys.tobytes()))
    request = pb.WriteCheckpointRequest(name="a", attempt="0" * 16)
    part = node.checkpoints.write(request, node.checkpoints.work.progress()).part
    node.checkpoints.completion.complete(
        pb.CompleteCheckpointRequest(name="a", attempt="0" * 16, parts=[part])
    )
    homes.load("a", "full", "loaded")
    many = np.arange(50_000, dtype=np.uint64)
    values = np.ones((len(many), 2), np.float32).tobytes()
    rows.write_rows(pb.WriteRowsRequest(table="loaded", width=2, keys=many.tobytes(), rows=values))
    serving = Service.__new__(Service)
    serving._shard, serving._engine, serving._log = shard, meter, None  # type: ignore[assignment]
    serving._limits = SimpleNamespace(stats=ServiceStats())  # type: ignore[assignment]
    anybody = Actor(Guard(), "/ps.v1.TableService/ListTables", "")
    listed = asyncio.run(serving.list_tables(pb.ListTablesRequest(), 0.0, anybody))
    assert len(listed.tables) == len(shard.tables())
    sweeper = Sweeper(shard, meter)  # type: ignore[arg-type]
    sweeper.evict(pb.EvictRequest(table="sparse"))
    meter.seen.add("sweeper.py:_run")  # its thread does nothing but this
    for _ in range(1000):
        meter.metered(shard.sweeps.tick)


def test_no_slice_does_more_than_its_bound(meter: Meter) -> None:
    assert {what: meter.most[what] for what in MOST if meter.most[what] > MOST[what]} == {}


def test_every_kind_of_work_was_counted(meter: Meter) -> None:
    assert {what for what, most in MOST.items() if most and not meter.most[what]} == set()
    sliced = {site for site, why in SITES.items() if why == SLICES}
    assert sliced - meter.seen == set()
