"""Compare a shard with log and base with a dict, over random orders of changes and crashes.

The expected state is kept for each version. After a power loss the newest versions may be missing,
and the shard must have exactly the state of the version that it recovered. Tables "v" and "w" have
rules for admission and eviction: see policyrules.py. Rows leave memory at random, and in some runs
the memory budget is so small that most rows are on disk: see tierrules.py.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from policyrules import RULE, RULED, THRESHOLD, Model, PolicyRules, settings_of
from stores import (
    DIM,
    MEMORY,
    Home,
    change,
    contents,
    copy_of,
    power_cut,
    push,
    schema,
)
from tierrules import KEYS, LITTLE, NAMES, STEPS, TierRules

from storage.disk import Disk
from storage.errors import DiskFull, LogFailed, OutOfMemory
from storage.slots import FREQUENCY, STEP, VERSION

LAZY = 1000.0  # seconds until the log syncs by itself: tests say when


class Faulty:
    """System calls that fail on demand."""

    def __init__(self) -> None:
        self.full = False
        self.broken = False
        self.disk = Disk(
            pwritev=self.pwritev, fdatasync=self.fdatasync, posix_fallocate=self.posix_fallocate
        )

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        if self.broken and len(buffers[0]) > 16:
            os.pwritev(fd, [buffers[0][:16]], offset)
            raise OSError(errno.EIO, "broken")
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        if self.broken:
            raise OSError(errno.EIO, "broken")
        os.fdatasync(fd)

    def posix_fallocate(self, fd: int, offset: int, size: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "full")
        os.posix_fallocate(fd, offset, size)


class Machine(PolicyRules, TierRules, RuleBasedStateMachine):
    """The state machine: all operations on a shard."""

    def __init__(self) -> None:
        super().__init__()
        where = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108
        self.root = Path(tempfile.mkdtemp(prefix="ps-machine-", dir=where))
        self.copies = 0
        self.model: dict[str, Model] = {}
        self.past: dict[int, tuple[Any, dict[str, Model], int]] = {}
        self.faults = Faulty()
        self.acknowledged = 0  # newest version that was awaited on disk
        self.deaths = set[tuple[int, ...]]()  # every tombstone that the shard has ever had
        self.clock = 1.5  # seconds
        self.pushed: dict[int, float] = {}  # the time of each version
        self.dropped = False  # whether a table was ever dropped

    @initialize(
        segment=st.sampled_from([4096, 1 << 14]),
        keep=st.sampled_from([0, 4096]),
        tombstones=st.sampled_from([0, 2, 1000]),
        memory=st.sampled_from([MEMORY, LITTLE]),
    )
    def begin(self, segment: int, keep: int, tombstones: int, memory: int) -> None:
        self.options: dict[str, Any] = {
            "segment_bytes": segment,
            "keep": (keep, 0.0),
            "max_tombstones": tombstones,
            "sync_seconds": LAZY,
            "disk": self.faults.disk,
            "memory_bytes": memory,
            "now": lambda: self.clock,
        }
        self.home = Home(self.root / "0", **self.options).open()
        self.remember()

    def teardown(self) -> None:
        if hasattr(self, "home"):
            self.abandon()
        shutil.rmtree(self.root)

    # ---- changes

    @rule(name=NAMES, keys=KEYS, value=st.integers(-8, 8), client=st.integers(0, 2), step=STEPS)
    def push(self, name: str, keys: list[int], value: int, client: int, step: int = 0) -> None:
        if name not in self.model:
            return
        version = self.home.shard.version + 1
        who = {"client": client, "sequence": version} if client else {}

        def apply() -> None:
            self.exchange(push(keys, float(value), table=name, step=step, **who))

        if self.change(apply):
            model = self.model[name]
            model.step = max(model.step, step)
            for key in keys:
                old, _, seen, _ = model.rows.get(key, (0.0, 0, 0, 0))
                seen += 1 + model.waiting.pop(key, (0, 0))[0]
                if name in RULED and key not in model.rows and seen < model.threshold:
                    model.waiting[key] = seen, version
                else:
                    model.rows[key] = (old - model.lr * value, version, seen, model.step)
            self.remember()

    @rule(name=NAMES, keys=KEYS, client=st.integers(0, 2))
    def delete(self, name: str, keys: list[int], client: int) -> None:
        if name not in self.model:
            return
        version = self.home.shard.version + 1
        who = {"client": client, "sequence": version} if client else {}
        if self.change(lambda: self.home.shard.delete(change(keys, table=name, **who))):
            for key in keys:
                self.model[name].rows.pop(key, None)
                self.model[name].waiting.pop(key, None)
            self.remember()

    @rule(name=NAMES)
    def create(self, name: str) -> None:
        made = schema(name, **settings_of(name, THRESHOLD, RULE))
        if name not in self.model and self.change(lambda: self.home.shard.create_table(made)):
            self.model[name] = Model()
            self.remember()

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        if name in self.model and self.change(lambda: self.home.shard.drop_table(name)):
            del self.model[name]
            self.dropped = True
            self.remember()

    @rule()
    def barrier(self) -> None:
        if self.change(lambda: self.home.shard.barrier("b")):
            self.remember()

    @rule(work=st.lists(st.tuples(NAMES, KEYS, st.booleans()), min_size=2, max_size=6))
    def burst(self, work: list[tuple[str, list[int], bool]]) -> None:
        for name, keys, pushed in work:
            self.create(name)
            if pushed:
                self.push(name, keys, 1, 1)
            else:
                self.delete(name, keys[:3], 2)

    @rule(name=NAMES, keys=KEYS, gone=KEYS)
    def delete_between_checkpoints(self, name: str, keys: list[int], gone: list[int]) -> None:
        self.create(name)
        self.push(name, keys, 2, 1)
        self.checkpoint()
        self.delete(name, gone[:2], 0)
        self.delete(name, keys[:1], 1)
        self.checkpoint()

    @rule(client=st.integers(1, 2))
    def repeat(self, client: int) -> None:
        """Repeat the client's newest push. The shard must recognize it."""
        shard = self.home.shard
        session = shard.sessions._sessions.get(client)
        if session is None or not self.model:
            return
        table = next(iter(self.model))
        sequence, version = max(session.versions.items())
        try:
            answer = shard.exchange([push([1], client=client, sequence=sequence, table=table)], [])
        except (DiskFull, LogFailed):
            return
        assert (answer.pushes[0].duplicate, answer.pushes[0].version) == (True, version)

    # ---- disk

    @rule()
    def sync(self) -> None:
        if not self.home.failures:
            self.home.log.sync(self.home.log.last)
            self.acknowledged = self.home.log.last

    @rule(full=st.booleans())
    def fill(self, full: bool) -> None:
        self.faults.full = full

    @rule()
    def checkpoint(self) -> None:
        if not self.home.failures:
            self.home.flush()
            self.acknowledged = max(self.acknowledged, self.home.base.state.version)  # type: ignore[union-attr]

    # ---- stops and crashes

    @precondition(lambda self: not self.home.failures)
    @rule()
    def reopen(self) -> None:
        self.faults.full = False
        self.home.close()
        self.come_back(self.home.directory, least=self.home.shard.version)

    @precondition(lambda self: not self.home.failures)
    @rule()
    def kill(self) -> None:
        """Kill the process: everything written must remain."""
        last = self.written()
        copy = copy_of(self.home.directory, self.fresh())
        self.abandon()
        self.come_back(copy, least=last)

    @precondition(lambda self: not self.home.failures)
    @rule(seed=st.integers(0, 2**32))
    def lose_power(self, seed: int) -> None:
        """Cut the power: everything synced must remain, and some of the rest may."""
        self.written()
        durable = self.home.log.durable
        copy = power_cut(self.home.directory, self.fresh(), random.Random(seed))
        self.abandon()
        self.come_back(copy, least=durable)

    @precondition(lambda self: not self.home.failures)
    @rule(moment=st.sampled_from(["add", "commit", "truncate", "end"]), power=st.booleans())
    def kill_in_a_checkpoint(self, moment: str, power: bool) -> None:
        """Crash in the middle of a flush."""
        home, target = self.home, self.fresh()
        last = self.written()
        taken: list[int] = []

        def take() -> None:
            if not taken:
                taken.append(home.log.durable if power else last)
                if power:
                    power_cut(home.directory, target, random.Random(last))
                else:
                    copy_of(home.directory, target)

        def before(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                take()
                return call(*args, **kwargs)

            return wrapped

        owner: Any = home.log if moment == "truncate" else home.base
        if moment != "end":
            setattr(owner, moment, before(getattr(owner, moment)))
        home.flush()
        if moment != "end":
            delattr(owner, moment)
        take()
        self.abandon()
        self.come_back(target, least=taken[0])

    @precondition(lambda self: not self.home.failures)
    @rule(name=NAMES)
    def break_the_disk(self, name: str) -> None:
        """Fail a write or sync: nothing more is acknowledged, and acknowledged changes remain."""
        self.written()
        least, home = self.acknowledged, self.home
        told: list[int] = []
        self.faults.broken = True
        if name in self.model:
            with suppress(LogFailed):  # if there was no room, it waited for a flush
                self.push(name, [1, 2], 1, 0)
        home.log.wait(home.log.last, True, lambda: told.append(home.log.last))
        if home.log.durable < home.log.last:
            while not home.failures:
                time.sleep(0.0005)
            assert told == []
            with pytest.raises(LogFailed):
                home.log.reserve(1)
        copy = copy_of(home.directory, self.fresh())
        self.abandon()
        self.come_back(copy, least=least)

    # ---- what must be true

    @invariant()
    def rows_are_the_dict(self) -> None:
        if not hasattr(self, "home"):
            return
        dump = self.home.shard.dump()
        assert sorted(dump) == sorted(self.model)
        assert {
            entry.schema.name: entry.schema.optimizer.lr for entry in self.home.shard._tables
        } == {name: model.lr for name, model in self.model.items()}
        for name, model in self.model.items():
            table, rows = dump[name], model.rows
            assert table.keys.tolist() == sorted(rows)
            assert table.rows.tolist() == [[rows[key][0]] * DIM for key in sorted(rows)]
            meta = [[*rows[key][1:]] for key in sorted(rows)]
            assert table.meta[:, [VERSION, FREQUENCY, STEP]].tolist() == meta
            self.check_waiting(name, model, table.counters.tolist())

    # ---- helpers

    def change(self, call: Callable[[], Any]) -> bool:
        """Return whether the change was made. No part of it may be made if there is no space."""
        before = self.home.shard.version
        try:
            call()
        except (DiskFull, OutOfMemory):  # memory may be taken by indexes and by bits of blocks
            assert self.faults.full or self.home.shard.budget.crowded
            assert contents(self.home.shard) == self.past[before][0]
            return False
        assert self.home.shard.version == self.home.log.last == before + 1
        return True

    def remember(self) -> None:
        model = {name: each.copy() for name, each in self.model.items()}
        shard, held = self.home.shard, contents(self.home.shard)
        self.pushed[shard.version] = self.clock
        self.past[shard.version] = held, model, shard.tombstone_horizon
        self.deaths.update(held["tombstones"])

    def written(self) -> int:
        """Write everything to the operating system and return the newest version."""
        log = self.home.log
        while log.written < log.last:
            time.sleep(0.0002)
        return log.last

    def fresh(self) -> Path:
        self.copies += 1
        return self.root / str(self.copies)

    def abandon(self) -> None:
        """Abandon the directory, as a killed process does."""
        try:
            self.home.log.close()
        except LogFailed:
            assert self.home.failures
        self.home.base.close()
        self.home.shard.close()
        shutil.rmtree(self.home.directory)

    def come_back(self, directory: Path, least: int) -> None:
        """Start from a directory. Versions after ``least`` may be missing."""
        most = self.home.log.last
        self.faults.full = self.faults.broken = False
        self.home = Home(directory, **self.options).open()
        version = self.home.shard.version
        assert least <= version <= most
        self.deaths = {dead for dead in self.deaths if dead[0] <= version}
        want, model, horizon = self.past[version]
        self.check_recovered(contents(self.home.shard), want, horizon)
        self.model = {name: each.copy() for name, each in model.items()}
        self.acknowledged = version  # opening synced it

    def check_recovered(self, held: dict[str, Any], want: dict[str, Any], horizon: int) -> None:
        """Compare a recovered shard with its state before, when ``horizon`` was the version up to
        which its tombstones might have been discarded.

        If a table was dropped, older tombstones of others may come back from the base, because the
        tombstones of that table no longer take their room. Then the horizon may be lower, too. All
        deletes that are newer than the horizon must have their tombstones.
        """
        now = self.home.shard.tombstone_horizon
        if not self.dropped:
            assert (held, now) == (want, horizon)
            return
        assert now <= horizon
        tables = {number for number, *_ in held["tables"]}
        deaths = {dead for dead in self.deaths if dead[1] in tables}
        found = set(held["tombstones"])
        assert {dead for dead in deaths if dead[0] > now} <= found <= deaths
        assert {**held, "tombstones": []} == {**want, "tombstones": []}


Machine.TestCase.settings = settings(
    max_examples=int(os.environ.get("PS_MACHINE_EXAMPLES", "30")),
    stateful_step_count=40,
    phases=(Phase.generate,),  # a failure is told as it is found: shrinking takes minutes
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
class TestMachine(Machine.TestCase):  # type: ignore[misc, valid-type]
    """The state machine as a unittest test case."""


def test_tombstones_of_a_dropped_table_take_no_room_after_a_restart() -> None:
    machine = Machine()
    try:
        machine.begin(4096, 0, 2, MEMORY)
        for name in ("t", "u"):
            machine.create(name)
            machine.push(name, [1, 2, 3], 1, 0)
        for key in (1, 2):
            machine.delete("u", [key], 0)
        machine.drop("u")
        machine.checkpoint()
        machine.delete("t", [1], 0)
        before = machine.home.shard.tombstone_horizon
        machine.reopen()
        assert machine.home.shard.tombstone_horizon < before
        machine.delete("t", [2], 0)
        machine.reopen()
        machine.rows_are_the_dict()
    finally:
        machine.teardown()
