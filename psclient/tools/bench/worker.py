"""Process that sends requests, started by Fleet: python -m psclient.tools.bench.worker

It reads one JSON object per line from its standard input and writes one per line to its standard
output. The first line that it reads is its task, see ``main``; it answers {"ready": true} once its
clients are connected. Each further line is a run, see ``Run``. During a run it writes a line
{"second": {...}} per second, and at the end {"done": {...}}. SIGINT ends the run early: it is as if
the run had been planned so short. The process ends when its input ends.

A thread takes the next request from the schedule before it is due, waits until it is due, sends it
and waits for its answer. So no thread hands requests to others, and a thread that is free starts
its request in time. If no thread is free, because ``in_flight`` requests are unanswered, the next
request starts late; its latency counts from its intended start all the same.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import threading
import time
from collections import deque
from typing import Any, NamedTuple, Protocol

import numpy as np

from psclient.client import Client
from psclient.errors import (
    DeadlineExceeded,
    InvalidArgument,
    PsError,
    ResourceExhausted,
    ServerFailure,
    Unavailable,
)
from psclient.tls import Tls
from psclient.tools.bench.arrivals import Arrivals
from psclient.tools.bench.latencies import Latencies
from psclient.tools.bench.mixes import Mix, Request, Sender
from psclient.tools.bench.plan import Plan, plan_of

SWITCH_SECONDS = 0.0005  # a thread that computes lets others run after this time
NAMES = {  # of errors without a reason
    DeadlineExceeded: "DEADLINE_EXCEEDED",
    InvalidArgument: "INVALID_ARGUMENT",
    ResourceExhausted: "RESOURCE_EXHAUSTED",
    ServerFailure: "SERVER_FAILURE",
    Unavailable: "UNAVAILABLE",
}
UNSENT = "NOT_SENT"  # error of a request that was due, but not sent before the end of the run
CONNECT_SECONDS = 60.0  # for the first pull of a client
NOTICE = 0.5  # seconds after which a thread that waits notices that the run was stopped


class Sent(NamedTuple):
    """What became of one request. All times are monotonic seconds."""

    intended: float  # when it was due
    started: float  # when it was sent
    ended: float  # when its answer or its error arrived
    waited: bool  # whether it was due before a thread was free to send it
    kind: str
    error: str  # code; "": it succeeded
    refused: bool  # the server asked to try again later
    keys: int
    bytes: int


class Clock(Protocol):
    """What a run needs of the module ``time``."""

    def monotonic(self) -> float:
        """Return the time in seconds."""

    def sleep(self, seconds: float, /) -> None:
        """Return after this time."""


class Run:
    """One run of a process: requests at a rate, or from clients that wait for each answer.

    task     {"rate": requests per second of this process, 0: closed loop; "start": monotonic
             seconds at which all processes start; "warmup": seconds that are not counted;
             "seconds": seconds that are counted, after the warm-up; "round": number of the run;
             "batch": keys per request and table}
    senders  one per client
    threads  number of requests in flight at most
    clock    tells the time, and waits
    """

    def __init__(
        self,
        task: dict[str, Any],
        senders: list[Sender],
        threads: int,
        mix: Mix,
        seed: int,
        clock: Clock = time,
    ) -> None:
        self._clock = clock
        self._closed = task["rate"] == 0
        self._start = task["start"]
        self._first = self._start + task["warmup"]
        self._end = self._first + task["seconds"]
        self._mix = mix
        mix.batch = task["batch"]
        length = task["warmup"] + task["seconds"]
        self._arrivals = Arrivals(max(task["rate"], 1e-9), length, (seed, task["round"], 1))
        self._lock = threading.Lock()
        self._sent: deque[Sent] = deque()
        self._later: list[Sent] = []  # ended after the second that was told last
        self._offered: deque[float] = deque()
        self._threads = [
            threading.Thread(target=self._work, args=(senders[i % len(senders)],), daemon=True)
            for i in range(len(senders) if self._closed else threads)
        ]

    def run(self) -> None:
        """Send all requests; write the lines of the seconds and of the result."""
        for thread in self._threads:
            thread.start()
        totals, second = Totals(self._first), 0
        self._wait(self._first)
        cpu, began = time.process_time(), time.monotonic()
        while self._first + second < self._end:
            self._tell(totals, second)
            second += 1
            self._wait(self._first + second)
        cpu = (time.process_time() - cpu) / max(time.monotonic() - began, 1e-9)
        for thread in self._threads:
            thread.join()
        self._tell(totals, second)
        seconds = max(self._end - self._first, 0.0)
        write({"done": {**totals.as_json(), "seconds": seconds, "cores": cpu}})

    def stop(self) -> None:
        """End the run now, unless it has ended. Called by a signal handler."""
        self._end = min(self._end, time.monotonic())

    def _wait(self, until: float) -> None:
        """Wait until this time or the end of the run."""
        while (left := min(until, self._end) - self._clock.monotonic()) > 0:
            self._clock.sleep(min(left, NOTICE))

    def _tell(self, totals: Totals, second: int) -> None:
        """Add the requests that ended since the last call to the totals, and write the line of a
        second: the requests that ended by its end and are in no line yet.
        """
        new, offered = [self._sent.popleft() for _ in range(len(self._sent))], []
        until = min(self._first + second, self._end)
        while self._offered and self._offered[0] < until:  # those that are due; they are ascending
            offered.append(self._offered.popleft())
        totals.add(new, offered, self._end)
        known = self._later + new
        sent = [each for each in known if each.ended < until]
        self._later = [each for each in known if each.ended >= until]
        part = Latencies()
        good = [each for each in sent if not each.error]
        part.record([each.ended - each.intended for each in good])
        errors: dict[str, int] = {}
        for each in sent:
            if each.error:
                errors[each.error] = errors.get(each.error, 0) + 1
        line = {
            "second": second,
            "seconds": min(1.0, self._end - self._first - second + 1) if second else 0.0,
            "refused": sum(each.refused for each in sent),
            "offered": len(offered),
            "ok": len(good),
            "keys": sum(each.keys for each in good),
            "bytes": sum(each.bytes for each in good),
            "errors": errors,
            "latency": part.encoded(),
        }
        write({"second": line})

    def _work(self, sender: Sender) -> None:
        """Send requests until the run ends. A thread runs this method."""
        while (due := self._take()) is not None:
            intended, request = due
            waited = self._clock.monotonic() > intended and not self._closed
            self._wait(intended)
            if intended >= self._end:  # the run was ended early
                return
            if (pause := self._send(sender, intended, waited, request)) and self._closed:
                self._wait(self._clock.monotonic() + pause)

    def _take(self) -> tuple[float, Request] | None:
        """Return the next request and when it is due; None: the run is over."""
        with self._lock:
            now = self._clock.monotonic()
            if self._closed:
                if now >= self._end:
                    return None
                return max(now, self._start), self._mix.next()
            if now >= self._end:
                self._leave()
                return None
            due = self._arrivals.next()
            if due is None:
                return None
            self._offered.append(self._start + due)
            return self._start + due, self._mix.next()

    def _leave(self) -> None:
        """Count the requests that were due and not sent; the caller holds the lock."""
        while (due := self._arrivals.next()) is not None:
            intended = self._start + due
            if intended >= self._end:  # the run was ended early
                return
            self._offered.append(intended)
            sent = Sent(intended, self._end, self._end, True, "", UNSENT, False, 0, 0)
            self._sent.append(sent)

    def _send(self, sender: Sender, intended: float, waited: bool, request: Request) -> float:
        """Send a request and record it; return the seconds that the server asked to pause."""
        error, refused, keys, size, pause = "", False, 0, 0, 0.0
        started = self._clock.monotonic()
        try:
            keys, size = sender.send(request)
        except PsError as failure:
            error, pause = code_of(failure), failure.retry_after or 0.0
            refused = failure.retry_after is not None
        ended = self._clock.monotonic()
        if self._closed:
            self._offered.append(intended)
        kind = request.kind
        self._sent.append(Sent(intended, started, ended, waited, kind, error, refused, keys, size))
        return pause


class Totals:
    """Sums of a run, without its warm-up.

    first  monotonic seconds; requests that were due earlier do not count
    """

    def __init__(self, first: float) -> None:
        self._first = first
        self._latency: dict[str, Latencies] = {}  # by kind, from the intended start
        self._service = Latencies()  # from the actual start
        self._lag = Latencies()  # how late free threads started their requests
        self._errors: dict[str, Latencies] = {}
        self._counts = {
            name: 0 for name in ("offered", "ok", "sent", "keys", "bytes", "refused", "waited")
        }

    def add(self, sent: list[Sent], offered: list[float], end: float) -> None:
        """Add requests that have ended, and the intended starts of requests that were taken.

        end  monotonic seconds; requests that were due later do not count
        """
        counts = self._counts
        counts["offered"] += sum(self._first <= each < end for each in offered)
        for each in sent:
            if not each.error and self._first <= each.ended < end:
                counts["ok"] += 1
                counts["keys"] += each.keys
                counts["bytes"] += each.bytes
        counted = [each for each in sent if self._first <= each.intended < end]
        counts["sent"] += len(counted)
        counts["refused"] += sum(each.refused for each in counted)
        counts["waited"] += sum(each.waited for each in counted)
        good = [each for each in counted if not each.error]
        self._service.record([each.ended - each.started for each in good])
        self._lag.record([each.started - each.intended for each in counted if not each.waited])
        for known, some, key in (
            (self._latency, good, "kind"),
            (self._errors, [each for each in counted if each.error], "error"),
        ):
            for name in {getattr(each, key) for each in some}:
                times = [each.ended - each.intended for each in some if getattr(each, key) == name]
                known.setdefault(name, Latencies()).record(times)

    def as_json(self) -> dict[str, Any]:
        """Return the sums, with encoded histograms."""
        return {
            **self._counts,
            "latency": {name: each.encoded() for name, each in self._latency.items()},
            "service": self._service.encoded(),
            "lag": self._lag.encoded(),
            "errors": {name: each.encoded() for name, each in self._errors.items()},
        }


def code_of(error: PsError) -> str:
    """Return the code under which an error is counted: its reason, or the name of its status."""
    return error.reason or NAMES.get(type(error), type(error).__name__)


def write(message: dict[str, Any]) -> None:
    """Write a message to the standard output."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def connect(task: dict[str, Any], plan: Plan, count: int) -> list[Client]:
    """Return ``count`` connected clients that know the tables."""
    clients, options = [], dict(task["options"])
    if isinstance(options.get("tls"), dict):
        options["tls"] = Tls(**options["tls"])
    for _ in range(count):
        client = Client(task["addresses"], **options)
        client._dims.update(dict.fromkeys(plan.names, plan.dim))
        _pull_once(client, plan)
        clients.append(client)
    return clients


def _pull_once(client: Client, plan: Plan) -> None:
    """Connect a client and load its kernels, which may take longer than the timeout of a request.

    Repeats the pull if it is too late, or if a server refuses it for now.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            client.pull({name: np.arange(8) for name in plan.names})
            return
        except (ResourceExhausted, DeadlineExceeded) as error:
            if time.monotonic() > deadline:
                raise
            time.sleep(max(error.retry_after or 0.0, 0.1))


def main() -> None:
    """Run the process.

    Its task is {"plan": Plan.as_json(); "process": its number; "clients": how many it has;
    "threads": most requests in flight; "addresses", "options": arguments of Client}.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only during a run, it means anything
    sys.setswitchinterval(SWITCH_SECONDS)
    task = json.loads(sys.stdin.readline())
    plan, process = plan_of(task["plan"]), task["process"]
    clients = connect(task, plan, task["clients"])
    rng = np.random.default_rng((plan.seed, process, 2))
    gradients = rng.standard_normal((plan.batch, plan.dim), dtype=np.float32) * np.float32(1e-3)
    senders = [Sender(client, plan, gradients) for client in clients]
    mix = Mix(plan, process, (plan.seed, process, 3))
    gc.freeze()
    write({"ready": True})
    for line in sys.stdin:
        run = Run(json.loads(line), senders, task["threads"], mix, plan.seed * 1000 + process)
        signal.signal(signal.SIGINT, lambda *_, run=run: run.stop())
        run.run()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for client in clients:
        client.close()


if __name__ == "__main__":
    main()
