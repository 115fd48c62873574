"""psctl top: watch the shards and tables of a cluster, live."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from psclient.status import ShardStatus, Watch
from psclient.tools.commands.output import Output
from psclient.tools.commands.shell import Session, command
from psclient.tools.rates import Sample, sample
from psclient.tools.topview import Look, screen, whole

IntervalOption = Annotated[
    float, typer.Option(min=0.1, help="Time between two samples, in seconds.")
]
IterationsOption = Annotated[
    int, typer.Option(min=0, help="Stop after this many samples; 0: do not stop.")
]
OnceOption = Annotated[
    bool, typer.Option("--once", help="Print one sample and stop. The same as --iterations 1.")
]


@command()
def top(
    session: Session,
    interval: IntervalOption = 1.0,
    iterations: IterationsOption = 0,
    once: OnceOption = False,
) -> None:
    """Watch the load of all shards and tables, live.

    \b
    Columns of shards (- if it is not known):
      req/s, keys/s, B/s  requests, their keys, and the bytes of their arrays
      p50, p99            latency of requests on the server
      busy                part of the time in which the engine thread works
      wait                99th percentile of the time that requests wait for the engine
      mem, disk           used part of the memory for tables, and of the disk
      lag                 age of the oldest change that a subscriber has not received

    \b
    Keys:
      q  quit
      s  sort shards by number, requests, p99 or memory
      t  show everything, or only shards, tables or errors

    A shard that does not answer is listed with its state. If stdout is no terminal, each sample is
    printed below the former one. Ctrl-C ends the command with exit status 0.
    """
    samples = _samples(session, interval, 1 if once else iterations)
    with suppress(KeyboardInterrupt):
        if session.output is Output.JSON or once or not sys.stdout.isatty():
            _print(session, samples)
        else:
            _watch(samples)


Wait = Callable[[float], bool]  # waits until a monotonic time; returns False to stop


def _samples(
    session: Session, interval: float, iterations: int
) -> Callable[[Wait], Iterator[Sample]]:
    """Return a function that yields a sample per interval, and waits with its argument."""

    def ask(watch: Watch) -> tuple[list[ShardStatus], float]:
        found = watch.status(timeout=max(interval, 0.5))
        return found, time.monotonic()

    def samples(wait: Wait) -> Iterator[Sample]:
        with closing(session.watch()) as watch:
            (before, began), due = ask(watch), time.monotonic()
            for _ in range(iterations) if iterations else count():
                due = max(due + interval, time.monotonic())
                if not wait(due):
                    return
                now, ended = ask(watch)
                yield sample(before, now, time=time.time(), seconds=ended - began)
                before, began = now, ended

    return samples


def _sleep(until: float) -> bool:
    """Wait until a monotonic time."""
    time.sleep(max(until - time.monotonic(), 0.0))
    return True


def _print(session: Session, samples: Callable[[Wait], Iterator[Sample]]) -> None:
    """Print one sample below the other, as text or as lines of JSON."""
    console = Console(highlight=False)
    for each in samples(_sleep):
        shown = whole(each, Look(), console.width)
        session.line(each, lambda: console.print(shown, end="\n\n"))  # noqa: B023  called at once


def _watch(samples: Callable[[Wait], Iterator[Sample]]) -> None:
    """Show the newest sample on the whole terminal, and obey keys."""
    console, look = Console(highlight=False), Look()
    shown: list[Sample] = []

    def draw() -> None:
        if shown:
            width, height = console.size
            live.update(screen(shown[-1], look, width, height, keys=True), refresh=True)

    def wait(until: float) -> bool:
        while (left := until - time.monotonic()) > 0:
            for key in pressed(left):
                if key == "q":
                    return False
                look.press(key)
                draw()
        return True

    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        live.update("asking all shards ...", refresh=True)
        for each in samples(wait):
            shown[:] = [each]
            draw()


def _no_keys(seconds: float) -> str:
    """Wait; return no keys."""
    time.sleep(seconds)
    return ""


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Let the terminal pass on each key at once, without showing it.

    Yields a function that waits at most so many seconds, and returns the keys that were pressed.
    """
    if not sys.stdin.isatty():
        yield _no_keys
        return
    import termios  # not on Windows
    import tty

    terminal = sys.stdin.fileno()
    former = termios.tcgetattr(terminal)

    def pressed(seconds: float) -> str:
        if not select.select([terminal], [], [], seconds)[0]:
            return ""
        return os.read(terminal, 64).decode(errors="ignore")

    try:
        tty.setcbreak(terminal)
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, former)
