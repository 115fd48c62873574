"""Write a table to a safetensors file.

file    = size of the header, u64 | header, JSON, padded with blanks to 8 bytes | data
header  = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from psclient.tools.arrow import SCHEMA, schema_text
from psclient.tools.columns import OnProgress, Part
from psclient.tools.spool import Spool

PLURAL = {  # names of the arrays in files, by column
    "key": "keys",
    "embedding": "embeddings",
    "state": "states",
    "version": "versions",
    "step": "steps",
    "frequency": "frequencies",
}
_DTYPES = {"<u8": "U64", "<i8": "I64", "<f4": "F32"}


def write_safetensors(part: Part, progress: OnProgress) -> int:
    """Write the rows of ``part`` to a new safetensors file; return their number.

    Each column is first written to a temporary file, because the header at the start of the file
    contains the number of rows.
    """
    with Spool(part) as spool:
        spool.fill(progress)
        header = _header(schema_text(part.schema), spool)
        with part.path.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for name in spool.dtypes:
                spool.copy(name, out)
        return spool.rows


def _header(schema: str, spool: Spool) -> bytes:
    """Return the header of a file. schema: the table's schema, as JSON."""
    header: dict[str, Any] = {"__metadata__": {SCHEMA: schema}}
    start = 0
    for name, dtype in spool.dtypes.items():
        shape = (spool.rows, *spool.shapes[name])
        end = start + np.dtype(dtype).itemsize * math.prod(shape)
        header[PLURAL[name]] = {
            "dtype": _DTYPES[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)
