"""Write tombstones (records of deletes) and admission counters to the base, as part of a flush.

The base is the on-disk copy of all rows at one version of the log. A flush adds those tombstones
and counters that are newer than the last flush, as one *layer*. Many small layers would be many
small blocks. So if a small layer has no more entries than all newer layers together, a flush
replaces it and the newer ones by one layer: it writes everything that is newer than the layer
before. Thus the number of small layers grows with the logarithm of the number of flushes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from psserver.capture import Capture
from psserver.engine import Runner
from psserver.packing import cells_of, counters_of, tombstone_blocks
from storage.base import Base
from storage.basestate import BaseState
from storage.block import Bytes, pack_cells, pack_counters, tombstones_per_block

STALE = 2  # everything is written again if more than STALE times too many entries are kept


@dataclass(slots=True)
class Layer:
    """Blocks of the base with the tombstones and counters that changed in a range of versions."""

    after: int  # the range begins after this version, and ends where the next layer begins
    blocks: list[int] = field(default_factory=list)  # their numbers, in the order of writing
    entries: int = 0  # number of tombstones and counters in them


class CounterWriter:
    """Writes the tombstones and the exact admission counters of flushes.

    layers  what the base has, oldest first. The caller replaces it after each commit
    """

    def __init__(
        self, base: Base, layers: list[Layer], buffer: Bytes, check: Callable[[], None]
    ) -> None:
        """Store the parameters.

        buffer  uint8[BLOCK_BYTES], memory for one block
        check   called before each block; may raise to give the flush up
        """
        self.layers = layers
        self._base, self._buffer, self._check = base, buffer, check

    def write(self, captured: Capture, state: BaseState | None, engine: Runner) -> list[Layer]:
        """Write tombstones and counters. Returns the layers that the base has after the flush.

        captured  the shard at the version of the flush
        state     the base as last committed; None: it is empty
        engine    runs calls on the shard
        """
        kept = self._kept(captured, state)
        after = 0
        if kept and state is not None:
            replaced = self.layers[len(kept) :]
            after = replaced[0].after if replaced else state.version
        new = Layer(after)
        for block in tombstone_blocks(captured, after, self._buffer):
            self._check()
            new.blocks.append(self._base.add(block.seal()))
            new.entries += len(block)
        for table, keys, totals, versions in counters_of(captured, after, engine):
            self._check()
            new.blocks.append(self._base.add(pack_counters(table, keys, versions, totals)))
            new.entries += len(keys)
        return [*kept, new] if new.blocks else kept

    def _kept(self, captured: Capture, state: BaseState | None) -> list[Layer]:
        """Return the oldest layers, which stay as they are; the flush replaces all others.

        None stays if too many entries are outdated, or if tombstones were discarded that are not in
        the base: a delete that the base does not know could make an old counter appear again. For
        the same reason, a layer is not replaced if some of its tombstones may have been discarded,
        unless there is no older layer.
        """
        needed = sum(each.counters for each in captured.tables) + sum(map(len, captured.tombstones))
        stored = sum(layer.entries for layer in self.layers)
        if state is None or stored > STALE * needed or captured.horizon > state.version:
            return []
        first, newer = len(self.layers), 0
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            if layer.entries > tombstones_per_block() or (i and layer.after < captured.horizon):
                break
            if layer.entries <= newer:
                first = i
            newer += layer.entries
        return self.layers[:first]


@dataclass(frozen=True, slots=True)
class Sketch:
    """The admission sketch (a counting Bloom filter) of one table, as stored in the base."""

    edits: int  # Gate.edits when the sketch was written: the number of its changes until then
    blocks: tuple[int, ...]  # numbers of the blocks that contain it; empty: it must be written


class SketchWriter:
    """Writes the admission sketches (counting Bloom filters) of flushes.

    stored  what the base has, by number of the table. The caller replaces it after each commit
    """

    def __init__(self, base: Base, check: Callable[[], None]) -> None:
        """Store the parameters.

        check  called before each block; may raise to give the flush up
        """
        self.stored: dict[int, Sketch] = {}
        self._base, self._check = base, check

    def write(self, captured: Capture, state: BaseState | None) -> dict[int, Sketch]:
        """Write the sketches that changed since they were last written.

        captured  the shard at the version of the flush
        state     the base as last committed; None: it is empty

        Returns table number -> sketch for all tables, changed or not.
        """
        sketches = self._kept(captured, state)
        written: dict[int, list[int]] = {}
        unchanged = {table for table, sketch in sketches.items() if sketch.blocks}
        for table, start, cells in cells_of(captured, unchanged):
            self._check()
            block = self._base.add(pack_cells(table, start, cells))
            written.setdefault(table, []).append(block)
        for table, blocks in written.items():
            sketches[table] = Sketch(sketches[table].edits, tuple(blocks))
        return sketches

    def _kept(self, captured: Capture, state: BaseState | None) -> dict[int, Sketch]:
        """Return table number -> sketch, without blocks if the sketch must be written again."""
        listed = set(state.blocks) if state is not None else set()
        kept: dict[int, Sketch] = {}
        for each in captured.tables:
            old = self.stored.get(each.number, Sketch(-1, ()))
            same = old.edits == each.edits and listed.issuperset(old.blocks)
            kept[each.number] = Sketch(each.edits, old.blocks if same else ())
        return kept
