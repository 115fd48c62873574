"""A table as a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from psclient.admin import RowBatch
from psclient.tools.arrow import SCHEMA, array, pyarrow, schema_text
from psclient.tools.columns import Tell, columns
from psproto import ps_pb2 as pb


def write_parquet(
    path: Path, schema: pb.TableSchema, batches: Iterator[RowBatch], progress: Tell
) -> int:
    """Write rows to a new file; returns how many."""
    arrow, parquet = pyarrow()
    writer, total = None, 0
    with ExitStack() as stack:
        for batch in batches:
            named = columns(batch, schema.dim)
            arrays = [array(arrow, values) for values in named.values()]
            if writer is None:
                described = arrow.schema(
                    [(name, made.type) for name, made in zip(named, arrays, strict=True)],
                    metadata={SCHEMA: schema_text(schema)},
                )
                writer = stack.enter_context(parquet.ParquetWriter(path, described))
            writer.write_batch(arrow.record_batch(arrays, schema=described))
            total += len(batch.keys)
            progress(len(batch.keys))
    return total
