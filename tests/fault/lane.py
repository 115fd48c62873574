"""Send garbage to a server's same-host lane, and see that it serves its good clients all the same.

    python -m tests.fault.lane --seconds 600

Hostile clients, in threads, send messages that are random, mutated or valid, register memory of all
kinds, write to the memory while the server reads it, and vanish at any moment. Two good clients,
one through the lane and one through gRPC, push ones meanwhile and check their sums after each push.
In the end no memory may remain registered, and the server must be the process that it was.

Exit status: 0, or 1 with the seed and the first difference.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import secrets
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs by itself
sys.path.extend(str(Path(__file__).parents[2] / each) for each in ("", "proto"))

from lanes import SIZE, Memory, RawLane, mapped, offer_of, pull, push
from servers import Cluster, Labels, eventually
from tables import DIM, summing

from psclient import Client
from psproto import lanes
from psproto import ps_pb2 as pb

HOSTILE = 4  # threads
KEYS = np.arange(200)
INTERESTING = (0, 1, 7, 8, 63, 64, 65, 4096, SIZE - 8, SIZE, 1 << 31, 1 << 32, (1 << 64) - 8)


def garbled(rng: random.Random, data: bytes) -> bytes:
    """Return a message with a few bytes changed, removed or added."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(3):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del out[at : at + rng.randrange(9)]
            case _:
                out[at:at] = rng.randbytes(rng.randrange(9))
    return bytes(out)


def number(rng: random.Random) -> int:
    """Return a number at which a check may be wrong."""
    near = rng.choice(INTERESTING) + rng.choice((-1, 0, 0, 0, 1))
    return near % (1 << 64)


def slice_of(rng: random.Random) -> pb.Slice:
    if rng.random() < 0.5:
        return pb.Slice(region=rng.randrange(3), offset=8 * rng.randrange(8, 2000), size=800)
    return pb.Slice(region=rng.randrange(3), offset=number(rng), size=number(rng))


def request(rng: random.Random, table: str, token: bytes) -> pb.LaneRequest:
    """Return a request with valid and invalid parts."""
    message = pb.LaneRequest(id=rng.randrange(1 << 10), timeout_ms=rng.choice((0, 1, 1000)))
    for _ in range(rng.randrange(3)):
        one = push(table, 100, DIM, step=rng.randrange(5))
        if rng.random() < 0.5:
            part = rng.choice((one.keys, one.counts, one.gradients))
            part.CopyFrom(slice_of(rng))
        one.header.dtype = rng.choice((0, 0, 1, 2, 3, 4))
        one.header.client_id = rng.choice((0, 0, rng.randrange(1, 9)))
        one.header.sequence = rng.randrange(1, 50)
        message.pushes.append(one)
    for _ in range(rng.randrange(3)):
        other = pull(table, 100, DIM, at=64, room=number(rng) & -8)
        if rng.random() < 0.5:
            rng.choice((other.keys, other.room)).CopyFrom(slice_of(rng))
        other.header.dtype = rng.choice((0, 0, 1, 2, 3, 4))
        other.header.with_metadata = rng.random() < 0.3
        other.header.prefetch = rng.random() < 0.1
        message.pulls.append(other)
    if rng.random() < 0.1:
        message.token = rng.choice((token, b"", bytes(16)))
    return message


def memory(rng: random.Random, token: bytes) -> Memory:
    """Return memory to register, which is valid or not."""
    if rng.random() < 0.6:
        return Memory(token)
    return Memory(
        rng.choice((token, bytes(16))),
        size=rng.choice((SIZE, SIZE, 64, 65, 4096)),
        seals=rng.choice((fcntl.F_SEAL_SHRINK, 0, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)),
        magic=rng.choice((lanes.MAGIC, rng.randbytes(8))),
        claimed=rng.choice((None, number(rng))),
        holes=rng.random() < 0.3,
    )


def attack(rng: random.Random, offer: pb.Lane, table: str) -> None:
    """Be one hostile client, from its connection to its end."""
    lane = RawLane(offer.path)
    lane.socket.settimeout(0.5)
    held: list[Memory] = []
    try:
        if rng.random() < 0.9:
            lane.send(lanes.framed(pb.LaneRequest(id=1, token=offer.token).SerializeToString()))
        for _ in range(rng.randrange(1, 30)):
            if held and rng.random() < 0.5:
                buffer = rng.choice(held).memory
                at = rng.randrange(len(buffer))
                data = rng.randbytes(min(64, len(buffer) - at))
                buffer[at : at + len(data)] = data
            data, fds = request(rng, table, offer.token), ()
            if rng.random() < 0.3:
                held.append(memory(rng, offer.token))
                size = rng.choice((held[-1].size, number(rng)))
                data.regions.add(region=rng.randrange(3), kind=rng.randrange(3), size=size)
                fds = (held[-1].fd,) * rng.choice((0, 1, 1, 1, 2))
            message = data.SerializeToString()
            if rng.random() < 0.2:
                message = garbled(rng, message)
            framed = lanes.framed(message)
            if rng.random() < 0.05:
                framed = garbled(rng, framed)
            lane.send(framed, fds)
            if rng.random() < 0.5:
                lane.socket.recv(1 << 16)
    except OSError:  # the server has closed the connection, or sends nothing
        pass
    finally:
        lane.socket.close()
        for each in held:
            each.close()


class Fuzz:
    """Hostile and good clients of one server, until the time is over."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._seed = seed
        self._stop = threading.Event()
        self._problems: list[BaseException] = []
        self.attacks = self.pushes = 0

    def run(self, seconds: float) -> None:
        """Raises the first difference."""
        (pid,) = self._cluster.pids(0)
        with Client(self._cluster.addresses, lane="never", timeout=120) as client:
            offer = offer_of(client)
            summing(client, "hostile")
            threads = [
                threading.Thread(target=self._hostile, args=(n, offer)) for n in range(HOSTILE)
            ]
            threads += [
                threading.Thread(target=self._good, args=(lane,)) for lane in ("require", "never")
            ]
            for thread in threads:
                thread.start()
            self._stop.wait(seconds)
            self._stop.set()
            for thread in threads:
                thread.join()
            if self._problems:
                raise self._problems[0]
            eventually(lambda: mapped(pid) == 0)
            eventually(lambda: self._cluster.metrics(0)["ps_lane_bytes", Labels()] == 0)
            eventually(lambda: self._cluster.metrics(0)["ps_inflight_bytes", Labels()] == 0)
            assert self._cluster.pids(0) == [pid], "the server was restarted"
            assert np.isfinite(client.table("hostile").pull(KEYS)).all()

    def _hostile(self, thread: int, offer: pb.Lane) -> None:
        rng = random.Random(self._seed * HOSTILE + thread)
        try:
            while not self._stop.is_set():
                attack(rng, offer, "hostile")
                self.attacks += 1
        except BaseException as error:
            self._problems.append(error)
            self._stop.set()

    def _good(self, lane: str) -> None:
        try:
            with Client(self._cluster.addresses, lane=lane, timeout=120) as client:  # type: ignore[arg-type]
                table = summing(client, f"good.{lane}")
                ones, pushes = np.ones((len(KEYS), DIM), np.float32), 0
                while not self._stop.is_set():
                    rows = table.exchange(KEYS, (KEYS, ones))
                    pushes += 1
                    assert (rows == -pushes).all(), f"{lane}: {rows} after {pushes} pushes"
                    self.pushes += 1
        except BaseException as error:
            self._problems.append(error)
            self._stop.set()


def fuzz(cluster: Cluster, seconds: float, seed: int) -> Fuzz:
    """Attack a cluster of one shard, which nobody else uses. Raises the first difference."""
    run = Fuzz(cluster, seed)
    run.run(seconds)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    options = parser.parse_args()
    cluster = Cluster(1, "--lane-bytes", str(64 << 20), metrics=True).start()
    print(f"seed {options.seed}, server {cluster.pids(0)[0]}, {os.getpid()}", flush=True)
    start = time.monotonic()
    try:
        run = fuzz(cluster, options.seconds, options.seed)
    except BaseException as error:
        print(f"FAILED after {time.monotonic() - start:.0f} s: {error!r}")
        for entry in cluster.log(0)[-5:]:
            print(entry)
        return 1
    finally:
        cluster.stop()
    print(f"{run.attacks} hostile clients, {run.pushes} good pushes: no difference")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
