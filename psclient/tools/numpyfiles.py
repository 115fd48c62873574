"""Write a table to files of plain numbers: for NumPy, HugeCTR, TensorFlow Recommenders Addons."""

from __future__ import annotations

import zipfile
from typing import IO

import numpy as np

from psclient.tools.arrow import SCHEMA, schema_text
from psclient.tools.columns import OnProgress, Part
from psclient.tools.safetensors import PLURAL
from psclient.tools.spool import Spool


def write_npz(part: Part, progress: OnProgress) -> int:
    """Write the rows of ``part`` to a new .npz file; return their number.

    The arrays have the names of the tensors in a safetensors file. The array "ps.schema", uint8[n],
    contains the table's schema as JSON.
    """
    with Spool(part) as spool:
        spool.fill(progress)
        with zipfile.ZipFile(part.path, "w", zipfile.ZIP_STORED) as archive:
            for name, dtype in spool.dtypes.items():
                with archive.open(f"{PLURAL[name]}.npy", "w", force_zip64=True) as out:
                    _write_header(out, dtype, (spool.rows, *spool.shapes[name]))
                    spool.copy(name, out)
            text = schema_text(part.schema).encode()
            with archive.open(f"{SCHEMA}.npy", "w") as out:
                _write_header(out, "|u1", (len(text),))
                out.write(text)
        return spool.rows


def write_hps(part: Part, progress: OnProgress) -> int:
    """Write the keys and embeddings of ``part`` as HugeCTR reads them for its Hierarchical
    Parameter Server: the files key (int64) and emb_vector (float32). Return the number of rows."""
    return _write_pair(part, "key", "emb_vector", progress)


def write_tfra(part: Part, progress: OnProgress) -> int:
    """Write the keys and embeddings of ``part`` as TensorFlow Recommenders Addons reads the table
    of this name: TABLE_mht_1of1-keys (int64) and -values (float32). Return the number of rows."""
    name = part.schema.name.replace("/", "_")
    return _write_pair(part, f"{name}_mht_1of1-keys", f"{name}_mht_1of1-values", progress)


def _write_pair(part: Part, keys: str, embeddings: str, progress: OnProgress) -> int:
    """Write the keys and embeddings of ``part`` to two files of plain numbers in a directory.

    keys        name of the file with the keys
    embeddings  name of the file with the embeddings

    Returns the number of rows.
    """
    rows = 0
    with (
        (part.path / keys).open("wb") as key_file,
        (part.path / embeddings).open("wb") as embedding_file,
    ):
        for columns in part.columns():
            key_file.write(columns["key"].tobytes())
            embedding_file.write(np.ascontiguousarray(columns["embedding"]).data)
            rows += len(columns["key"])
            progress(len(columns["key"]))
    return rows


def _write_header(out: IO[bytes], dtype: str, shape: tuple[int, ...]) -> None:
    """Write the header of an array in the format of NumPy."""
    description = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, description)
