"""Rows of Parquet files into tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient import admin
from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.tools.arrow import GROUP_ROWS, SCHEMA, pyarrow
from psclient.tools.columns import Tell


def import_parquet(client: Client, table: str, path: Path, *, progress: Tell | None = None) -> int:
    """Write the rows of a Parquet file into a table that exists; returns how many.

    Columns: key (int64 or uint64) and embedding (a list of dim numbers); step and frequency where
    there, else the largest step that was pushed to the table, and 1; state where the file says that
    it is of an optimizer like the table's, else the state is that of new rows. Rows of
    these keys are replaced; of equal keys the last one stays.
    """
    arrow, parquet = pyarrow()
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
