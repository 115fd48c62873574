"""What an export, an import and an analysis have in common about Parquet files.

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

GROUP_ROWS = 1 << 16  # rows that are written or read at once
SCHEMA = "ps.schema"


def pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet; InvalidArgument if they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidArgument(
            "Parquet needs pyarrow: pip install 'embedding-ps[export]'"
        ) from error
    return pyarrow, pyarrow.parquet


def array(arrow: Any, values: NDArray[Any]) -> Any:
    """A column or matrix as an array of pyarrow."""
    if values.ndim == 1:
        return arrow.array(values)
    flat = arrow.array(np.ascontiguousarray(values).reshape(-1))
    return arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


def schema_text(schema: pb.TableSchema) -> str:
    """A schema as JSON, for the metadata of a file."""
    values = json_format.MessageToDict(schema, preserving_proto_field_name=True)
    return json.dumps(values, sort_keys=True)
