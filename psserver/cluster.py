"""Run all shards of a cluster on this machine: one process per shard, restarted when it dies."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from psserver.addresses import LAST_PORT, bare_host, join
from psserver.member import Member
from psserver.unusable import ConfigError, unusable

LOOK_SECONDS = 0.05  # seconds between two checks of the processes


def up(
    shards: int, host: str, port: int, metrics_port: int, data_dir: Path, flags: Sequence[str]
) -> int:
    """Run shard i on port + i until SIGTERM or SIGINT; print ``ready`` once all shards serve.

    shards        number of shards
    metrics_port  HTTP port of shard 0; shard i uses metrics_port + i; 0: none
    data_dir      directory; shard i uses its subdirectory shard-i and its file shard-i.log
    flags         further flags, passed to every ``psserver serve``

    Returns the exit status: 0 after a signal, 1 if a shard did not start. Raises ConfigError if a
    setting is invalid.
    """
    host = _check(shards, host, port, metrics_port, data_dir)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    members = []
    for shard in range(shards):
        command = [sys.executable, "-m", "psserver", "serve", "--shard", str(shard)]
        command += ["--shards", str(shards), "--host", host, "--port", str(port + shard)]
        command += ["--metrics-port", str(metrics_port + shard if metrics_port else 0)]
        command += ["--data-dir", str(data_dir / f"shard-{shard}")]
        command += ["--colocated-shards", str(shards)]
        if metrics_port:
            command += ["--http-peers", _http_peers(shards, host, metrics_port)]
        command += flags
        members.append(Member(shard, command, data_dir / f"shard-{shard}.log"))
    return _supervise(members, stop, [join(host, port + shard) for shard in range(shards)])


def _http_peers(shards: int, host: str, port: int) -> str:
    """Return the setting http_peers of the shards: the addresses of their HTTP ports.

    port  HTTP port of shard 0
    """
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # nosec B104
    return ",".join(join(reached, port + shard) for shard in range(shards))


def _supervise(members: Sequence[Member], stop: threading.Event, addresses: list[str]) -> int:
    """Restart processes that die, until ``stop`` is set; then end all processes.

    addresses  printed after "ready" once all shards serve

    Returns the exit status: 0 after ``stop``, 1 if a shard did not start.
    """
    status = 0
    if _ready(members, stop):
        print("ready", *addresses, flush=True)
        while not stop.wait(LOOK_SECONDS):
            for member in members:
                member.restart_if_dead()
    elif not stop.is_set():
        status = 1
    for member in members:
        member.process.terminate()
    for member in members:
        member.process.wait()
    return status


def _check(shards: int, host: str, port: int, metrics_port: int, data_dir: Path) -> str:
    """Check the settings that all shards share, and create ``data_dir``.

    Returns the host, without the brackets of an IPv6 address. Raises ConfigError for an invalid
    host, a port larger than 65535, or a directory that cannot be written.
    """
    try:
        host = bare_host(host)
    except ValueError as error:
        raise ConfigError(f"host: {error}, got {host!r}") from error
    for name, first in (("port", port), ("metrics_port", metrics_port)):
        if first + shards - 1 > LAST_PORT:
            raise ConfigError(
                f"{name}: {shards} shards use the ports {first} to {first + shards - 1}, but the"
                f" largest port is {LAST_PORT}: choose a smaller {name}"
            )
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        for shard in range(shards):
            (data_dir / f"shard-{shard}.log").open("ab").close()
    except OSError as error:
        raise unusable(data_dir, error) from error
    return host


def _ready(members: Sequence[Member], stop: threading.Event) -> bool:
    """Wait until all shards serve. Return False after a signal, or if a shard does not start.

    stop  set by the signal handler

    The error of the shard that does not start is printed to stderr.
    """
    while not stop.wait(LOOK_SECONDS):
        for member in members:
            if member.failed:
                print(f"shard {member.shard} did not start:\n{member.error()}", file=sys.stderr)
                return False
        if all(member.ready.is_set() for member in members):
            return True
    return False
