"""Export tables to files that other programs read, and as models that run without servers.

    Parquet      columns key uint64 | embedding float32[dim] | state float32[width - dim]
                 | version uint64 | step int64 | frequency uint64; lists have a fixed size; the
                 file's metadata has the table's schema as JSON under "ps.schema"
    safetensors  tensors keys U64[n], embeddings F32[n, dim], states F32[n, width - dim],
                 versions U64[n], steps I64[n], frequencies U64[n]; "ps.schema" in __metadata__
    npz          arrays of NumPy with the names of these tensors
    hps          a directory for HugeCTR: files key (int64) and emb_vector (float32)
    tfra         a directory for TensorFlow Recommenders Addons: files TABLE_mht_1of1-keys, -values
    torch        a file for psclient.frozen: the embeddings as a PyTorch module
    state_dict   one tensor whose row i is that of the key i, as TorchRec and PyTorch have it
    onnx         a directory with an ONNX model

The column ``state`` is missing if the optimizer has no state. Rows are in no particular order, and
each key occurs once. The memory used does not grow with the table, except that torch and onnx sort
the keys: 24 bytes per row. A file gets its final name once it is complete. Parquet needs pyarrow:
pip install 'embedding-ps[export]'.

Keys have 64 bits, and a server does not know whether a trainer treats them as signed. Choose the
type of the column that the keys will be joined with: pandas, polars and DuckDB compare uint64 with
int64 by value, so a negative int64 key never matches the uint64 key with the same bits.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from psclient import checkpoints, pruning
from psclient.calls import links
from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.rows import RowBatch, read_rows
from psclient.tools.arrow import KeyType, key_type
from psclient.tools.columns import OnProgress, Part
from psclient.tools.models import write_state_dict, write_torch
from psclient.tools.numpyfiles import write_hps, write_npz, write_tfra
from psclient.tools.onnxfile import write_onnx
from psclient.tools.parquet import write_parquet
from psclient.tools.safetensors import write_safetensors
from psclient.tools.staged import staged_directory, staged_file
from psproto import ps_pb2 as pb


def export(
    client: Client,
    table: str,
    path: Path,
    *,
    checkpoint: str | None = None,
    format: str = "parquet",
    keys: str = "uint64",
    parts: bool = False,
    options: Mapping[str, str | int] | None = None,
    progress: OnProgress | None = None,
) -> int:
    """Write a table to a file, or to a directory of files; return the number of rows written.

    checkpoint  name of a checkpoint to read the table from; None: the live table
    format      one of FORMATS
    keys        type of the keys in the file, "uint64" or "int64"
    parts       write one file per shard, in parallel: part-00000.FORMAT, part-00001.FORMAT and so
                on, in the directory ``path``, which must be empty or not exist
    options     options of the format. state_dict: "rows", "name"; onnx: "mode"
    progress    called with the number of rows written since the last call

    Raises InvalidArgument if ``path`` cannot be written or a package is missing, TableNotFound,
    CheckpointNotFound, DataLoss. After an error ``path`` is as it was before.
    """
    if format not in FORMATS:
        raise InvalidArgument(f"'format' must be one of {', '.join(FORMATS)}, got {format!r}")
    for each in options or {}:
        if each not in FORMATS[format].options:
            raise InvalidArgument(f"the format {format} has no option {each!r}")
    work = _Work(client, table, checkpoint, format, key_type(keys), options or {}, progress)
    if parts and not FORMATS[format].parts:
        raise InvalidArgument(f"'parts': the format {format} cannot be written in parts")
    if not parts:
        staged = staged_directory if FORMATS[format].directory else staged_file
        with staged(path) as temporary:
            return work.write(temporary, None)
    return _export_parts(work, path, range(len(links(client))), format)


@contextmanager
def at_barrier(
    client: Client,
    barrier: str,
    *,
    seconds: float = 600.0,
    on_ready: Callable[[], None] | None = None,
) -> Iterator[str]:
    """Take a checkpoint of all tables up to a barrier; yield its name, and delete it in the end.

    barrier   name of the barrier, which the trainer places (Client.barrier)
    seconds   how long the shards wait for it
    on_ready  called once, when all shards wait for the barrier

    Raises the errors of ``admin.checkpoint``.
    """
    name = f"export-{secrets.token_hex(8)}"
    checkpoints.checkpoint(
        client, name, until_barrier=barrier, barrier_timeout=seconds, on_ready=on_ready
    )
    try:
        yield name
    finally:
        pruning.delete(client, name)


def _export_parts(work: _Work, path: Path, shards: Sequence[int], format: str) -> int:
    """Write one file per shard to the directory ``path``; return the number of rows."""
    with (
        staged_directory(path) as directory,
        ThreadPoolExecutor(len(shards), "psclient-export") as pool,
    ):
        files = [directory / f"part-{shard:05}.{format}" for shard in shards]
        try:
            return sum(pool.map(work.write, files, shards))
        finally:
            work.stop.set()


class _Work:
    """A running export: one thread writes all rows, or one thread per shard writes its rows.

    The arguments are those of ``export``.

    stop  event; once it is set, all threads stop at their next batch
    """

    def __init__(
        self,
        client: Client,
        table: str,
        checkpoint: str | None,
        format: str,
        keys: KeyType,
        options: Mapping[str, str | int],
        progress: OnProgress | None,
    ) -> None:
        self._client = client
        self._table = table
        self._checkpoint = checkpoint
        self._write = FORMATS[format].write
        self._options = options
        self._keys = keys
        self._progress = progress
        self._telling = threading.Lock()
        self.stop = threading.Event()

    def write(self, path: Path, shard: int | None) -> int:
        """Write the rows of a shard to the file ``path``; return their number.

        shard  number of the shard; None: write the rows of all shards
        """
        messages = read_rows(
            self._client,
            self._table,
            checkpoint=self._checkpoint,
            shards=None if shard is None else [shard],
        )
        try:
            schema = next(messages)
            assert isinstance(schema, pb.TableSchema)
            part = Part(path, schema, self._keys, self._batches(messages), self._options)
            return self._write(part, self._tell)
        except BaseException:
            self.stop.set()
            raise
        finally:
            messages.close()

    def _batches(self, messages: Iterator[pb.TableSchema | RowBatch]) -> Iterator[RowBatch]:
        """Yield the batches of rows in ``messages`` until they end or ``stop`` is set."""
        for batch in messages:
            if self.stop.is_set():
                return
            assert isinstance(batch, RowBatch)
            yield batch

    def _tell(self, rows: int) -> None:
        """Call the progress function with ``rows``, on one thread at a time."""
        if self._progress is not None:
            with self._telling:
                self._progress(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A file format of an export.

    write      writes the rows of a Part; returns their number
    suffix     end of the names of its files
    directory  it is a directory of files
    parts      it can be written in parts, one file per shard
    options    names of its options
    """

    write: Callable[[Part, OnProgress], int]
    suffix: str
    directory: bool = False
    parts: bool = False
    options: tuple[str, ...] = ()


FORMATS = {
    "parquet": Format(write=write_parquet, suffix=".parquet", parts=True),
    "safetensors": Format(write=write_safetensors, suffix=".safetensors", parts=True),
    "npz": Format(write=write_npz, suffix=".npz", parts=True),
    "hps": Format(write=write_hps, suffix="", directory=True),
    "tfra": Format(write=write_tfra, suffix="", directory=True),
    "torch": Format(write=write_torch, suffix=".pt"),
    "state_dict": Format(write=write_state_dict, suffix=".pt", options=("rows", "name")),
    "onnx": Format(write=write_onnx, suffix="", directory=True, options=("mode",)),
}
