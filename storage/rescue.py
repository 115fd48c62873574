"""What a table does when one of its blocks on disk is found to be damaged."""

from __future__ import annotations

import numpy as np

from storage.damage import Damage
from storage.extents import POSITION_BITS
from storage.index import Index, places
from storage.kernels import Keys
from storage.slots import HOME, SlotEntries
from storage.tiers.lmdb import Blocks


def record(blocks: Blocks, slots: SlotEntries, number: int, damage: Damage | None) -> bool:
    """Record the result of a check of a block. Returns whether its damage is new.

    blocks  the blocks of the table
    slots   entries of its rows in host memory
    number  of the block
    damage  what is wrong with it; None: nothing

    Rows that cannot be read in the block, but are in host memory, too, become dirty. So the next
    flush writes them. The caller makes sure that no flush is running, which would miss them.
    """
    new = blocks.checked(number, damage)
    extent = blocks.damaged_numbers().get(number)
    if extent is None:
        return False
    lost = blocks.lost(extent)
    block = int(blocks.locations(extent, np.zeros(1, np.int64))[0]) >> POSITION_BITS
    homes = slots.array[: slots.used, HOME]
    clean = np.flatnonzero(homes >> np.uint64(POSITION_BITS) == np.uint64(block))
    positions = (homes[clean] & np.uint64((1 << POSITION_BITS) - 1)).astype(np.int64)
    clean, positions = clean[lost[positions]], positions[lost[positions]]
    slots.settle(clean, np.zeros(len(clean), np.uint64))
    blocks.forget(places(blocks.locations(extent, positions), blocks.code)[0])
    return new


def lost_keys(blocks: Blocks, index: Index, extent: int) -> Keys:
    """Return the keys of the rows of a block that cannot be read. Searches the whole index."""
    lost = np.flatnonzero(blocks.lost(extent))
    if not len(lost):
        return np.empty(0, np.uint64)
    wanted = blocks.locations(extent, lost)
    return np.concatenate([keys[np.isin(at, wanted)] for keys, at in index.slices()])
