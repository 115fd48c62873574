"""What export, import and analysis share about Parquet files.

Parquet needs pyarrow: pip install 'embedding-ps[export]'.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from psclient.errors import InvalidArgument
from psproto import ps_pb2 as pb

GROUP_ROWS = 1 << 16  # rows of a row group that is written
SCHEMA = "ps.schema"  # key of the table's schema in a file's metadata
KeyType = type[np.uint64] | type[np.int64]
KEY_TYPES: dict[str, KeyType] = {"uint64": np.uint64, "int64": np.int64}


def pyarrow() -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet; InvalidArgument if they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidArgument(
            "Parquet needs pyarrow: pip install 'embedding-ps[export]'"
        ) from error
    return pyarrow, pyarrow.parquet


def array(arrow: Any, values: NDArray[Any]) -> Any:
    """Return a vector [n] as an array of pyarrow, a matrix [n, m] as lists of fixed size m."""
    if values.ndim == 1:
        return arrow.array(values)
    flat = arrow.array(np.ascontiguousarray(values).reshape(-1))
    return arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


def writer(parquet: Any, path: Any, schema: Any) -> Any:
    """Open a Parquet file for writing, with checksums of its pages."""
    return parquet.ParquetWriter(path, schema, write_page_checksum=True)


def key_type(name: str) -> KeyType:
    """Return the dtype of the column of keys; InvalidArgument for an unknown name."""
    if name not in KEY_TYPES:
        raise InvalidArgument(f"keys must be one of {', '.join(KEY_TYPES)}, got {name!r}")
    return KEY_TYPES[name]


def schema_text(schema: pb.TableSchema) -> str:
    """Return a table's schema as JSON, for the metadata of a file."""
    values = json_format.MessageToDict(schema, preserving_proto_field_name=True)
    return json.dumps(values, sort_keys=True)


def optimizer_of(metadata: dict[bytes, bytes] | None) -> str | None:
    """Return the optimizer whose state a file contains; None if its metadata has no schema."""
    text = (metadata or {}).get(SCHEMA.encode())
    try:
        return str(json.loads(text)["optimizer"]["name"]) if text else None
    except (ValueError, KeyError, TypeError):
        return None
