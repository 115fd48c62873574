"""A trainer that runs in a pod: it pushes known gradients, and checks the sums at its end.

    python trainer.py ADDRESS TABLE

ADDRESS  "host:port" of the service of all shards, or several separated by commas

Prints one JSON object per line. First {"connected": SECONDS}. Then {"beat": number of steps}, at
most twice per second. After SIGTERM {"steps", "errors",
"stalls", "exact", "off"}: stalls are [seconds of the monotonic clock, duration] of each step that
took more than half a second; exact is whether every row has the sum of its acknowledged gradients,
and off is how many rows have not.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from types import FrameType

import numpy as np

from psclient import Client, PsError

KEYS, BATCH, DIM = 3000, 300, 4
STALL = BEAT = 0.5  # seconds
PAUSE = 0.02  # seconds between two steps
TIMEOUT = 150.0  # seconds in which the client retries a step

stopping = False


def stop(number: int, frame: FrameType | None) -> None:
    global stopping
    stopping = True


def tell(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def train(target: str, name: str) -> None:
    start = time.monotonic()
    addresses = target.split(",") if "," in target else target
    with Client(addresses, timeout=TIMEOUT) as client:
        table = client.create_table(name, dim=DIM, optimizer="sgd", lr=1.0, initializer="zeros")
        keys = np.arange(1, KEYS + 1, dtype=np.int64)
        counts = np.zeros(KEYS, np.int64)
        table.pull(keys)
        tell(connected=round(time.monotonic() - start, 2))
        generator = np.random.default_rng(1)
        stalls, errors, steps, told = [], [], 0, start
        while not stopping:
            chosen = np.unique(generator.integers(1, KEYS + 1, BATCH))
            begun = time.monotonic()
            try:
                table.push(chosen, -np.ones((len(chosen), DIM), np.float32), step=steps)
                counts[chosen - 1] += 1
                table.pull(chosen)
            except PsError as error:
                errors.append(f"{type(error).__name__}: {error}")
                tell(error=errors[-1])
            steps += 1
            took = time.monotonic() - begun
            if took > STALL:
                stalls.append((round(begun, 2), round(took, 2)))
                tell(stall=stalls[-1])
            if time.monotonic() - told >= BEAT:
                told = time.monotonic()
                tell(beat=steps)
            time.sleep(PAUSE)
        rows = table.pull(keys)
        exact = bool((rows == counts[:, None]).all())
        off = int((rows[:, 0] != counts).sum())
        tell(steps=steps, errors=errors, stalls=stalls, exact=exact, off=off)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    train(sys.argv[1], sys.argv[2])
