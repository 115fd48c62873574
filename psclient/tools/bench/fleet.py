"""Fleet: the tables and the processes of a load test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from typing import Any, Self

import numpy as np

from psclient.client import Client
from psclient.errors import (
    DeadlineExceeded,
    InvalidArgument,
    PsError,
    TableNotFound,
    Unavailable,
)
from psclient.pending import Pending
from psclient.tls import Tls
from psclient.tools.bench.draws import key_of
from psclient.tools.bench.latencies import Latencies, require
from psclient.tools.bench.plan import Plan, check_run
from psclient.tools.bench.result import Result, Second

HEADSTART = 0.3  # seconds from the order to start until all processes start
FILL = 20_000  # rows per push while tables are filled
AHEAD = 4  # pushes in flight while tables are filled
END_SECONDS = 3.0  # for a process to end, before it is killed
DROP_SECONDS = 10.0  # timeout of a request that drops a table at the end

OnSecond = Callable[[Second], Any]
OnFill = Callable[[int, int], Any]  # called with (rows filled, rows to fill)


class GeneratorFailed(PsError):
    """A process of the load generator ended early."""


class Fleet:
    """The tables and processes of a load test. Use it in a ``with`` statement.

    addresses  of the shards, as Client takes them
    plan       what to send
    options    further arguments of Client, for example {"lane": "never"}; those that the plan has
               (timeout, wire, retry_refused) are ignored
    reuse      use tables that exist already; otherwise InvalidArgument is raised if one exists
    keep       keep the tables at the end. Tables that existed before are always kept
    fill       create a row for each key before the first run, so that pulls find rows
    on_fill    called while the tables are filled

    ``run`` may be called repeatedly, by one thread at a time. Several fleets may run at once, for
    example one that overloads a server and one whose latency suffers.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        plan: Plan,
        *,
        options: Mapping[str, Any] | None = None,
        reuse: bool = False,
        keep: bool = False,
        fill: bool = True,
        on_fill: OnFill | None = None,
    ) -> None:
        require()
        self.plan = plan
        self.row_bytes = 0.0  # memory per row, as the shards report it
        self._addresses = addresses if isinstance(addresses, str) else list(addresses)
        self._options = dict(options or {})
        self._reuse, self._keep, self._fill, self._on_fill = reuse, keep, fill, on_fill
        self._created: list[str] = []
        self._workers: list[_Worker] = []
        self._rounds = 0
        self.interrupted = False  # whether Ctrl-C ended a run early
        self.left: dict[str, str] = {}  # tables that could not be dropped at the end, and why

    def __enter__(self) -> Self:
        try:
            self._prepare()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        rate: float,
        seconds: float,
        *,
        warmup: float = 1.0,
        on_second: OnSecond | None = None,
        batch: int | None = None,
    ) -> Result:
        """Send requests, and return what was measured.

        rate       requests per second of all clients together, in an open loop; 0: each client
                   sends its next request when it has the answer to the last one (closed loop)
        seconds    duration that is counted
        warmup     seconds before, in which requests are sent but not counted
        on_second  called after the warm-up and after each second, with the sums of all processes
        batch      keys per request and table, at most those of the plan; None: those of the plan

        Ctrl-C ends the run early: the result has the seconds that have passed, and ``interrupted``
        is True from then on. KeyboardInterrupt is raised if the warm-up is not over, or at a second
        Ctrl-C, which does not wait for answers. Raises GeneratorFailed if a process ends early.
        """
        check_run(rate, seconds, warmup)
        self._rounds += 1
        task = {
            "rate": rate / len(self._workers),
            "start": time.monotonic() + HEADSTART,
            "warmup": warmup,
            "seconds": seconds,
            "round": self._rounds,
            "batch": batch or self.plan.batch,
        }
        inbox: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        for worker in self._workers:
            worker.begin(task, inbox)
        return self._gather(inbox, rate, warmup, on_second)

    def close(self) -> None:
        """End the processes, and drop the tables that were created. Idempotent.

        If a table cannot be dropped, the measured figures are still good: nothing is raised, and
        the table is in ``left``.
        """
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.end()
        created, self._created = self._created, []
        if not created or self._keep:
            return
        with self._client(DROP_SECONDS) as client:
            for name in created:
                try:
                    client.drop_table(name)
                except TableNotFound:
                    continue
                except (Unavailable, DeadlineExceeded) as error:
                    self.left |= dict.fromkeys(created[created.index(name) :], str(error))
                    return
                except PsError as error:
                    self.left[name] = str(error)

    # ---- tables

    def _client(self, timeout: float = 60.0) -> Client:
        return Client(self._addresses, **{**self._options, "timeout": timeout})

    def _prepare(self) -> None:
        """Create and fill the tables."""
        with self._client() as client:
            there = {each.name for each in client.list_tables()} | set(client.incomplete_tables())
            for name in self.plan.names:
                if name in there and not self._reuse:
                    raise InvalidArgument(
                        f"table {name!r} exists: choose another --prefix, or use the table with"
                        " --reuse; a load test changes its rows"
                    )
            for name in self.plan.names:
                if name not in there:
                    self._created.append(name)
                    client.create_table(
                        name,
                        self.plan.dim,
                        optimizer=self.plan.optimizer,
                        durability=self.plan.durability,
                    )
            if self._fill:
                self._fill_tables(client)
            infos = [client.describe_table(name) for name in self.plan.names]
            rows = sum(each.rows for each in infos)
            self.row_bytes = sum(each.bytes for each in infos) / max(rows, 1)

    def _fill_tables(self, client: Client) -> None:
        """Push gradients of zero to all keys, which creates their rows."""
        plan, done, flying = self.plan, 0, list[Pending]()
        zeros = np.zeros((min(FILL, plan.keys), plan.dim), np.float32)
        for name in plan.names:
            for low in range(0, plan.keys, FILL):
                keys = key_of(np.arange(low, min(low + FILL, plan.keys)))
                push = {name: (keys, zeros[: len(keys)])}
                flying.append(client.start_exchange(push, {}))
                if len(flying) >= AHEAD:
                    flying.pop(0).result()
                done += len(keys)
                if self._on_fill is not None:
                    self._on_fill(done, plan.keys * plan.tables)
        for each in flying:
            each.result()

    # ---- processes

    def _start(self) -> None:
        """Start the processes, and wait until their clients are connected."""
        plan = self.plan
        mine = {"timeout": plan.timeout, "wire": plan.wire, "retry_refused": plan.retry_refused}
        options = {**self._options, **mine}
        if isinstance(tls := options.get("tls"), Tls):
            options["tls"] = asdict(tls)
        inbox: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        for number in range(plan.processes):
            task = {
                "plan": plan.as_json(),
                "process": number,
                "clients": _part(plan.clients, plan.processes, number),
                "threads": _part(plan.in_flight, plan.processes, number),
                "addresses": self._addresses,
                "options": options,
            }
            self._workers.append(_Worker(number))
            self._workers[-1].begin(task, inbox)
        for _ in self._workers:
            self._take(inbox)

    def _take(
        self, inbox: SimpleQueue[tuple[int, dict[str, Any] | None]]
    ) -> tuple[int, dict[str, Any]]:
        """Return the number of a process and its next message. Raises GeneratorFailed."""
        number, message = inbox.get()
        if message is None:
            raise GeneratorFailed(self._workers[number].problem())
        return number, message

    def _gather(
        self,
        inbox: SimpleQueue[tuple[int, dict[str, Any] | None]],
        rate: float,
        warmup: float,
        on_second: OnSecond | None,
    ) -> Result:
        """Merge the messages of all processes until each has ended its run."""
        done: list[dict[str, Any]] = []
        parts: dict[int, list[dict[str, Any]]] = {}
        series: list[Second] = []
        while len(done) < len(self._workers):
            _, message = self._take_or_stop(inbox)
            if "done" in message:
                done.append(message["done"])
                continue
            second = message["second"]["second"]
            parts.setdefault(second, []).append(message["second"])
            if len(parts[second]) == len(self._workers) and second == len(series):
                length = parts[second][0]["seconds"] if second else warmup or 1.0
                series.append(_second(parts[second], max(length, 1e-3)))
                if on_second is not None:
                    on_second(series[-1])
        seconds = min(each["seconds"] for each in done)
        if not seconds:
            raise KeyboardInterrupt
        return _result(done, series, rate=rate, seconds=seconds, warmup=warmup)

    def _take_or_stop(
        self, inbox: SimpleQueue[tuple[int, dict[str, Any] | None]]
    ) -> tuple[int, dict[str, Any]]:
        """Return ``_take``; at the first Ctrl-C, end the run of all processes."""
        try:
            found = self._take(inbox)
        except KeyboardInterrupt:
            if self.interrupted:
                raise
            self.interrupted = True
            self._interrupt()
            return self._take_or_stop(inbox)
        if self.interrupted:
            self._interrupt()  # again: a process may have begun its run only now
        return found

    def _interrupt(self) -> None:
        for worker in self._workers:
            worker.process.send_signal(signal.SIGINT)


def _part(whole: int, count: int, number: int) -> int:
    """Return the share of part ``number`` if ``whole`` is divided among ``count`` parts."""
    return whole // count + (number < whole % count)


def _second(parts: Sequence[dict[str, Any]], seconds: float) -> Second:
    """Sum the messages of all processes about one second, which took ``seconds``."""
    errors: dict[str, int] = {}
    for part in parts:
        for code, count in part["errors"].items():
            errors[code] = errors.get(code, 0) + count
    names = ("offered", "ok", "refused", "keys", "bytes")
    sums = {name: sum(part[name] for part in parts) for name in names}
    return Second(
        second=parts[0]["second"],
        seconds=seconds,
        errors=errors,
        latency=Latencies.merged(part["latency"] for part in parts),
        **sums,
    )


def _result(done: Sequence[dict[str, Any]], series: Sequence[Second], **run: float) -> Result:
    """Sum the totals of all processes."""
    seconds = run["seconds"]

    def total(name: str) -> int:
        return sum(int(each[name]) for each in done)

    def by_name(name: str) -> dict[str, Latencies]:
        names = sorted({key for each in done for key in each[name]})
        return {
            key: Latencies.merged(each[name][key] for each in done if key in each[name])
            for key in names
        }

    kinds = by_name("latency")
    return Result(
        rate=run["rate"],
        seconds=seconds,
        warmup=run["warmup"],
        offered=total("offered") / seconds,
        achieved=total("ok") / seconds,
        keys=total("keys") / seconds,
        bytes=total("bytes") / seconds,
        refused=total("refused"),
        waited=total("waited"),
        latency=Latencies.merged(each.encoded() for each in kinds.values()),
        service=Latencies.merged(each["service"] for each in done),
        kinds=kinds,
        errors=by_name("errors"),
        lag=Latencies.merged(each["lag"] for each in done),
        cores=[each["cores"] for each in done],
        series=series,
    )


@dataclass(slots=True)
class _Worker:
    """One process, and the thread that reads its messages."""

    number: int
    process: subprocess.Popen[str] = field(init=False)
    _inbox: SimpleQueue[tuple[int, dict[str, Any] | None]] = field(init=False)
    _told: list[str] = field(default_factory=list)  # last lines of its standard error
    _threads: list[threading.Thread] = field(default_factory=list)  # read what it writes

    def __post_init__(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "psclient.tools.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self._inbox = SimpleQueue()
        for work in (self._read, self._listen):
            self._threads.append(threading.Thread(target=work, daemon=True))
            self._threads[-1].start()

    def begin(
        self, task: dict[str, Any], inbox: SimpleQueue[tuple[int, dict[str, Any] | None]]
    ) -> None:
        """Send a line to the process; its messages go to ``inbox`` from now on."""
        self._inbox = inbox
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        except OSError:
            inbox.put((self.number, None))

    def problem(self) -> str:
        """Return why the process ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
            self._threads[1].join(END_SECONDS)
        last = self._told[-1] if self._told else "no message"
        return (
            f"process {self.number} of the load generator ended with status"
            f" {self.process.poll()}: {last}"
        )

    def end(self) -> None:
        """End the process, which may be in a run; kill it if it does not end."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGINT)
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        """Put the messages of the process into the inbox, until its output ends."""
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._inbox.put((self.number, json.loads(line)))
        self._inbox.put((self.number, None))

    def _listen(self) -> None:
        """Keep the last lines of what the process writes to its standard error."""
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self._told = [*self._told[-20:], line.strip()]
