"""The loops that touch rows, against C++ and against the machine, in one process and one run.

Every contender gets the same batches, in turns. The roofs: reading random cache lines as fast as
the memory lets (per line), and copying (per byte). A key costs one line in the index; a row of
dim 32 with Adagrad state four, read and written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.cpp.build import load
from benchmarks.peers import Work, keys_of, standard_work
from benchmarks.report import Report, arguments, interleave
from psclient.batch import Batch
from psproto import routing
from storage.arena import Arena, Budget
from storage.index import Index, find
from storage.kernels import gather
from storage.optimizers import OPTIMIZERS, make_optimizer

N = 10_000  # keys in a batch
DIM = 32
LINES = 256 // 64  # of a row of 64 floats


class Setup:
    """A table of ``rows`` rows and batches of uniform keys that are in it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        budget = Budget(16 << 30)
        rng = np.random.default_rng(0)
        self.keys = keys_of(np.arange(rows)).view(np.uint64)
        self.index = Index(budget)
        locations = np.arange(1, rows + 1, dtype=np.uint64)
        for at in range(0, rows, 100_000):
            self.index.insert(self.keys[at : at + 100_000], locations[at : at + 100_000])
        self.slab = Arena(2 * DIM, np.float32, budget)
        self.slab.grow(rows)
        self.slab.array[:rows] = 1.0
        self.batches = [rng.permutation(rows)[:N] for _ in range(64)]
        self.asked = [self.keys[batch] for batch in self.batches]
        self.gradients = rng.standard_normal((N, DIM), dtype=np.float32)
        self.out = np.empty((N, DIM), np.float32)
        self.found = np.empty(N, np.uint64)


def main() -> None:
    """Run and print."""
    options = arguments(__doc__).parse_args()
    report = Report("kernels", options.json)
    setup = Setup(1_000_000 if options.quick else 10_000_000)
    cpp: Any = load()
    if cpp is None:
        report.note("C++ left out: no g++ here (apt-get install g++)")
    steps = 60 if options.quick else 300
    line, copied = _roofs(setup, cpp)
    report.note(
        f"roofs: a random cache line {line:.1f} ns; copying {copied:.1f} GB/s"
        f" ({2 * DIM * 4 / copied:.1f} ns a row of 256 bytes)"
    )
    report.section(
        f"rows, uniform, {setup.rows:,} of them, {N:,} a batch", _rows(setup, cpp, steps, line)
    )
    report.section("optimizers, dim 32, the same rows", _optimizers(setup, steps, line))
    report.section("index, inserting", _inserts(setup, cpp))
    report.section(f"a batch of the standard work, {N:,} x {DIM}", _batches(cpp, steps))
    report.close()


def _roofs(setup: Setup, cpp: Any) -> tuple[float, float]:
    """Nanoseconds for a random line, and GB/s of a copy."""
    if cpp is not None:
        lines = setup.slab.array[: setup.rows].view(np.uint64).reshape(-1)
        access = min(
            cpp.random_access_roof(lines, len(lines) // 8, 500_000, seed) for seed in range(20)
        )
        target = np.empty(256 << 20, np.uint8)
        source = np.ones(256 << 20, np.uint8)
        return float(access), float(cpp.copy_roof(target, source, len(source), 5))
    raise SystemExit("the roofs are measured in C++: apt-get install g++")


def _rows(setup: Setup, cpp: Any, steps: int, line: float) -> list[dict[str, Any]]:
    index, slab, out = setup.index, setup.slab.array, setup.out
    entries, directory, depth = index._entries.array, index._directory, index._depth
    adagrad = make_optimizer("adagrad", 0.05, {})
    size = 1 << (setup.rows * 4 // 3).bit_length() if cpp is not None else 2
    flat = np.zeros((size, 2), np.uint64)
    numba: dict[str, Callable[[int], Any]] = {
        "find": lambda i: find(
            entries, directory, depth, index._salt, setup.asked[i % 64], setup.found
        ),
        "gather": lambda i: gather(slab, setup.batches[i % 64], DIM, out),
        "adagrad": lambda i: adagrad.step(slab, setup.batches[i % 64], setup.gradients, 0.05, 1),
    }
    locations = np.arange(1, setup.rows + 1, dtype=np.int64)
    cpp.index_insert(flat, size - 1, setup.keys, locations, setup.rows)
    found = np.empty(N, np.int64)
    other: dict[str, Callable[[int], Any]] = {
        "find": lambda i: cpp.index_find(flat, size - 1, setup.asked[i % 64], N, found),
        "gather": lambda i: cpp.gather(slab, 2 * DIM, DIM, setup.batches[i % 64], N, out),
        "adagrad": lambda i: cpp.adagrad(
            slab, 2 * DIM, DIM, setup.batches[i % 64], setup.gradients, N, 0.05, 1e-10
        ),
    }
    contenders = {f"numba {name}": call for name, call in numba.items()}
    contenders |= {f"C++ {name}": call for name, call in other.items()}
    whole = slab[: setup.rows]  # take copies what is not contiguous, so it takes whole rows
    contenders["np.take"] = lambda i: np.take(whole, setup.batches[i % 64], axis=0)
    times = interleave(contenders, steps=steps, rounds=10, warm=3)
    lines = {"find": 1, "gather": LINES // 2, "adagrad": LINES}
    rows = []
    for name, touched in lines.items():
        ours = float(np.median(times[f"numba {name}"])) / N * 1e9
        theirs = float(np.median(times[f"C++ {name}"])) / N * 1e9
        rows.append(
            {
                "kernel": name,
                "ns a row": ours,
                "C++ ns": theirs,
                "x C++ (<= 1.35)": ours / theirs,
                "x random lines": touched * line / ours,
            }
        )
    take = float(np.median(times["np.take"])) / N * 1e9
    rows.append(
        {
            "kernel": "np.take, for comparison",
            "ns a row": take,
            "C++ ns": None,
            "x C++ (<= 1.35)": None,
            "x random lines": LINES // 2 * line / take,
        }
    )
    return rows


def _optimizers(setup: Setup, steps: int, line: float) -> list[dict[str, Any]]:
    rows = []
    for name in OPTIMIZERS:
        optimizer = make_optimizer(name, 0.001, {})
        width = DIM + optimizer.state_width(DIM)
        held = setup.slab.array.reshape(-1)[: setup.rows * 2 * DIM]
        slab = held[: len(held) // width * width].reshape(-1, width)
        slab[:, DIM:] = optimizer.initial_state(DIM)
        slots = [batch * len(slab) // setup.rows for batch in setup.batches]
        slots = [np.unique(batch) for batch in slots]
        step = partial(_step, optimizer, slab, slots, setup.gradients)
        seconds = np.median(interleave({name: step}, steps=steps // 3, rounds=1)[name])
        each = float(seconds) / N * 1e9
        touched = -(-width * 4 // 64)
        rows.append(
            {
                "optimizer": name,
                "floats a row": width,
                "ns a row": each,
                "x random lines": touched * line / each,
            }
        )
    return rows


def _step(optimizer: Any, slab: Any, slots: Any, gradients: Any, i: int) -> None:
    some = slots[i % len(slots)]
    optimizer.step(slab, some, gradients[: len(some)], 0.001, 1)


def _inserts(setup: Setup, cpp: Any) -> list[dict[str, Any]]:
    """Grow an index from nothing, batch by batch, and C++ fill one that has its final size."""
    index = Index(Budget(16 << 30))
    locations = np.arange(1, setup.rows + 1, dtype=np.uint64)
    starts = range(0, setup.rows, N)
    batches = [(setup.keys[at : at + N], locations[at : at + N]) for at in starts]
    times = interleave(
        {"i": lambda i: index.insert(*batches[i])}, steps=len(batches), rounds=1, warm=0
    )
    seconds = times["i"]
    size = 1 << (setup.rows * 4 // 3).bit_length()
    flat = np.full((size, 2), 0, np.uint64)
    signed = locations.view(np.int64)
    bulk = interleave(
        {"c": lambda i: cpp.index_insert(flat, size - 1, setup.keys, signed, setup.rows)},
        steps=1,
        rounds=1,
        warm=0,
    )["c"][0]
    total = sum(seconds)
    pause, usual, size_of = max(seconds), float(np.median(seconds)), index.bytes / setup.rows
    for keys, _ in batches:
        index.remove(keys)
    again = sum(
        interleave(
            {"i": lambda i: index.insert(*batches[i])}, steps=len(batches), rounds=1, warm=0
        )["i"]
    )
    return [
        {"what": "ours, growing from nothing, ns a key", "figure": total / setup.rows * 1e9},
        {"what": "ours, into its final size, ns a key", "figure": again / setup.rows * 1e9},
        {"what": "C++, into its final size, ns a key", "figure": bulk / setup.rows * 1e9},
        {"what": "x C++ (<= 1.35)", "figure": again / bulk},
        {
            "what": f"ours, slowest batch of {N:,} (the pause of growing), ms",
            "figure": pause * 1e3,
        },
        {"what": f"ours, median batch of {N:,}, ms", "figure": usual * 1e3},
        {"what": "ours, bytes of index a key", "figure": size_of},
    ]


def _batches(cpp: Any, steps: int) -> list[dict[str, Any]]:
    work = standard_work(Work(), 64)
    rng = np.random.default_rng(0)
    full = rng.standard_normal((N, DIM), dtype=np.float32)
    keys = [keys_of(ids).view(np.uint64) for ids, _, _ in work]
    one, four = routing.even_map(1), routing.even_map(4)
    batches = [Batch(k, one) for k in keys]
    out = np.empty((N, DIM), np.float32)
    sums = np.empty((N, DIM), np.float32)
    distinct, inverse = np.empty(N, np.uint64), np.empty(N, np.int64)
    scratch = np.empty(1 << 15, np.int32)
    calls: dict[str, Callable[[int], Any]] = {
        "distinct keys, 1 shard": lambda i: routing.split(keys[i % 64], one),
        "distinct keys, 4 shards": lambda i: routing.split(keys[i % 64], four),
        "distinct keys and summed gradients (<= 0.6 ms)": lambda i: Batch(keys[i % 64], one).sum(
            full, "", DIM
        ),
        "C++ distinct keys and summed gradients": lambda i: cpp.unique_sum(
            keys[i % 64], N, full, DIM, distinct, inverse, sums, scratch, len(scratch) - 1
        ),
        "scatter": lambda i: routing.scatter(full, 0, batches[i % 64].split.inverse, out),
        "np.unique with inverse, for comparison": lambda i: np.unique(
            keys[i % 64], return_inverse=True
        ),
    }
    times = interleave(calls, steps=steps, rounds=10, warm=3)
    return [
        {"what": name, "ms": float(np.median(t)) * 1e3, "p99 ms": float(np.quantile(t, 0.99)) * 1e3}
        for name, t in times.items()
    ]


if __name__ == "__main__":
    main()
