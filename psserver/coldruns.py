"""Run exchanges on the engine whose rows may be on disk, or whose pushes need room in memory.

The engine is the thread that reads and writes all rows of a shard, so it must not wait for the
disk. An exchange therefore runs in three steps:

    1. on the engine: run it if all its rows are in memory and there is room for its pushes. Rows on
       disk count as in memory if their pieces of the disk are in the file cache, as far as it is
       known (see storage/residency.py). Otherwise hold it: change nothing, and find out which
       pieces of the disk it needs
    2. on an I/O thread: read these pieces into memory, and verify them. If there is no room in
       memory, wait for a flush, which writes changed rows to disk, so that they can leave memory
    3. on the engine: look up all rows again, and run it

Nothing stays reserved between the steps: rows may move meanwhile, and then step 3 may wait for the
disk after all, which is rare. Exchanges of one stream take effect in the order of their arrival:
while one is held, later ones of its stream are held too. Other streams overtake it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

from psproto.codec import Exchanged
from psserver.engine import Engine
from psserver.errors import DeadlinePassed, Draining
from psserver.pool import Pool
from psserver.requests import Pull, Push
from psserver.shard import ColdRead, Shard
from psserver.stats import ServiceStats
from psserver.tables import TableEntry
from storage.errors import Corrupt, DiskFull, NoRoom

MOST_FLUSHES = 16  # flushes that a push waits for; then it exceeds the memory budget
TRIM_SECONDS = 0.1  # seconds between two flushes that give memory back
LOOK_SECONDS = 0.002  # seconds between two checks whether a flush has ended
NOTHING: list[ColdRead] = []
MOST_PREFETCHES = 64  # prefetches that wait for the engine or an I/O thread; others are ignored


class Flushes(Protocol):
    """The part of the flusher that ``ColdRuns`` uses.

    rounds   number of flushes that ended since the start, failed ones included
    failure  why the last flush failed; "" if it did not
    """

    rounds: int
    failure: str

    def ask(self) -> None:
        """Begin a flush as soon as possible. Any thread may call this."""
        ...


class Lane:
    """Keeps the exchanges of one stream in order.

    held  number of exchanges of the stream that are held; only the engine changes it
    cold  whether the last exchange of the stream needed rows that are on disk only. The next one
          probably does too, so it is not worth trying on the event loop
    """

    __slots__ = ("cold", "held")

    def __init__(self) -> None:
        self.held = 0
        self.cold = False


class Held:
    """An exchange that was not run yet. Nothing of it was applied.

    deadline  monotonic seconds; after it the exchange is not started
    reads     the pieces of the disk that it needs
    warmed    done when the pieces are in memory; None: it needs none
    no_room   why its pushes could not be applied; None: there was room, or it was not tried
    since     time at which it was held, in seconds of ``time.perf_counter``
    left      whether it has left its lane, because it ran or failed
    flushes   number of flushes that it has waited for
    """

    __slots__ = (
        "deadline", "flushes", "lane", "left", "no_room", "pulls", "pushes", "reads", "since",
        "warmed",
    )  # fmt: skip

    def __init__(
        self,
        pushes: Sequence[Push],
        pulls: Sequence[Pull],
        deadline: float,
        lane: Lane,
        reads: list[ColdRead],
        no_room: NoRoom | None,
    ) -> None:
        self.pushes, self.pulls, self.deadline, self.lane = pushes, pulls, deadline, lane
        self.reads, self.no_room = reads, no_room
        self.warmed: Future[None] | None = None
        self.since = time.perf_counter()
        self.left = False
        self.flushes = 0
        lane.held += 1

    def leave(self) -> None:
        """Let later exchanges of the stream run. Must run on the engine."""
        if not self.left:
            self.left = True
            self.lane.held -= 1


class ColdRuns:
    """Runs exchanges on the engine, after their rows were read from disk. Must be used on the loop.

    threads  number of I/O threads
    stats    counts the exchanges that waited for the disk
    flushes  the flusher of the shard; None: the shard has no data directory
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        threads: int,
        stats: ServiceStats,
        flushes: Flushes | None,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._pool = Pool("cold reads", threads)
        self._stats = stats
        self._flushes = flushes
        self._prefetching = 0  # prefetches that wait or are read
        self._closed = False
        self._trimming: asyncio.Task[None] | None = None  # the task that ``_trim`` began
        self._balancing = False  # a call of ``_balance`` waits for the engine
        self._relieving = False  # a call of ``_relieve`` waits for the engine

    def close(self, seconds: float) -> None:
        """Stop the I/O threads; wait at most ``seconds`` for them."""
        self._closed = True
        if self._trimming is not None:
            self._trimming.get_loop().call_soon_threadsafe(self._trimming.cancel)
        self._pool.close(seconds)

    def submit(
        self,
        pushes: Sequence[Push],
        pulls: Sequence[Pull],
        deadline: float,
        lane: Lane | None,
        *,
        at_once: bool,
    ) -> asyncio.Future[Exchanged | Held]:
        """Run an exchange on the engine, or hold it: then pass the result to ``finish``.

        deadline  monotonic seconds; after it the exchange is not started
        lane      keeps it in order with others; None: it has no order
        at_once   if the engine is idle, the event loop itself may do this step
        """
        if self._flushes is None:
            return self._engine.submit(
                lambda: self._exchange(pushes, pulls), deadline, at_once=at_once
            )
        if lane is None:
            lane = Lane()
        work = partial(self._attempt, pushes, pulls, deadline, lane)
        return self._engine.submit(work, deadline, at_once=at_once and not lane.cold)

    async def finish(self, held: Held) -> Exchanged:
        """Run an exchange that is held, once its rows are in memory and there is room.

        Held exchanges of one lane must be finished one after the other, in the order of ``submit``.
        Raises the errors of ``Shard.exchange``, Corrupt if a row on disk is damaged, DiskFull if
        rows cannot leave memory because the disk is full, and DeadlinePassed.
        """
        try:
            while True:
                if held.warmed is not None:
                    await asyncio.wrap_future(held.warmed)
                    self._count_wait(held)
                if held.no_room is not None:
                    await self._flush(held)
                done = await self._engine.submit(lambda: self._again(held))
                if not isinstance(done, Held):
                    if held.flushes and self._shard.budget.spare < 0:
                        self._begin_trim()
                    return done
        finally:
            if not held.left:
                self._engine.submit(held.leave)

    def _count_wait(self, held: Held) -> None:
        """Count once, for each table, that ``held`` has waited until its rows were read."""
        seconds = time.perf_counter() - held.since
        for name in {read.table for read in held.reads}:
            self._stats.waited(name, seconds)
        held.warmed = None

    async def _flush(self, held: Held) -> None:
        """Wait until a flush has ended, so that rows can leave memory."""
        flushes = self._flushes
        assert flushes is not None
        before = flushes.rounds
        flushes.ask()
        while flushes.rounds == before:
            if self._closed:
                raise Draining("the server is stopping")
            if time.monotonic() > held.deadline:
                raise DeadlinePassed("the deadline passed before there was room in memory")
            await asyncio.sleep(LOOK_SECONDS)
        held.flushes += 1
        if flushes.failure:
            raise DiskFull(
                "memory", 0, f"changed rows cannot be written to disk: {flushes.failure}"
            )

    def _begin_trim(self) -> None:
        if self._trimming is None or self._trimming.done():
            self._trimming = asyncio.ensure_future(self._trim())

    async def _trim(self) -> None:
        """Flush until the memory budget is no longer exceeded. One push may have exceeded it."""
        flushes, budget = self._flushes, self._shard.budget
        assert flushes is not None
        while budget.spare < 0:
            before = flushes.rounds
            flushes.ask()
            while flushes.rounds == before:
                await asyncio.sleep(LOOK_SECONDS)
            while await self._engine.submit(self._shard.pushroom.trim):
                pass
            await asyncio.sleep(TRIM_SECONDS)

    # ---- on the engine

    def _attempt(
        self, pushes: Sequence[Push], pulls: Sequence[Pull], deadline: float, lane: Lane
    ) -> Exchanged | Held:
        """Run an exchange if it need not wait, or hold it and begin to read its rows.

        The event loop holds every exchange with rows on disk, because a page may have left memory.
        """
        shard, needed, no_room, ready = self._shard, NOTHING, None, True
        if shard.budget.cold_rows and (reads := shard.cold_reads(pushes, pulls)):
            needed = [read for read in reads if not read.pages.empty]
            ready = not needed and self._engine.is_here()
            lane.cold = True
        elif lane.cold:
            lane.cold = not pushes and all(pull.prefetch for pull in pulls)
        if ready and not lane.held:
            try:
                return self._run(pushes, pulls)
            except NoRoom as error:
                no_room = error.with_traceback(None)
        held = Held(pushes, pulls, deadline, lane, needed, no_room)
        if needed and self._closed:
            held.leave()
            raise Draining("the server is stopping")
        if needed:
            held.warmed = self._pool.submit(_warm, needed)
        return held

    def _again(self, held: Held) -> Exchanged | Held:
        """Run a held exchange, or return it if there is still no room for its pushes."""
        no_room = held.no_room
        exceed = no_room is not None and held.flushes >= (1 if no_room.oversized else MOST_FLUSHES)
        try:
            if time.monotonic() > held.deadline:
                raise DeadlinePassed("the deadline passed before the rows were in memory")
            self._shard.settle(held.reads)
            done = self._run(held.pushes, held.pulls, exceed=exceed)
        except NoRoom as error:
            held.no_room = error.with_traceback(None)
            return held
        except BaseException:
            held.leave()
            raise
        held.leave()
        return done

    def _run(
        self, pushes: Sequence[Push], pulls: Sequence[Pull], *, exceed: bool = False
    ) -> Exchanged:
        """Run an exchange; begin its prefetches; see to it that the next push finds room."""
        shard = self._shard
        done = self._exchange(pushes, pulls, exceed=exceed)
        if pushes:
            narrow = shard.pushroom.narrow and not self._relieving
            if narrow and (tight := shard.pushroom.tight(pushes)):
                self._relieving = True
                self._engine.post(partial(self._relieve, tight))
        for pull in pulls:
            if pull.prefetch and shard.budget.cold_rows and self._prefetching < MOST_PREFETCHES:
                self._prefetching += 1
                copied = replace(pull, keys=pull.keys.copy())  # so that the message can be freed
                self._engine.post(partial(self._prefetch, copied))  # the reply must not wait
        return done

    def _exchange(
        self, pushes: Sequence[Push], pulls: Sequence[Pull], *, exceed: bool = False
    ) -> Exchanged:
        """Run an exchange, and see to it that rows move to GPU memory or back later."""
        shard = self._shard
        done = shard.exchange(pushes, pulls, exceed=exceed)
        if shard.gpu is not None and not self._balancing:
            tables = {push.table for push in pushes} | {pull.table for pull in pulls}
            if entries := shard.pushroom.unbalanced(tables):
                self._balancing = True
                self._engine.post(partial(self._balance, entries))
        return done

    def _balance(self, entries: Sequence[TableEntry]) -> None:
        """Move some rows of tables. Goes on while nobody waits for the engine."""
        idle = not self._engine.waiting
        self._balancing = False  # so that an error does not end this for good
        again = self._shard.pushroom.balance(entries, idle=idle)
        self._balancing = bool(again) and idle and not self._closed
        if self._balancing:
            self._engine.post(partial(self._balance, again))

    def _relieve(self, tight: Sequence[TableEntry]) -> None:
        self._relieving = False  # so that an error does not end this for good
        tight = self._shard.pushroom.relieve(tight)
        self._relieving = bool(tight)
        if tight:
            self._engine.post(partial(self._relieve, tight))

    def _prefetch(self, pull: Pull) -> None:
        """Begin to read the rows of a pull that are on disk."""
        self._prefetching -= 1
        if self._closed:
            return
        reads = self._shard.cold_reads([], [pull], prefetch=True)
        reads = [read for read in reads if not read.pages.empty]
        if not reads:
            return
        self._prefetching += 1

        def ended(_: Future[None]) -> None:
            self._engine.post(lambda: self._prefetched(reads))

        self._pool.submit(_warm, reads).add_done_callback(ended)

    def _prefetched(self, reads: list[ColdRead]) -> None:
        """Remember what a prefetch has verified. Whoever reads a damaged row gets the error."""
        self._prefetching -= 1
        with suppress(Corrupt):
            self._shard.settle(reads)


def _warm(reads: Sequence[ColdRead]) -> None:
    """Read the pieces of the disk into memory that some requests need, and verify them."""
    for read in reads:
        read.pages.warm()
