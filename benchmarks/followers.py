"""Processes that follow a table, and a thread that watches when versions are on disk.

Both record (version, monotonic seconds), so that they can be compared with the times of pushes.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from psclient import Follower
from psclient.changes import Change
from psproto import ps_pb2 as pb

FOLLOWERS = 4


class Followers:
    """FOLLOWERS processes that follow a table.

    pids  process id of each follower
    """

    def __init__(self, address: str, table: str) -> None:
        """Start the processes; return when all have the rows of the table."""
        context = multiprocessing.get_context("spawn")
        self._mailboxes = [context.SimpleQueue() for _ in range(FOLLOWERS)]
        self._answers = context.SimpleQueue()
        self._processes = [
            context.Process(target=_follow, args=(n, address, table, box, self._answers))
            for n, box in enumerate(self._mailboxes)
        ]
        for process in self._processes:
            process.start()
        answers = (self._answers.get() for _ in self._processes)
        self.pids = {number: pid for number, pid, _ in answers}
        for box in self._mailboxes:
            box.put("begin")

    def finish(self, last: int) -> dict[int, NDArray[np.float64]]:
        """Wait until all followers have version ``last``, and end the processes.

        Returns what each follower saw, by its number; see ``delays``.
        """
        for box in self._mailboxes:
            box.put(last)
        answers = (self._answers.get() for _ in self._processes)
        seen = {number: times for number, times, _ in answers}
        for process in self._processes:
            process.join()
        return seen


def _follow(number: int, address: str, table: str, mailbox: Any, answers: Any) -> None:
    """Follow a table, and report when each version became visible. The body of a process.

    number   index of the follower
    mailbox  queue from which it gets a start signal, then the last version to wait for
    answers  queue for (number, process id, rows), then (number, float64[n, 2] of version and
             monotonic seconds, rows)
    """
    seen: list[tuple[int, float]] = []

    def note(change: Change) -> None:
        if not change.more:
            seen.append((change.version, time.monotonic()))

    with Follower([address], tables=[table], on_change=note) as follower:
        follower.wait_for([0], 120)
        answers.put((number, os.getpid(), len(follower)))
        mailbox.get()
        follower.wait_for([mailbox.get()], 60)
        answers.put((number, np.array(seen), len(follower)))


@contextmanager
def watching_disk(address: str) -> Iterator[list[tuple[int, float]]]:
    """Yield a list that receives (durable version, monotonic seconds) during a block.

    Asks the server every 2 ms, because waiting for a version would make the server sync its log
    earlier.
    """
    reached: list[tuple[int, float]] = []
    done = threading.Event()
    watch = threading.Thread(target=_watch_disk, args=(address, done, reached))
    watch.start()
    try:
        yield reached
    finally:
        done.set()
        watch.join()


def _watch_disk(address: str, done: threading.Event, reached: list[tuple[int, float]]) -> None:
    """Append (durable version, monotonic seconds) to ``reached`` until ``done`` is set."""
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ps.v1.InfoService/GetServerInfo")
        while not done.wait(0.002):
            answer = pb.GetServerInfoResponse.FromString(ask(b"", timeout=30))
            reached.append((answer.durable_version, time.monotonic()))
