"""Write a table to a safetensors file.

file    = size of the header, u64 | header, JSON, padded with blanks to 8 bytes | data
header  = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from typing import IO, Any

import numpy as np

from psclient.tools.arrow import SCHEMA, schema_text
from psclient.tools.columns import OnProgress, Part

Kind = tuple[str, tuple[int, ...]]  # (NumPy dtype of a column, shape of its value for one row)

_DTYPES = {"<u8": "U64", "<i8": "I64", "<f4": "F32"}
_PLURAL = {
    "key": "keys",
    "embedding": "embeddings",
    "state": "states",
    "version": "versions",
    "step": "steps",
    "frequency": "frequencies",
}


def write_safetensors(part: Part, progress: OnProgress) -> int:
    """Write the rows of ``part`` to a new safetensors file; return their number.

    Each column is first written to a temporary file, because the header at the start of the file
    contains the number of rows.
    """
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        kinds: dict[str, Kind] = {}
        total = 0
        for columns in part.columns():
            for name, values in columns.items():
                if name not in files:
                    files[name] = stack.enter_context(tempfile.TemporaryFile(dir=part.path.parent))
                    kinds[name] = (values.dtype.str, values.shape[1:])
                files[name].write(np.ascontiguousarray(values).data)
            total += len(columns["key"])
            progress(len(columns["key"]))
        header = _header(schema_text(part.schema), total, kinds)
        with part.path.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for file in files.values():
                file.seek(0)
                shutil.copyfileobj(file, out, 1 << 20)
    return total


def _header(schema: str, rows: int, kinds: Mapping[str, Kind]) -> bytes:
    """Return the header of a file.

    schema  the table's schema, as JSON
    rows    number of rows
    kinds   {column: its Kind}, in the order of the file
    """
    header: dict[str, Any] = {"__metadata__": {SCHEMA: schema}}
    start = 0
    for name, (dtype, shape) in kinds.items():
        end = start + np.dtype(dtype).itemsize * math.prod((rows, *shape))
        header[_PLURAL[name]] = {
            "dtype": _DTYPES[dtype],
            "shape": [rows, *shape],
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)
