"""Tables as files that other programs read, and back: Parquet and safetensors.

    Parquet      key uint64 | embedding float32[dim] | state float32[width - dim] | version uint64
                 | step int64 | frequency uint64; the lists have a fixed size; the file's metadata
                 has the table's schema as JSON under "ps.schema"
    safetensors  tensors keys U64[n], embeddings F32[n, dim], states F32[n, width - dim],
                 versions U64[n], steps I64[n], frequencies U64[n]; "ps.schema" alike

``state`` is missing where the optimizer keeps none. Rows come in no order, each key once. Memory
does not grow with the table. A file is whole, or not there under its name. Parquet needs pyarrow:
pip install 'embedding-ps[export]'.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from psclient import admin
from psclient.admin import RowBatch
from psclient.client import Client
from psclient.errors import InvalidArgument
from psproto import ps_pb2 as pb

GROUP_ROWS = 1 << 16  # rows that are written or read at once
SCHEMA = "ps.schema"
Tell = Callable[[int], Any]  # is told how many more rows are done


def export(
    client: Client,
    table: str,
    path: Path,
    *,
    checkpoint: str | None = None,
    format: str = "parquet",
    progress: Tell | None = None,
) -> int:
    """Write a table as it is, or as a checkpoint has it, to a file; returns its rows.

    format  "parquet" or "safetensors"

    Raises InvalidArgument if pyarrow is missing, TableNotFound, CheckpointNotFound, DataLoss.
    """
    if format not in FORMATS:
        raise InvalidArgument(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    messages = admin.read_rows(client, table, checkpoint=checkpoint)
    schema = next(messages)
    assert isinstance(schema, pb.TableSchema)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        rows = FORMATS[format](beside, schema, _grouped(messages), progress or (lambda _: None))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return rows


def import_parquet(client: Client, table: str, path: Path, *, progress: Tell | None = None) -> int:
    """Write the rows of a Parquet file into a table that exists; returns how many.

    Columns: key (int64 or uint64) and embedding (a list of dim numbers); step and frequency where
    there, else the largest step that was pushed to the table, and 1; state where the file says that
    it is of an optimizer like the table's, else the state is that of new rows. Rows of
    these keys are replaced; of equal keys the last one stays.
    """
    arrow, parquet = _pyarrow()
    info = client.describe_table(table)
    with parquet.ParquetFile(path) as file:
        names = set(file.schema_arrow.names)
        if missing := {"key", "embedding"} - names:
            raise InvalidArgument(f"{path}: there is no column {min(missing)!r}")
        columns = ["key", "embedding", *(c for c in ("step", "frequency") if c in names)]
        if "state" in names and _optimizer(file.schema_arrow.metadata) == info.optimizer:
            columns.append("state")
        total = 0
        for batch in file.iter_batches(batch_size=GROUP_ROWS, columns=columns):
            try:
                total += _write(client, table, info.dim, batch)
            except arrow.ArrowInvalid as error:
                raise InvalidArgument(f"{path}: {error}") from error
            if progress is not None:
                progress(batch.num_rows)
    return total


def _write(client: Client, table: str, dim: int, batch: Any) -> int:
    """Write one batch of a file; returns its distinct keys."""
    n = batch.num_rows
    keys = batch["key"].to_numpy(zero_copy_only=False)
    if keys.dtype not in (np.dtype(np.int64), np.dtype(np.uint64)):
        raise InvalidArgument(f"table {table!r}: key must be int64 or uint64, got {keys.dtype}")
    rows = _matrix(batch["embedding"], n)
    if rows.shape[1] != dim:
        raise InvalidArgument(f"table {table!r} has dim {dim}, the file {rows.shape[1]}")
    names = batch.schema.names
    if "state" in names:
        rows = np.concatenate([rows, _matrix(batch["state"], n)], axis=1)
    more = {
        argument: batch[name].to_numpy(zero_copy_only=False)
        for argument, name in (("steps", "step"), ("frequencies", "frequency"))
        if name in names
    }
    _, last = np.unique(keys[::-1], return_index=True)
    chosen = n - 1 - last
    more = {argument: values[chosen] for argument, values in more.items()}
    admin.write_rows(client, table, keys[chosen], rows[chosen], **more)
    return len(chosen)


def _matrix(column: Any, n: int) -> NDArray[np.float32]:
    """A column of lists as float32[n, length]; InvalidArgument unless all are equally long."""
    if column.null_count:
        raise InvalidArgument("a list of numbers is null")
    numbers = column.flatten()
    if n and (len(numbers) % n or len(np.unique(column.value_lengths().to_numpy())) != 1):
        raise InvalidArgument("lists of numbers must all have one length")
    return np.asarray(numbers.to_numpy(zero_copy_only=False), np.float32).reshape(
        n, len(numbers) // n if n else 0
    )


def _optimizer(metadata: Any) -> str | None:
    """The optimizer that a file's state is of."""
    text = (metadata or {}).get(SCHEMA.encode())
    try:
        return str(json.loads(text)["optimizer"]["name"]) if text else None
    except (ValueError, KeyError, TypeError):
        return None


def _grouped(messages: Iterator[pb.TableSchema | RowBatch]) -> Iterator[RowBatch]:
    """Fewer, larger batches."""
    held: list[RowBatch] = []
    rows = 0
    for batch in messages:
        assert isinstance(batch, RowBatch)
        held.append(batch)
        rows += len(batch.keys)
        if rows >= GROUP_ROWS:
            yield _joined(held)
            held, rows = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[RowBatch]) -> RowBatch:
    return RowBatch(
        *(
            np.concatenate([getattr(each, field) for each in held])
            for field in ("keys", "versions", "steps", "frequencies", "rows")
        )
    )


def _text(schema: pb.TableSchema) -> str:
    values = json_format.MessageToDict(schema, preserving_proto_field_name=True)
    return json.dumps(values, sort_keys=True)


# ---- Parquet


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidArgument(
            "Parquet needs pyarrow: pip install 'embedding-ps[export]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _write_parquet(
    path: Path, schema: pb.TableSchema, batches: Iterator[RowBatch], progress: Tell
) -> int:
    arrow, parquet = _pyarrow()
    writer, total = None, 0
    with ExitStack() as stack:
        for batch in batches:
            columns = _columns(batch, schema.dim)
            arrays = [_arrow(arrow, values) for values in columns.values()]
            if writer is None:
                described = arrow.schema(
                    [(name, array.type) for name, array in zip(columns, arrays, strict=True)],
                    metadata={SCHEMA: _text(schema)},
                )
                writer = stack.enter_context(parquet.ParquetWriter(path, described))
            writer.write_batch(arrow.record_batch(arrays, schema=described))
            total += len(batch.keys)
            progress(len(batch.keys))
    return total


def _columns(batch: RowBatch, dim: int) -> dict[str, NDArray[Any]]:
    columns: dict[str, NDArray[Any]] = {"key": batch.keys, "embedding": batch.rows[:, :dim]}
    if batch.rows.shape[1] > dim:
        columns["state"] = batch.rows[:, dim:]
    return columns | {
        "version": batch.versions,
        "step": batch.steps,
        "frequency": batch.frequencies,
    }


def _arrow(arrow: Any, values: NDArray[Any]) -> Any:
    if values.ndim == 1:
        return arrow.array(values)
    flat = arrow.array(np.ascontiguousarray(values).reshape(-1))
    return arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


# ---- safetensors
#
#   file    = size u64 | header, JSON, padded with blanks to 8 bytes | data
#   header  = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}

_DTYPES = {"<u8": "U64", "<i8": "I64", "<f4": "F32"}
_PLURAL = {
    "key": "keys",
    "embedding": "embeddings",
    "state": "states",
    "version": "versions",
    "step": "steps",
    "frequency": "frequencies",
}


def _write_safetensors(
    path: Path, schema: pb.TableSchema, batches: Iterator[RowBatch], progress: Tell
) -> int:
    """Each column goes to a file of its own first, since the header says how long they are."""
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        total = 0
        for batch in batches:
            for name, values in _columns(batch, schema.dim).items():
                if name not in files:
                    files[name] = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
                    kinds[name] = (values.dtype.str, values.shape[1:])
                files[name].write(np.ascontiguousarray(values).data)
            total += len(batch.keys)
            progress(len(batch.keys))
        header: dict[str, Any] = {"__metadata__": {SCHEMA: _text(schema)}}
        at = 0
        for name, file in files.items():
            dtype, shape = kinds[name]
            header[_PLURAL[name]] = {
                "dtype": _DTYPES[dtype],
                "shape": [total, *shape],
                "data_offsets": [at, at + file.tell()],
            }
            at += file.tell()
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for file in files.values():
                file.seek(0)
                shutil.copyfileobj(file, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
    return total


FORMATS: dict[str, Callable[[Path, pb.TableSchema, Iterator[RowBatch], Tell], int]] = {
    "parquet": _write_parquet,
    "safetensors": _write_safetensors,
}
