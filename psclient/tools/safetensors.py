"""A table as a safetensors file.

file    = size u64 | header, JSON, padded with blanks to 8 bytes | data
header  = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from psclient.admin import RowBatch
from psclient.tools.arrow import SCHEMA, schema_text
from psclient.tools.columns import Tell, columns
from psproto import ps_pb2 as pb

_DTYPES = {"<u8": "U64", "<i8": "I64", "<f4": "F32"}
_PLURAL = {
    "key": "keys",
    "embedding": "embeddings",
    "state": "states",
    "version": "versions",
    "step": "steps",
    "frequency": "frequencies",
}


def write_safetensors(
    path: Path, schema: pb.TableSchema, batches: Iterator[RowBatch], progress: Tell
) -> int:
    """Each column goes to a file of its own first, since the header says how long they are."""
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        total = 0
        for batch in batches:
            for name, values in columns(batch, schema.dim).items():
                if name not in files:
                    files[name] = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
                    kinds[name] = (values.dtype.str, values.shape[1:])
                files[name].write(np.ascontiguousarray(values).data)
            total += len(batch.keys)
            progress(len(batch.keys))
        header: dict[str, Any] = {"__metadata__": {SCHEMA: schema_text(schema)}}
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
