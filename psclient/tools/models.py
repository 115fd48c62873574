"""Write a table as a model that runs without servers: for PyTorch and for TorchRec.

    torch       {"keys": int64[n] sorted, "weight": float32[n + 1, dim]}: psclient.frozen.load
    state_dict  {NAME: float32[rows, dim]}, whose row i is that of the key i: the weight of an
                nn.EmbeddingBag, or of a table in a model of TorchRec

Both are files of torch.save that load with weights_only. Needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument
from psclient.tools.columns import OnProgress, Part
from psclient.tools.spool import Spool


def write_torch(part: Part, progress: OnProgress) -> int:
    """Write the rows of ``part`` as a file for psclient.frozen; return their number.

    The last row of the weight has the table's serving default, for keys without a row.
    """
    torch = _torch()
    with Spool(part) as spool:
        spool.fill(progress)
        keys, order = spool.ordered()
        weight = _empty(spool, spool.rows + 1, part.schema.dim)
        _fill(weight, spool.sorted_rows(order))
        weight[-1] = part.schema.serving_default
        torch.save({"keys": torch.from_numpy(keys), "weight": torch.from_numpy(weight)}, part.path)
        return spool.rows


def write_state_dict(part: Part, progress: OnProgress) -> int:
    """Write the rows of ``part`` as one tensor, whose row i is that of the key i.

    The option "rows" is the number of rows of the tensor (default: the largest key plus 1), and
    "name" its name. Rows of keys that the table does not have get its serving default. Returns the
    number of rows of the table. Raises InvalidArgument if a key is not in 0..rows-1.
    """
    torch = _torch()
    with Spool(part) as spool:
        spool.fill(progress)
        keys = np.asarray(spool.array("key")).view(np.int64)
        rows = int(part.options.get("rows") or keys.max(initial=-1) + 1)
        outside = (keys < 0) | (keys >= rows)
        if outside.any():
            raise InvalidArgument(
                f"table {part.schema.name!r}: a state dict has one row for each key in"
                f" 0..{rows - 1} ('rows'), but the table has the key {int(keys[outside][0])}; use"
                " the format torch, which has keys of its own, or more rows"
            )
        weight = _empty(spool, rows, part.schema.dim)
        weight[:] = part.schema.serving_default
        embeddings, step = spool.array("embedding"), 1 << 16
        for start in range(0, len(keys), step):
            weight[keys[start : start + step]] = embeddings[start : start + step]
        name = str(part.options.get("name") or f"embedding_bags.{part.schema.name}.weight")
        torch.save({name: torch.from_numpy(weight)}, part.path)
        return spool.rows


def _torch() -> Any:
    """Import PyTorch. Raises InvalidArgument if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise InvalidArgument(
            "this format needs PyTorch: pip install 'embedding-ps[torch]'"
        ) from error
    return torch


def _empty(spool: Spool, rows: int, dim: int) -> NDArray[np.float32]:
    """Return a matrix float32[rows, dim] in a temporary file: memory that the system can free."""
    if rows == 0:
        return np.empty((0, dim), np.float32)
    file = spool.temporary()
    file.truncate(rows * dim * 4)
    return np.memmap(file, np.float32, "r+", shape=(rows, dim))


def _fill(weight: NDArray[np.float32], rows: Iterator[NDArray[np.float32]]) -> None:
    """Copy rows, some at a time, into a matrix, from its first row on."""
    at = 0
    for some in rows:
        weight[at : at + len(some)] = some
        at += len(some)
