"""Measure the kernels that process rows against the same loops in C++ and against the hardware.

All contenders get the same batches, in alternating turns. The hardware has two limits: how many
random cache lines per second memory delivers, and how many bytes per second can be copied. A key
needs one cache line in the index. A row of dim 32 with Adagrad state needs four lines, read and
written. The report shows, for each kernel, the time that the hardware needs for the lines or bytes
of a row, divided by the time of the kernel: 1 means that the kernel reaches the limit.

Without g++ there is no comparison with C++, and the limits are measured with numba and NumPy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cpp.build import load
from benchmarks.report import Report, arguments, interleave
from benchmarks.work import Work, keys_of, standard_work
from psclient.batch import Batch
from psproto import routing
from storage.arena import Arena, Budget
from storage.index import Index, find
from storage.kernels import gather, jit, mix64, prefetch
from storage.optimizers import OPTIMIZERS, make_optimizer

N = 10_000  # keys in a batch
DIM = 32
LINES = 256 // 64  # per row of 64 floats
LINES_AHEAD = 32  # lines to prefetch ahead in a loop that does nothing else


class Roofs(NamedTuple):
    """Limits of the hardware."""

    line: float  # nanoseconds to read a random cache line
    copied: float  # speed of copying memory, in GB/s

    def shares(self, ns: float, lines: int, size: int) -> dict[str, Any]:
        """Return the share of each limit that a kernel reaches, as columns of the report.

        ns     nanoseconds that the kernel takes per row
        lines  cache lines that it needs per row
        size   bytes that it needs per row
        """
        return {
            "of random lines": lines * self.line / ns,
            "of copying": size / self.copied / ns,
        }


class Setup:
    """A table of ``rows`` rows, and batches of its keys, drawn with equal probability."""

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
    """Run the benchmark and print its tables."""
    options = arguments(__doc__).parse_args()
    report = Report("kernels", options.json)
    setup = Setup(1_000_000 if options.quick else 10_000_000)
    cpp: Any = load()
    if cpp is None:
        report.note("C++ is left out: no g++ (apt-get install g++)")
    steps = 60 if options.quick else 300
    roofs = _roofs(setup, cpp)
    report.note(
        f"roofs: a random cache line {roofs.line:.1f} ns; copying {roofs.copied:.1f} GB/s"
        f" ({2 * DIM * 4 / roofs.copied:.1f} ns per row of 256 bytes)"
    )
    report.section(
        f"rows, uniform, {setup.rows:,} of them, {N:,} per batch", _rows(setup, cpp, steps, roofs)
    )
    report.section("optimizers, dim 32, the same rows", _optimizers(setup, steps, roofs))
    report.section("index, inserting", _inserts(setup, cpp))
    report.section(f"a batch of the standard work, {N:,} x {DIM}", _batches(cpp, steps))
    report.close()


def _roofs(setup: Setup, cpp: Any) -> Roofs:
    """Measure the limits of the hardware.

    cpp  library of C++ kernels; None: measure with Numba and NumPy
    """
    lines = setup.slab.array[: setup.rows].view(np.uint64).reshape(-1)
    count, reads = len(lines) // 8, 500_000
    target, source = np.empty(256 << 20, np.uint8), np.ones(256 << 20, np.uint8)
    if cpp is not None:
        seeds = range(0, 20 * reads, reads)  # lines, different ones each time
        access = min(cpp.random_access_roof(lines, count, reads, seed) for seed in seeds)
        return Roofs(float(access), float(cpp.copy_roof(target, source, len(source), 5)))
    by_line = lines.reshape(-1, 8)
    _read_lines(by_line, count, 1000, 0)  # compiles the loop
    read = min(_seconds(lambda: _read_lines(by_line, count, reads, seed)) for seed in range(20))  # noqa: B023
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(5))
    return Roofs(read * 1e9 / reads, len(source) / copy / 1e9)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@jit
def _read_lines(lines: Any, count: int, reads: int, seed: int) -> Any:
    """Read random cache lines that do not depend on each other; return their sum.

    lines  uint64[count, 8], much larger than the caches; count < 2**32
    reads  number of lines to read
    seed   determines which lines are read

    The sum is returned so that the compiler does not remove the loop.
    """
    total, most, first = np.uint64(0), np.uint64(count), np.uint64(seed * reads)
    for i in range(reads):
        ahead = (mix64(first + np.uint64(i + LINES_AHEAD)) >> np.uint64(32)) * most >> np.uint64(32)
        prefetch(lines, np.int64(ahead), 0)
        at = (mix64(first + np.uint64(i)) >> np.uint64(32)) * most >> np.uint64(32)
        total += lines[np.int64(at), 0]
    return total


def _rows(setup: Setup, cpp: Any, steps: int, roofs: Roofs) -> list[dict[str, Any]]:
    index, slab, out = setup.index, setup.slab.array, setup.out
    entries, directory, depth = index._entries.array, index._directory, index._depth
    adagrad = make_optimizer("adagrad", 0.05, {})
    contenders: dict[str, Callable[[int], Any]] = {
        "find": lambda i: find(
            entries, directory, depth, index._salt, setup.asked[i % 64], setup.found
        ),
        "gather": lambda i: gather(slab, setup.batches[i % 64], DIM, out),
        "adagrad": lambda i: adagrad.step(slab, setup.batches[i % 64], setup.gradients, 0.05, 1),
    }
    if cpp is not None:
        size = 1 << (setup.rows * 4 // 3).bit_length()
        flat = np.zeros((size, 2), np.uint64)
        locations = np.arange(1, setup.rows + 1, dtype=np.int64)
        cpp.index_insert(flat, size - 1, setup.keys, locations, setup.rows)
        found = np.empty(N, np.int64)
        contenders |= {
            "C++ find": lambda i: cpp.index_find(flat, size - 1, setup.asked[i % 64], N, found),
            "C++ gather": lambda i: cpp.gather(slab, 2 * DIM, DIM, setup.batches[i % 64], N, out),
            "C++ adagrad": lambda i: cpp.adagrad(
                slab, 2 * DIM, DIM, setup.batches[i % 64], setup.gradients, N, 0.05, 1e-10
            ),
        }
    whole = slab[
        : setup.rows
    ]  # np.take copies a non-contiguous array first, so it takes whole rows
    contenders["np.take"] = lambda i: np.take(whole, setup.batches[i % 64], axis=0)
    times = interleave(contenders, steps=steps, rounds=10, warm=3)
    each = {name: float(np.median(seconds)) / N * 1e9 for name, seconds in times.items()}
    lines = {"find": 1, "gather": LINES // 2, "adagrad": LINES, "np.take": LINES}
    rows = []
    for name, touched in lines.items():
        row: dict[str, Any] = {"kernel": name, "ns per row": each[name]}
        if cpp is not None:
            theirs = each.get(f"C++ {name}")
            ratio = None if theirs is None else each[name] / theirs
            row |= {"C++ ns": theirs, "x C++ (<= 1.35)": ratio}
        rows.append(row | roofs.shares(each[name], touched, 64 * touched))
    return rows


def _optimizers(setup: Setup, steps: int, roofs: Roofs) -> list[dict[str, Any]]:
    rows = []
    for name in OPTIMIZERS:
        optimizer = make_optimizer(name, 0.001, {})
        width = DIM + optimizer.state_width(DIM)
        numbers = setup.slab.array.reshape(-1)[: setup.rows * 2 * DIM]
        slab = numbers[: len(numbers) // width * width].reshape(-1, width)
        slab[:, DIM:] = optimizer.initial_state(DIM)
        slots = [batch * len(slab) // setup.rows for batch in setup.batches]
        slots = [np.unique(batch) for batch in slots]
        step = partial(_step, optimizer, slab, slots, setup.gradients)
        seconds = np.median(interleave({name: step}, steps=steps // 3, rounds=1)[name])
        each = float(seconds) / N * 1e9
        row = {"optimizer": name, "floats per row": width, "ns per row": each}
        rows.append(row | roofs.shares(each, -(-width * 4 // 64), width * 4))
    return rows


def _step(optimizer: Any, slab: Any, slots: Any, gradients: Any, i: int) -> None:
    some = slots[i % len(slots)]
    optimizer.step(slab, some, gradients[: len(some)], 0.001, 1)


def _inserts(setup: Setup, cpp: Any) -> list[dict[str, Any]]:
    """Measure inserts into an index that grows, and into indexes that have their final size.

    cpp  library of C++ kernels, or None

    Returns rows of the report.
    """
    index = Index(Budget(16 << 30))
    locations = np.arange(1, setup.rows + 1, dtype=np.uint64)
    starts = range(0, setup.rows, N)
    batches = [(setup.keys[at : at + N], locations[at : at + N]) for at in starts]
    times = interleave(
        {"i": lambda i: index.insert(*batches[i])}, steps=len(batches), rounds=1, warm=0
    )
    seconds = times["i"]
    total = sum(seconds)
    pause, usual, size_of = max(seconds), float(np.median(seconds)), index.bytes / setup.rows
    for keys, _ in batches:
        index.remove(keys)
    again = sum(
        interleave(
            {"i": lambda i: index.insert(*batches[i])}, steps=len(batches), rounds=1, warm=0
        )["i"]
    )
    rows = [
        {"what": "ours, growing from nothing, ns per key", "figure": total / setup.rows * 1e9},
        {"what": "ours, into its final size, ns per key", "figure": again / setup.rows * 1e9},
        {
            "what": f"ours, slowest batch of {N:,} (the pause of growing), ms",
            "figure": pause * 1e3,
        },
        {"what": f"ours, median batch of {N:,}, ms", "figure": usual * 1e3},
        {"what": "ours, bytes of index per key", "figure": size_of},
    ]
    if cpp is not None:
        size = 1 << (setup.rows * 4 // 3).bit_length()
        flat = np.full((size, 2), 0, np.uint64)
        signed = locations.view(np.int64)
        bulk = _seconds(lambda: cpp.index_insert(flat, size - 1, setup.keys, signed, setup.rows))
        rows += [
            {"what": "C++, into its final size, ns per key", "figure": bulk / setup.rows * 1e9},
            {"what": "x C++ (<= 1.35)", "figure": again / bulk},
        ]
    return rows


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
        "scatter": lambda i: routing.scatter(full, 0, batches[i % 64].split.inverse, out),
        "np.unique with inverse, for comparison": lambda i: np.unique(
            keys[i % 64], return_inverse=True
        ),
    }
    if cpp is not None:
        calls["C++ distinct keys and summed gradients"] = lambda i: cpp.unique_sum(
            keys[i % 64], N, full, DIM, distinct, inverse, sums, scratch, len(scratch) - 1
        )
    times = interleave(calls, steps=steps, rounds=10, warm=3)
    return [
        {"what": name, "ms": float(np.median(t)) * 1e3, "p99 ms": float(np.quantile(t, 0.99)) * 1e3}
        for name, t in times.items()
    ]


if __name__ == "__main__":
    main()
