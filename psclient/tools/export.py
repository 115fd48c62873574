"""Export tables to files that other programs read: Parquet and safetensors.

    Parquet      columns key uint64 | embedding float32[dim] | state float32[width - dim]
                 | version uint64 | step int64 | frequency uint64; lists have a fixed size; the
                 file's metadata has the table's schema as JSON under "ps.schema"
    safetensors  tensors keys U64[n], embeddings F32[n, dim], states F32[n, width - dim],
                 versions U64[n], steps I64[n], frequencies U64[n]; "ps.schema" in __metadata__

The column ``state`` is missing if the optimizer has no state. Rows are in no particular order, and
each key occurs once. The memory used does not grow with the table. A file gets its final name once
it is complete. Parquet needs pyarrow: pip install 'embedding-ps[export]'.

Keys have 64 bits, and a server does not know whether a trainer treats them as signed. Choose the
type of the column that the keys will be joined with: pandas, polars and DuckDB compare uint64 with
int64 by value, so a negative int64 key never matches the uint64 key with the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from psclient.calls import links
from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.rows import RowBatch, read_rows
from psclient.tools.arrow import KeyType, key_type
from psclient.tools.columns import OnProgress, Part
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
    progress: OnProgress | None = None,
) -> int:
    """Write a table to a file, or to a directory of files; return the number of rows written.

    checkpoint  name of a checkpoint to read the table from; None: the live table
    format      "parquet" or "safetensors"
    keys        type of the keys in the file, "uint64" or "int64"
    parts       write one file per shard, in parallel: part-00000.FORMAT, part-00001.FORMAT and so
                on, in the directory ``path``, which must be empty or not exist
    progress    called with the number of rows written since the last call

    Raises InvalidArgument if ``path`` cannot be written or pyarrow is missing, TableNotFound,
    CheckpointNotFound, DataLoss. After an error ``path`` is as it was before.
    """
    if format not in FORMATS:
        raise InvalidArgument(f"'format' must be one of {', '.join(FORMATS)}, got {format!r}")
    work = _Work(client, table, checkpoint, format, key_type(keys), progress)
    if not parts:
        with staged_file(path) as temporary:
            return work.write(temporary, None)
    return _export_parts(work, path, range(len(links(client))), format)


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
        progress: OnProgress | None,
    ) -> None:
        self._client = client
        self._table = table
        self._checkpoint = checkpoint
        self._write = FORMATS[format]
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
            return self._write(Part(path, schema, self._keys, self._batches(messages)), self._tell)
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


FORMATS: dict[str, Callable[[Part, OnProgress], int]] = {
    "parquet": write_parquet,
    "safetensors": write_safetensors,
}
