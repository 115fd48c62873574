"""Write a table to a Parquet file."""

from __future__ import annotations

from psclient.tools.arrow import SCHEMA, array, pyarrow, schema_text, writer
from psclient.tools.columns import OnProgress, Part


def write_parquet(part: Part, progress: OnProgress) -> int:
    """Write the rows of ``part`` to a new Parquet file; return their number."""
    arrow, parquet = pyarrow()
    out, total = None, 0
    try:
        for columns in part.columns():
            arrays = [array(arrow, values) for values in columns.values()]
            if out is None:
                fields = [(name, a.type) for name, a in zip(columns, arrays, strict=True)]
                schema = arrow.schema(fields, metadata={SCHEMA: schema_text(part.schema)})
                out = writer(parquet, part.path, schema)
            out.write_batch(arrow.record_batch(arrays, schema=schema))
            total += len(columns["key"])
            progress(len(columns["key"]))
    finally:
        if out is not None:
            out.close()
    return total
