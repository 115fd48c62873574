"""The tiers of a table as statistics and tools show them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage.index import PLACE_BITS, Locations
from storage.kernels import Slots
from storage.results import Moves, TierStats
from storage.tiers.base import Writable
from storage.tiers.hbm import HbmTier
from storage.tiers.lmdb import Blocks

HBM = "hbm"


def tier_stats(host: Writable, blocks: Blocks | None, moves: Moves) -> tuple[TierStats, ...]:
    """Return rows, bytes, hits and misses of each tier, the fastest first.

    host    the tier whose rows can be pushed
    blocks  the rows on disk; None: there is no cold tier
    moves   what happened between the tiers
    """
    hits, rows, found = moves.hits, host.rows, []
    if isinstance(host, HbmTier):
        # moves.hits leaves out rows that their push created or read from disk. host.hits has those
        # of them that moved to the GPU before the step: a server moves none so soon, tests do.
        hits, rows = max(0, hits - host.hits), rows - host.hbm_rows
        slower = hits + moves.misses
        found.append(
            TierStats(HBM, host.hbm_rows, host.hbm_bytes, host.hits, slower, on_disk=False)
        )
    found.append(TierStats(host.name, rows, host.bytes, hits, moves.misses, on_disk=False))
    if blocks is not None:
        disk = blocks.name, blocks.rows, blocks.bytes, moves.misses, 0
        found.append(TierStats(*disk, on_disk=True))
    return tuple(found)


def tier_names(
    host: Writable, blocks: Blocks | None, locations: Locations, slots: Slots
) -> list[str]:
    """Return the name of each location's tier; "" for location 0, a key without a row.

    slots  int64[n]  slots of those in ``host``; ABSENT for others
    """
    names = {0: "", host.code: host.name}
    if blocks is not None:
        names[blocks.code] = blocks.name
    found = [names[code] for code in (locations >> np.uint64(PLACE_BITS)).tolist()]
    for name, part in by_tier(host, np.flatnonzero(slots >= 0), slots):
        for i in part.tolist():
            found[i] = name
    return found


def by_tier(
    host: Writable, indices: NDArray[np.int64], slots: Slots
) -> list[tuple[str, NDArray[np.int64]]]:
    """Split rows of ``host`` by where their numbers are: pairs of tier name and ``indices``.

    indices  int64[m]  which of ``slots`` to split
    """
    if not isinstance(host, HbmTier):
        return [(host.name, indices)]
    near = host.in_hbm(slots[indices])
    return [(HBM, indices[near]), (host.name, indices[~near])]
