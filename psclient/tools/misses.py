"""How often rows would be missing in host memory, for every number of rows that it can keep.

lfu  the memory keeps the rows that were pushed most often. Follows exactly from the frequencies
     of all rows, if these stay what they are
lru  the memory keeps the rows that were pushed last. Follows from the number of keys that were
     pushed since the last push of a key, when it is pulled or pushed, sampled by the servers: a
     row leaves a memory of n rows once n other rows were pushed or used again since. (Hu et al.,
     Kinetic Modeling of Data Eviction in Cache, USENIX ATC 2016)

A miss is a pull or push of a row that is not in memory. Keys without a row are not counted.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psclient.tools.summary import Analysis

Policy = Literal["lfu", "lru"]
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # sizes of a memory, as shares of all rows


class Curve(NamedTuple):
    """Miss rates for some sizes of the memory; ``at`` interpolates between these sizes."""

    rows: NDArray[np.float64]  # [k]  sizes in rows, ascending
    misses: NDArray[np.float64]  # [k]  share of the pulled and pushed keys that miss, 0..1

    def at(self, rows: float) -> float:
        """Return the miss rate of a memory of ``rows`` rows."""
        return float(np.interp(rows, self.rows, self.misses))


def lfu(result: Analysis) -> Curve | None:
    """Return the miss rates of LFU; None if no key was pushed."""
    if not result.occurrences:
        return None
    rows = np.cumsum(result.frequencies.counts[::-1])
    hits = np.cumsum(result.occurrences_between[::-1])
    sizes = np.concatenate([[0.0], rows])
    used = np.flatnonzero(np.diff(sizes, prepend=-1.0))
    return Curve(sizes[used], (1 - np.concatenate([[0.0], hits]) / result.occurrences)[used])


def lru(result: Analysis) -> Curve | None:
    """Return the miss rates of LRU; None without samples, as for a checkpoint."""
    pushes, edges = result.reuses.counts, result.reuses.edges
    uses = pushes + result.pull_reuses.counts if len(result.pull_reuses.counts) else pushes
    pushed, used = int(pushes.sum()) + result.first_pushes, int(uses.sum())
    if not used:
        return None
    missing = np.concatenate([[1.0], 1 - np.cumsum(uses[:-1]) / used])  # with each distance or more
    above = np.concatenate([[1.0], 1 - np.cumsum(pushes[:-1]) / pushed])
    steps = np.diff(edges, prepend=0.0)
    sizes = np.cumsum(steps * (above[:-1] + above[1:]) / 2) * len(result.shard_rows)
    rows = np.concatenate([[0.0], sizes])
    smaller = rows < result.rows  # a memory of all rows misses none
    return Curve(np.append(rows[smaller], result.rows), np.append(missing[smaller], 0.0))


CURVES: dict[Policy, Any] = {"lfu": lfu, "lru": lru}


def curves(result: Analysis) -> dict[Policy, Curve]:
    """Return the miss rates of each policy for which there are any."""
    found = {policy: curve(result) for policy, curve in CURVES.items()}
    return {policy: curve for policy, curve in found.items() if curve is not None}


def sizes(result: Analysis) -> list[int]:
    """Return sizes of a memory to show, in rows, ascending."""
    return sorted({max(1, round(share * result.rows)) for share in SHARES}) if result.rows else []


def as_json(result: Analysis) -> dict[str, Any]:
    """Return the sizes of an analysis and its miss rates, for a JSON file.

    The miss rates are lists of [rows in host memory, share of the keys that miss].
    """
    return {
        "table": result.table,
        "checkpoint": result.checkpoint,
        "time": result.time,
        "rows": result.rows,
        "row_bytes": result.row_bytes,
        "index_bytes": result.index_bytes,
        "tiers": [{"name": t.name, "rows": t.rows, "bytes": t.bytes} for t in result.tiers],
        "misses": {
            policy: np.stack(curve, axis=1).tolist() for policy, curve in curves(result).items()
        },
    }
