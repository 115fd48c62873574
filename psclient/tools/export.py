"""Tables as files that other programs read: Parquet and safetensors.

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

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from psclient import admin
from psclient.admin import RowBatch
from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.tools.columns import Tell, grouped
from psclient.tools.parquet import write_parquet
from psclient.tools.safetensors import write_safetensors
from psproto import ps_pb2 as pb


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
        rows = FORMATS[format](beside, schema, grouped(messages), progress or (lambda _: None))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return rows


FORMATS: dict[str, Callable[[Path, pb.TableSchema, Iterator[RowBatch], Tell], int]] = {
    "parquet": write_parquet,
    "safetensors": write_safetensors,
}
