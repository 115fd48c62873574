"""Measure exported models without servers, and an import.

The ONNX model is that of ``psctl export --format onnx --mode none``: keys become row numbers, then
rows. The frozen module of PyTorch does the same. The limit is nn.EmbeddingBag with row numbers.
Each model runs in a process of its own, on one thread. Without onnxruntime, its part is skipped.

The limit of an import is NumPy reading the same file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report, arguments
from benchmarks.servers import shards
from psclient import Client
from psclient.rows import RowBatch
from psclient.tools.columns import Part
from psclient.tools.export import FORMATS
from psclient.tools.importer import check, open_source, write
from psproto import ps_pb2 as pb

DIM = 16
BATCH = 10_000  # keys in one call of a model
CALLS = 30


def batches(rows: int) -> Iterator[RowBatch]:
    """Yield rows with random embeddings, whose keys spread over all 64 bits."""
    rng = np.random.default_rng(0)
    for start in range(0, rows, 1 << 16):
        n = min(1 << 16, rows - start)
        keys = np.arange(start, start + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        zeros = np.zeros(n, np.uint64)
        embeddings = rng.standard_normal((n, DIM), np.float32)
        yield RowBatch(keys, zeros, zeros.view(np.int64), zeros, embeddings)


def written(directory: Path, rows: int, format: str) -> Path:
    """Write a model with some rows; return its file."""
    path = directory / f"{format}-{rows}"
    if FORMATS[format].directory:
        path.mkdir()
    options = {"mode": "none"} if format == "onnx" else {}
    schema = pb.TableSchema(name="rows", dim=DIM)
    FORMATS[format].write(Part(path, schema, np.int64, batches(rows), options), lambda _: None)
    return path / "model.onnx" if format == "onnx" else path


def measure(what: str, path: str, rows: int) -> dict[str, Any]:
    """Load a model and call it; return the seconds and bytes that this takes.

    what  "onnx", "frozen", or "limit": nn.EmbeddingBag on row numbers
    """
    rng = np.random.default_rng(1)
    numbers = rng.integers(0, rows, (BATCH, 1))
    keys = (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    if what == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        before, start = resident(), time.perf_counter()
        session = onnxruntime.InferenceSession(path, options)
        run: Callable[[], Any] = lambda: session.run(None, {"keys": keys})  # noqa: E731
    else:
        import torch

        from psclient import frozen

        torch.set_num_threads(1)
        before, start = resident(), time.perf_counter()
        bag = frozen.load(path)
        plain = torch.nn.EmbeddingBag.from_pretrained(bag.weight, mode="sum")
        given = torch.from_numpy(keys if what == "frozen" else numbers)
        run = lambda: (bag if what == "frozen" else plain)(given)  # noqa: E731
    run()
    loaded = time.perf_counter() - start
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {
        "load s": loaded,
        "memory MB": (resident() - before) / 1e6,
        f"{BATCH:,} keys ms": float(np.median(times)) * 1e3,
    }


def resident() -> int:
    """Return the memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def models(report: Report, directory: Path, sizes: list[int]) -> None:
    """Measure the models with each number of rows."""
    onnx = find_spec("onnx") is not None and find_spec("onnxruntime") is not None
    if not onnx:
        report.note("onnx or onnxruntime is not installed: no figures of ONNX")
    found = []
    for rows in sizes:
        for what, format in (("onnx", "onnx"), ("frozen", "torch"), ("limit", "torch")):
            if what == "onnx" and not onnx:
                continue
            path = directory / f"{format}-{rows}"
            path = path if path.exists() else written(directory, rows, format)
            command = [sys.executable, "-m", "benchmarks.models", "--measure", what, str(path)]
            done = subprocess.run([*command, str(rows)], stdout=subprocess.PIPE, check=True)
            size = path.stat().st_size / 1e6
            found.append({"model": what, "rows": rows, "file MB": size, **json.loads(done.stdout)})
    report.section("models without servers, one thread", found)


def imports(report: Report, directory: Path, rows: int) -> None:
    """Measure an import of a .npy file into one shard, pass by pass."""
    path = directory / "rows.npy"
    np.save(path, np.random.default_rng(0).standard_normal((rows, DIM), np.float32))
    with shards(1) as (addresses, _), Client(addresses) as client:
        client.create_table("rows", DIM, optimizer="sgd")
        source = open_source(client, "rows", path)
        steps: dict[str, Callable[[], object]] = {
            "check all rows": lambda: check(source),
            "write all rows": lambda: write(client, source),
            "limit: NumPy reads the file": lambda: np.load(path),
        }
        found = []
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
            found.append({"step": name, "rows": rows, "s": seconds, "rows/s": rows / seconds})
    report.section(f"import of a .npy file, dim {DIM}, one shard without a log", found)


def main() -> None:
    """Measure the models, then the import."""
    parser = arguments(__doc__)
    parser.add_argument("--measure", nargs=3, help="Used by this benchmark itself.")
    options = parser.parse_args()
    if options.measure:
        what, path, rows = options.measure
        print(json.dumps(measure(what, path, int(rows))))
        return
    report = Report("models", options.json)
    with tempfile.TemporaryDirectory(prefix="ps-bench-") as name:
        sizes = [100_000] if options.quick else [1_000_000, 10_000_000]
        models(report, Path(name), sizes)
        imports(report, Path(name), 200_000 if options.quick else 2_000_000)
    report.close()


if __name__ == "__main__":
    main()
