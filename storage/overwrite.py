"""Overwrite whole rows, wherever they are, without reading them.

So even a row whose block on disk is damaged can be overwritten.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage.index import Locations, locations_of, places
from storage.kernels import Images, Keys, Slots
from storage.rowstore import RowStore
from storage.slots import VERSION


def overwrite(store: RowStore, images: Images, locations: Locations) -> Images:
    """Write whole rows, except those of which ``store`` has a newer version.

    images     the rows; their keys are distinct
    locations  uint64[n]  of the present rows, 0 for keys without a row; overwritten

    Returns the rows without those that are older than a row on disk. Raises OutOfMemory, and
    changes nothing then.
    """
    cold = store.cold(locations)
    if len(cold):
        assert store.blocks is not None
        found, _ = places(locations[cold], store.blocks.code)
        newer = store.blocks.newer(found, images.versions[cold])
        if newer.any():
            kept = np.delete(np.arange(len(locations)), cold[newer])
            images = Images._make(column[kept] for column in images)
            locations, cold = locations[kept], store.cold(locations[kept])
    slots = store.slots_for(len(cold))
    missing = np.flatnonzero(locations == 0)
    try:
        made = store.place(images.keys[missing]) if len(missing) else missing
    except BaseException:
        store.host.release(slots)
        raise
    if len(missing):
        locations[missing] = made
    if len(cold):
        _displace(store, images, locations, cold, slots)
    store.put(locations, images)
    return images


def _displace(
    store: RowStore, images: Images, locations: Locations, cold: Slots, slots: Slots
) -> None:
    """Give rows that are on disk only a slot in host memory, with undefined contents.

    locations  uint64[n]  updated
    cold       int64[m]   indices of the rows
    slots      int64[m]   slots for them
    """
    assert store.blocks is not None
    found, _ = places(locations[cold], store.blocks.code)
    store.host.slots.create(images.keys[cold], slots)
    made = locations_of(slots, store.host.code)
    store.watch.moved(locations[cold], made)
    store.index.assign(images.keys[cold], made)
    store.blocks.forget(found)
    locations[cold] = made


def place_newest(store: RowStore, extent: int, keys: Keys, versions: NDArray[np.uint64]) -> None:
    """Make the rows of a block on disk current, except those of which there is a newer row.

    extent    the block; none of its rows is live yet
    keys      uint64[n]  keys of all its rows, distinct
    versions  uint64[n]  versions of all its rows
    """
    blocks = store.blocks
    assert blocks is not None
    locations, _ = store.find(keys)
    there = np.flatnonzero(locations)
    newer = store.meta(locations[there])[:, VERSION] > versions[there]
    replaced = there[~newer]
    store.remove(keys[replaced], locations[replaced])
    positions = np.delete(np.arange(len(keys)), there[newer])
    store.place_cold(keys[positions], blocks.locations(extent, positions))
    blocks.revive(extent, positions, cached=False)
