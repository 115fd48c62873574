"""Measure rows in GPU memory: kernels against a copy, batches from and to host memory, servers.

The roof of a kernel is a copy within GPU memory, measured in the same run: the bytes that a kernel
reads and writes per second, divided by those of the copy. Times of kernels are taken by events of
CUDA. Rows are drawn from 16 GiB, so that no cache has them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.report import Report, arguments
from storage.gpu.cuda import CudaDevice
from storage.gpu.device import NoDevice, address
from storage.gpu.nvrtc import find_library
from storage.gpu.slab import row_stride
from storage.gpu.source import kernel_name, kernel_numbers
from storage.optimizer import Optimizer
from storage.optimizers import make_optimizer

SHIFT = 16  # rows of a piece of the slab: 65,536
BATCHES = (10_000, 100_000, 1_000_000)
CASES = (("adagrad", 32), ("adagrad", 128), ("adam", 32), ("adam", 128))
GIB = 1 << 30
DELAY = 512 << 20  # bytes of a copy that takes longer than launching a few kernels


class Slab:
    """Rows in GPU memory, all 0."""

    def __init__(self, device: CudaDevice, width: int, size: int) -> None:
        self.device, self.width, self.stride = device, width, row_stride(width)
        self.queue = device.queue()
        piece = 4 * self.stride << SHIFT
        self.pieces = [device.memory(piece) for _ in range(size // piece)]
        self.rows = len(self.pieces) << SHIFT
        runtime = device.cuda.runtime
        for each in self.pieces:
            runtime.memsetAsync(each.address, 0, piece, self.queue.stream.ptr)
        self.table = device.memory(8 * len(self.pieces))
        known = device.pinned(8 * len(self.pieces)).view(np.uint64)
        known[:] = [each.address for each in self.pieces]
        whole = np.uint64(self.table.address), np.int64(len(known)), np.int64(0), address(known)
        self.queue.run("add_pieces", len(known), *whole)
        self.queue.mark().wait()

    def run(self, kernel: str, slots: int, n: int, count: int, *more: Any) -> None:
        """Run a kernel over ``n`` rows, whose slots are at an address."""
        head = np.uint64(self.table.address), np.int32(SHIFT), np.int64(self.stride)
        self.queue.run(kernel, n, *head, np.uint64(slots), np.int64(n), np.int32(count), *more)


def main() -> int:
    """Run the benchmark and print its tables; return the exit status."""
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=["kernels", "servers"], help="Measure only these.")
    options = parser.parse_args()
    try:
        device = CudaDevice()
    except NoDevice as error:
        print(f"no GPU, nothing to measure: {error}", file=sys.stderr)
        return 1
    report = Report("hbm", options.json)
    report.note(_machine(device))
    if options.only != "servers":
        _measure_kernels(device, report, 2 * GIB if options.quick else 16 * GIB)
    if options.only != "kernels":
        _measure_servers(report, quick=options.quick)
    report.close()
    return 0


def _measure_kernels(device: CudaDevice, report: Report, size: int) -> None:
    """Measure copies, kernels and launches. size: bytes of the rows."""
    copied = _copies(device, report)
    for name, dim in CASES:
        optimizer = make_optimizer(name, None, {})
        slab = Slab(device, dim + optimizer.state_width(dim), size)
        title = f"{name}, dim {dim}, {4 * slab.width} bytes per row, {slab.rows:,} rows"
        rows = [row for n in BATCHES for row in _kernels(slab, optimizer, dim, n, copied)]
        report.section(title, rows)
        del slab  # before the next one takes its memory
    report.section("launches", _launches(device))


def _measure_servers(report: Report, *, quick: bool) -> None:
    """Measure servers, if all packages that they need are installed."""
    try:
        from benchmarks import hbmservice
    except ImportError as error:
        report.note(f"no servers, because a package is missing: {error}")
    else:
        hbmservice.measure(report, quick=quick)


def _machine(device: CudaDevice) -> str:
    names = "name,driver_version,pcie.link.gen.max,pcie.link.width.max"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    runtime = device.cuda.runtime.runtimeGetVersion()
    return (
        f"GPU, driver, PCIe: {found}; CUDA runtime {runtime}, NVRTC {find_library(runtime // 1000)}"
    )


def _timed(
    device: CudaDevice, stream: Any, calls: Sequence[Callable[[], Any]], times: int = 20
) -> float:
    """Return the median time of what one call asks a stream for, in seconds.

    calls  run one after another between two events
    """
    event, seconds, copy = device.cuda.Event, [], device.cuda.runtime.memcpyAsync
    delay = device.memory(2 * DELAY)
    for _ in range(times + 3):
        begin, end = event(), event()
        copy(delay.address, delay.address + DELAY, DELAY, 3, stream.ptr)
        begin.record(stream)
        for call in calls:
            call()
        end.record(stream)
        end.synchronize()
        seconds.append(device.cuda.get_elapsed_time(begin, end) / 1e3 / len(calls))
    return float(np.median(seconds[3:]))


def _copies(device: CudaDevice, report: Report) -> float:
    """Report the speed of copies; return that of the copy within GPU memory, in bytes per second.

    Bytes that are read and written count twice.
    """
    stream, size = device.queue().stream, 2 * GIB
    copy = device.cuda.runtime.memcpyAsync
    first, second = device.memory(size), device.memory(size)
    pinned = device.pinned(GIB // 2)
    host, half = pinned.ctypes.data, len(pinned)
    within = _timed(
        device, stream, [lambda: copy(second.address, first.address, size, 3, stream.ptr)]
    )
    up = _timed(device, stream, [lambda: copy(first.address, host, half, 1, stream.ptr)])
    down = _timed(device, stream, [lambda: copy(host, first.address, half, 2, stream.ptr)])
    rows = [
        {"copy": "within GPU memory, read and written", "GB/s": 2 * size / within / 1e9},
        {"copy": "host to GPU, page-locked", "GB/s": half / up / 1e9},
        {"copy": "GPU to host, page-locked", "GB/s": half / down / 1e9},
    ]
    report.section("copies", rows)
    return 2 * size / within


class Batch:
    """A batch of random rows, with buffers on the GPU and on the host."""

    def __init__(self, slab: Slab, optimizer: Optimizer, dim: int, chosen: Any) -> None:
        device, self._slab, self._dim, self._n = slab.device, slab, dim, len(chosen)
        self._far_slots, self._far = device.pinned(8 * self._n), device.pinned(4 * self._n * dim)
        self._far_slots.view(np.int64)[:] = chosen
        self._far.view(np.float32)[:] = np.random.default_rng(0).random(self._n * dim) - 0.5
        self._near_slots, self._near = device.memory(8 * self._n), device.memory(len(self._far))
        self._step = kernel_name(optimizer.kernel)
        self._numbers = kernel_numbers(optimizer, optimizer.lr, 1, dim)
        self._copy, self._stream = device.cuda.runtime.memcpyAsync, slab.queue.stream.ptr
        self._up()

    def _up(self) -> None:
        far_slots, far = self._far_slots, self._far
        self._copy(self._near_slots.address, far_slots.ctypes.data, len(far_slots), 1, self._stream)
        self._copy(self._near.address, far.ctypes.data, len(far), 1, self._stream)

    def _run(self, kernel: str, near: bool, *numbers: Any) -> None:
        slots = self._near_slots.address if near else self._far_slots.ctypes.data
        buffer = np.uint64(self._near.address) if near else address(self._far)
        self._slab.run(kernel, slots, self._n, self._dim, buffer, *numbers)

    def gather(self) -> None:
        self._run("gather", True)

    def step(self) -> None:
        self._run(self._step, True, *self._numbers)

    def gather_to_host(self) -> None:
        self._run("gather", False)

    def step_from_host(self) -> None:
        self._run(self._step, False, *self._numbers)

    def gather_and_copy(self) -> None:
        far, far_slots = self._far, self._far_slots
        self._copy(self._near_slots.address, far_slots.ctypes.data, len(far_slots), 1, self._stream)
        self.gather()
        self._copy(far.ctypes.data, self._near.address, len(far), 2, self._stream)

    def copy_and_step(self) -> None:
        self._up()
        self.step()


# (kernel, where slots and rows are, method of Batch)
CALLS = (
    ("gather", "GPU", Batch.gather),
    ("step", "GPU", Batch.step),
    ("gather", "host, written by the kernel", Batch.gather_to_host),
    ("gather", "host, copied", Batch.gather_and_copy),
    ("step", "host, read by the kernel", Batch.step_from_host),
    ("step", "host, copied", Batch.copy_and_step),
)


def _kernels(
    slab: Slab, optimizer: Optimizer, dim: int, n: int, copied: float
) -> list[dict[str, Any]]:
    """Measure gather and step over ``n`` random rows per batch.

    copied  bytes per second that a copy within GPU memory reads and writes together
    """
    rng, count = np.random.default_rng(n), max(2, min(8, 2_000_000 // n))
    chosen = [rng.permutation(np.unique(rng.integers(0, slab.rows, n))) for _ in range(count)]
    n = min(map(len, chosen))
    batches = [Batch(slab, optimizer, dim, each[:n]) for each in chosen]
    moved = {"gather": 8 + 8 * dim, "step": 8 + 4 * dim + 8 * slab.width}
    rows = []
    for kernel, where, method in CALLS:
        seconds = _timed(slab.device, slab.queue.stream, [partial(method, b) for b in batches])
        size = n * (moved[kernel] if where == "GPU" else 8 + 4 * dim)
        rows.append(
            {
                "kernel": kernel,
                "rows": n,
                "buffers": where,
                "us": seconds * 1e6,
                "million rows/s": n / seconds / 1e6,
                "GB/s": size / seconds / 1e9,
                "of a copy (>= 0.6)": size / seconds / copied if where == "GPU" else None,
            }
        )
    return rows


def _launches(device: CudaDevice) -> list[dict[str, Any]]:
    """Measure the cost of a small batch on the host."""
    slab = Slab(device, 64, 64 << 20)
    slots, rows = device.pinned(8000), device.pinned(4 * 32 * 1000)
    slots.view(np.int64)[:] = np.arange(1000)

    def launch() -> None:
        slab.run("gather", slots.ctypes.data, 1000, 32, address(rows))

    def wait() -> None:
        launch()
        slab.queue.mark().wait()

    wait()
    begin = time.perf_counter()
    for _ in range(1000):
        launch()
    each = (time.perf_counter() - begin) / 1000
    slab.queue.mark().wait()
    waits = []
    for _ in range(1000):
        begin = time.perf_counter()
        wait()
        waits.append(time.perf_counter() - begin)
    return [
        {"what": "launch of a kernel, time of the host", "us": each * 1e6},
        {"what": "gather 1,000 rows of dim 32 to the host and wait", "us": np.median(waits) * 1e6},
    ]


if __name__ == "__main__":
    sys.exit(main())
