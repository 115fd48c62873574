"""Load pyarrow, and read and write the metadata of Parquet files: for export, import, analysis.

Needs pyarrow: pip install 'embedding-ps[export]'.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from psclient.errors import InvalidArgument
from psproto import ps_pb2 as pb

GROUP_ROWS = 1 << 16  # minimum number of rows in a row group that is written, except the last
SCHEMA = "ps.schema"  # name of the metadata field with the table's schema
KeyType = type[np.uint64] | type[np.int64]
KEY_TYPES: dict[str, KeyType] = {"uint64": np.uint64, "int64": np.int64}


def pyarrow() -> tuple[Any, Any]:
    """Import pyarrow; return the modules (pyarrow, pyarrow.parquet).

    Raises InvalidArgument if they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidArgument(
            "Parquet needs pyarrow: pip install 'embedding-ps[export]'"
        ) from error
    return pyarrow, pyarrow.parquet


def array(arrow: Any, values: NDArray[Any]) -> Any:
    """Convert a NumPy array [n] to a pyarrow array, or [n, m] to an array of lists of fixed size m.

    arrow  the module pyarrow
    """
    if values.ndim == 1:
        return arrow.array(values)
    flat = arrow.array(np.ascontiguousarray(values).reshape(-1))
    return arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


def writer(parquet: Any, path: Any, schema: Any) -> Any:
    """Open a Parquet file for writing, with page checksums; return a pyarrow ParquetWriter.

    parquet  the module pyarrow.parquet
    path     the file, which is created or overwritten
    schema   pyarrow schema of its columns
    """
    return parquet.ParquetWriter(path, schema, write_page_checksum=True)


def key_type(name: str) -> KeyType:
    """Return np.uint64 or np.int64. Raises InvalidArgument unless ``name`` is one of the two."""
    if name not in KEY_TYPES:
        raise InvalidArgument(f"'keys' must be one of {', '.join(KEY_TYPES)}, got {name!r}")
    return KEY_TYPES[name]


def schema_text(schema: pb.TableSchema) -> str:
    """Convert a table's schema to JSON, for the metadata of a file."""
    values = json_format.MessageToDict(schema, preserving_proto_field_name=True)
    return json.dumps(values, sort_keys=True)


def optimizer_of(metadata: dict[bytes, bytes] | None) -> str | None:
    """Return the name of the optimizer whose state a file contains, or None if it is unknown.

    metadata  metadata of the Parquet file
    """
    text = (metadata or {}).get(SCHEMA.encode())
    try:
        return str(json.loads(text)["optimizer"]["name"]) if text else None
    except (ValueError, KeyError, TypeError):
        return None
