"""Registry of one shard's tables, by name and by number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

from psproto import names
from psserver.errors import BadRequest, TableLoading
from psserver.schemas import to_json
from psserver.tablesettings import TableSettings
from storage.arena import Budget
from storage.block import disk_bytes
from storage.blockfile import BlockFile
from storage.errors import UnknownTable
from storage.gpu.gpu import Gpu
from storage.schema import TableSchema
from storage.table import Table
from storage.tiers.lmdb import Blocks

MAX_DROPPED = 4096  # dropped tables whose schemas are kept


@dataclass(slots=True)
class TableEntry:
    """A table of a shard, with the properties that the log and checkpoints record."""

    table: Table
    number: int  # identifies it in the log
    created: int  # version of its creation
    text: str  # its schema as JSON
    counting: int = 0  # version of the last alteration that dropped admission counters; 0: none
    width: int = field(init=False)  # number of float32 numbers in a row; never changes

    def __post_init__(self) -> None:
        self.width = self.table.schema.width

    @property
    def schema(self) -> TableSchema:
        """Schema of the table."""
        return self.table.schema


class Tables:
    """The tables of one shard, by name and by number. Each new table gets a larger number.

    A hidden table is still being filled from a checkpoint: it has a number, but clients cannot use
    it.

    budget       memory that all tables share
    share        fraction of all keys that this shard owns, 0..1
    settings     settings of single tables, by name
    gpu          the GPU that all tables share; None: there is none
    claimed      names of tables that a load from a checkpoint is going to create or replace
    ruled        numbers of the tables with eviction rules
    next_number  number of the next new table
    file         the base's file, in which rows may stay that are not in use; None: there is none
    pressed      called when host memory is nearly full of rows that the next flush must write
    dropped      blocks of dropped tables, which other threads may still be reading
    suspects     (number of the table, number of the block) for each block of which damage was
                 noticed; None: the server stops
    """

    def __init__(
        self,
        budget: Budget,
        share: float,
        settings: Mapping[str, TableSettings],
        gpu: Gpu | None = None,
    ) -> None:
        self._budget = budget
        self._share = share
        self._settings = settings
        self.gpu = gpu
        self._by_name: dict[str, TableEntry] = {}
        self._by_number: dict[int, TableEntry] = {}
        self._hidden: dict[str, TableEntry] = {}
        self.claimed: set[str] = set()
        self._schemas: dict[int, TableSchema] = {}  # by number, also of tables dropped recently
        self.ruled: list[int] = []
        self.next_number = 1
        self.file: BlockFile | None = None
        self.pressed: Callable[[], None] = lambda: None
        self.dropped: list[Blocks] = []
        self.suspects: SimpleQueue[tuple[int, int] | None] = SimpleQueue()

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[TableEntry]:
        return iter(self._by_number.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk that the base takes, and those that the next flush adds.

        The base is the on-disk copy of all rows. A flush adds the rows that changed.
        Any thread may read.
        """
        stores = [entry.table.store for entry in list(self._by_number.values())]
        added = sum(store.dirty * disk_bytes(store.width) for store in stores)
        return added + (self.file.allocated if self.file is not None else 0)

    def names(self) -> list[str]:
        """Return the names of the tables that are not hidden, sorted."""
        return sorted(self._by_name)

    def find(self, name: str) -> TableEntry | None:
        """Return the table with this name, or None if there is none or it is hidden.

        May be called from any thread.
        """
        return self._by_name.get(name)

    def get(self, name: str) -> TableEntry:
        """Return the table with this name.

        Raises UnknownTable, TableLoading if it is hidden, BadRequest if the name is invalid.
        """
        entry = self._by_name.get(name)
        if entry is not None:
            return entry
        self.require_not_hidden(name)
        if problem := names.problem("table", name):
            raise BadRequest("INVALID_ARGUMENT", problem)
        raise UnknownTable(name)

    def require_not_hidden(self, name: str) -> None:
        """Raise TableLoading if the table with this name is hidden (being filled)."""
        if name in self._hidden:
            raise TableLoading(name)

    def require_unclaimed(self, name: str) -> None:
        """Raise TableLoading if a load from a checkpoint is filling, or going to fill, a table with
        this name.
        """
        self.require_not_hidden(name)
        if name in self.claimed:
            raise TableLoading(name)

    def numbered(self, number: int) -> TableEntry | None:
        """Return the table with this number, hidden or not; None if it was dropped."""
        return self._by_number.get(number)

    def require_number(self, number: int) -> TableEntry:
        """Return the table with this number, hidden or not; UnknownTable if it was dropped."""
        entry = self._by_number.get(number)
        if entry is None:
            schema = self._schemas.get(number)
            raise UnknownTable(schema.name if schema else str(number))
        return entry

    def schema_of(self, number: int) -> TableSchema | None:
        """Return the schema of the table with this number.

        Dropped tables have one too, but only the last MAX_DROPPED of them; None for older ones. May
        be called from any thread.
        """
        return self._schemas.get(number)

    def add(
        self, number: int, schema: TableSchema, created: int, *, hidden: bool = False
    ) -> TableEntry:
        """Create an empty table, and return its entry.

        number   number of the table
        created  version of its creation
        hidden   keep clients from using it until ``reveal`` is called
        """
        text = json.dumps(to_json(schema), sort_keys=True)
        entry = TableEntry(self._make(schema, number), number, created, text)
        self._by_number[number] = entry
        (self._hidden if hidden else self._by_name)[schema.name] = entry
        self._list_ruled(entry)
        self.next_number = max(self.next_number, number + 1)
        self._schemas[number] = schema
        if len(self._schemas) > len(self._by_number) + MAX_DROPPED:
            del self._schemas[next(each for each in self._schemas if each not in self._by_number)]
        return entry

    def _make(self, schema: TableSchema, number: int) -> Table:
        """Return an empty table, with a cold tier if there is a file for its blocks."""
        table, settings = Table(schema, self._budget, self._share), self._settings.get(schema.name)
        if self.gpu is not None:
            table.attach_gpu(self.gpu, settings.hbm_bytes if settings else None)
        if settings:
            table.store.configure(settings.host_bytes, settings.cache, settings.half_life)
        if self.file is not None:
            suspect = partial(self.suspect, number)
            shape = schema.dim, schema.width
            blocks = Blocks(*shape, self.file, self._budget, schema.name, suspect)
            table.attach(blocks, lambda: self.pressed())
        return table

    def alter(
        self, entry: TableEntry, schema: TableSchema, version: int, seconds: float
    ) -> int | None:
        """Change the settings of a table to those of ``schema``.

        version  version of the alteration
        seconds  time of the alteration, in seconds since 1970

        Returns the approximate number of admission counters that were dropped because the new
        admission rule cannot use them, or None if no counter was lost. Raises OutOfMemory; then
        nothing has changed.
        """
        dropped = entry.table.alter(schema, version, seconds)
        if dropped is not None:
            entry.counting = version
        entry.text = json.dumps(to_json(schema), sort_keys=True)
        self._schemas[entry.number] = schema
        self._list_ruled(entry)
        return dropped

    def _list_ruled(self, entry: TableEntry) -> None:
        """Add a table to ``ruled``, or remove it, depending on whether it has eviction rules."""
        if entry.schema.evictions and entry.number not in self.ruled:
            self.ruled.append(entry.number)
        elif not entry.schema.evictions and entry.number in self.ruled:
            self.ruled.remove(entry.number)

    def remove(self, entry: TableEntry) -> None:
        """Drop a table, hidden or not, and free its memory."""
        if entry.table.store.blocks is not None:
            self.dropped.append(entry.table.store.blocks)
        entry.table.close()
        del self._by_number[entry.number]
        for by_name in (self._by_name, self._hidden):
            if by_name.get(entry.schema.name) is entry:
                del by_name[entry.schema.name]
        if entry.number in self.ruled:
            self.ruled.remove(entry.number)

    def suspect(self, number: int, block: int) -> None:
        """Note that a block is damaged, so that it is examined soon. Any thread may call this.

        number  number of the table
        block   number of the block
        """
        self.suspects.put((number, block))

    def held(self) -> list[int]:
        """Return the numbers of blocks of dropped tables that other threads are reading now."""
        numbers = [each.held() for each in self.dropped]
        self.dropped = [each for each, held in zip(self.dropped, numbers, strict=True) if held]
        return [number for held in numbers for number in held]

    def reveal(self, entry: TableEntry) -> None:
        """Make a hidden table usable by clients."""
        self._by_name[entry.schema.name] = self._hidden.pop(entry.schema.name)
