"""A shard whose machine is lost, or whose name is gone, comes back elsewhere: no call fails.

callers.py lists the kinds of calls. Each runs with a list of addresses, and with one DNS name.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import Machine, Net, network
from servers import READY_SECONDS
from squeeze import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
PORT = 7000
STALL_SECONDS = 16.0  # a ping after 10 s, no answer for 5 s, and a new connection
BACK_SECONDS = 2.0  # maximum time until a shard that is ready, and has a name, is served again
GONE_SECONDS = 60.0
WARM_SECONDS = 4.0  # of calls before the fault


class Lab:
    """Two shards, a spare machine, and a machine with a DNS server on which the callers run."""

    def __init__(self, net: Net, directory: Path) -> None:
        self.directory = directory
        self.trainer, *self.hosts, self.spare = (net.machine(number) for number in range(1, 5))
        self.processes: list[subprocess.Popen[str]] = []
        self.file = directory / "names.json"
        self.names = {"ps": [host.address for host in self.hosts]}
        self.names |= {f"ps-{shard}.ps": [host.address] for shard, host in enumerate(self.hosts)}
        self.publish()
        self.start(self.trainer, str(HERE.parent / "names.py"), str(self.file), "53")
        self.shards = [self.serve(shard, host) for shard, host in enumerate(self.hosts)]
        for each in (self.processes[0], *self.shards):
            self.ready(each)

    def publish(self) -> None:
        """Let the DNS server answer with ``names``."""
        fresh = self.directory / "names.new"
        fresh.write_text(json.dumps(self.names))
        fresh.replace(self.file)

    def start(self, machine: Machine, *arguments: str) -> subprocess.Popen[str]:
        """Start python on a machine."""
        command = machine.inside([sys.executable, *arguments])
        log = (self.directory / f"{len(self.processes)}.err").open("w")
        with log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment()
            )
        self.processes.append(process)
        return process

    def serve(self, shard: int, machine: Machine) -> subprocess.Popen[str]:
        flags = ["--shard", str(shard), "--shards", "2", "--cluster", "lab", "--metrics-port", "0"]
        flags += [
            "--plaintext",
            "--host",
            machine.address,
            "--port",
            str(PORT),
            "--host-bytes",
            str(64 << 20),
        ]
        flags += ["--checkpoint-url", f"file://{self.directory}/checkpoints"]
        data = self.directory / f"data-{shard}"
        return self.start(machine, "-m", "psserver", "serve", "--data-dir", str(data), *flags)

    def ready(self, process: subprocess.Popen[str]) -> None:
        """Wait for the process's first line of output."""
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, self.errors(process)

    def errors(self, process: subprocess.Popen[str]) -> str:
        return (self.directory / f"{self.processes.index(process)}.err").read_text()[-2000:]

    def call(self) -> subprocess.Popen[str]:
        """Start the callers, and wait until all call."""
        listed = ",".join(f"ps-{shard}.ps:{PORT}" for shard in range(2))
        arguments = [str(self.directory), f"ps:{PORT}", listed]
        callers = self.start(self.trainer, str(HERE / "callers.py"), *arguments)
        self.ready(callers)
        time.sleep(WARM_SECONDS)
        return callers

    def report(self, callers: subprocess.Popen[str]) -> dict[str, Any]:
        """Stop the callers; check that no call failed, and that all pushes are in the rows once."""
        (self.directory / "stop").touch()
        callers.wait(150)
        path = self.directory / "report.json"
        assert path.exists(), self.errors(callers)
        report: dict[str, Any] = json.loads(path.read_text())
        assert {kind: each["errors"] for kind, each in report.items() if each["errors"]} == {}
        pushing = {kind: each for kind, each in report.items() if "sums" in each}
        assert len(pushing) == 6
        for kind, each in pushing.items():
            assert each["sums"] == [each["calls"]], kind
        for kind, each in sorted(report.items()):
            print(kind, each["calls"], [f"{b - a:.2f}" for a, b in each["pauses"]])
        return report

    def come_back(self, shard: int) -> float:
        """Start a shard on the spare machine; return when it was ready and had its name."""
        self.ready(self.serve(shard, self.spare))
        self.names["ps"] = [self.hosts[1 - shard].address, self.spare.address]
        self.names[f"ps-{shard}.ps"] = [self.spare.address]
        self.publish()
        return time.time()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with network() as net:
        made = Lab.__new__(Lab)
        made.processes = []
        try:
            Lab.__init__(made, net, tmp_path)
            yield made
        finally:
            made.close()


def longest(pauses: list[tuple[float, float]], since: float) -> float:
    """The longest of the pauses that ended after ``since``."""
    return max((end - begin for begin, end in pauses if end > since), default=0.0)


@pytest.mark.parametrize("hangs", [False, True], ids=["drops packets", "hangs, then drops them"])
def test_no_call_fails_when_a_machine_is_lost(lab: Lab, hangs: bool) -> None:
    """A machine that hangs still acknowledges requests, so only its missing ping shows the loss."""
    callers = lab.call()
    if hangs:
        lab.shards[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
    lab.hosts[1].lose()
    lost = time.time()
    lab.shards[1].kill()  # it is lost too: nobody gets to know
    back = lab.come_back(1)
    time.sleep(max(lost + STALL_SECONDS + 4 - time.time(), 4))
    report = lab.report(callers)
    limit = max(STALL_SECONDS, back - lost + BACK_SECONDS)
    stalls = {kind: longest(each["pauses"], lost) for kind, each in report.items()}
    assert {kind: stall for kind, stall in stalls.items() if stall > limit} == {}
    assert min(stalls[kind] for kind in stalls if kind.startswith("push")) > 1  # it was lost


def test_no_call_fails_when_a_name_is_gone_for_a_minute(lab: Lab) -> None:
    callers = lab.call()
    gone = time.time()
    del lab.names["ps-1.ps"]
    lab.names["ps"] = [lab.hosts[0].address]
    lab.publish()
    lab.shards[1].terminate()
    lab.shards[1].wait(READY_SECONDS)
    time.sleep(gone + GONE_SECONDS - time.time())
    back = lab.come_back(1)
    time.sleep(BACK_SECONDS + 4)
    report = lab.report(callers)
    ends = {
        kind: max((end for _, end in each["pauses"]), default=0.0) for kind, each in report.items()
    }
    assert {kind: end - back for kind, end in ends.items() if end - back > BACK_SECONDS} == {}
    assert min(ends[kind] for kind in ends if kind.startswith("push")) > back
