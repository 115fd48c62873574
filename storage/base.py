"""The blocks that the rest of the log builds on: what a shard loads before it replays its log.

    base   = data.mdb lock.mdb               an LMDB environment with one database
    entry  = number u64, big-endian -> block     see block.py; numbers begin at 1
           | "state" -> state
           | "seal" -> transaction u64
    state  = magic[8] | format u32 | json u32 | blocks u64 | sessions u64 | checksum u64
             | JSON in UTF-8, padded with blanks to 8 bytes | numbers u64[blocks] | sessions
                                             little-endian; ``json`` and ``sessions`` are in bytes,
                                             the checksum is the xxh3_64 of all other bytes

A checkpoint adds blocks, in transactions of up to 32 MiB, and then commits a state that lists the
live ones. Blocks that the state does not list are left over, from a checkpoint that did not commit
or by one that replaced them, and are deleted.

What is protected. LMDB has no checksums, and trusts its pages: damaged ones make it fail, hang or
write over live blocks. So all pages that it would follow are checked before it opens the file: both
meta pages, the tree and the lists of free pages, each page reached once and where its parent says.
State and blocks have checksums, which are checked whenever they are read. A meta page damaged so
that LMDB prefers the older one would silently bring back the previous state; therefore each commit
is followed by a transaction that changes nothing, the *seal*, and both meta pages stand for the
newest state. (After a kill between the two, the next open seals.) Damage to bytes without meaning
goes unnoticed. So does, until it is opened again, damage to the tree of an open base.

A disk that runs full. LMDB reports a short write like a broken disk, so the file is allocated
before each transaction. If that is refused, the transaction may still fit into free pages; if it
fails then, that is DiskFull, and nothing has changed. The file never shrinks.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import lmdb
import numpy as np

from storage.basestate import BaseState
from storage.block import BLOCK_BYTES, Block, Bytes, Data, unpack
from storage.disk import NO_SPACE, open_file, require_file, sync
from storage.errors import Corrupt, DiskFull
from storage.pages import check

P = ParamSpec("P")
T = TypeVar("T")

DATA, LOCK = "data.mdb", "lock.mdb"
MAP_BYTES = 1 << 30  # smallest map; address space, not memory
BATCH_BLOCKS = 16  # blocks in a transaction, at most
BATCH_BYTES = 32 << 20  # bytes of blocks in a transaction of more than one, at most
SLACK = 1 << 20  # bytes that a transaction may need beside its values and the free list

_STATE, _SEAL = b"state", b"seal"
_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
)


class Base:
    """The base state of a shard and its blocks, in ``directory``.

    ``state`` is the committed one, None before the first commit.

    Writes (``add``, ``commit``, ``discard``) come from one thread. ``block`` and ``blocks`` may be
    called by any thread meanwhile: they copy a block out of the map, so a read transaction lasts
    as long as the copy, and what they return never points into the map.

    The map begins at ``map_bytes`` or twice the file, whichever is more, and doubles when a
    transaction might not fit. It is address space only.

    A read-only base is for tools, also beside a running shard: it stays at the state it found,
    and keeps the shard from reusing the pages of deleted blocks until it is closed.
    """

    def __init__(
        self, directory: Path, *, readonly: bool = False, map_bytes: int = MAP_BYTES
    ) -> None:
        self.directory = directory
        self.state: BaseState | None = None
        self._path = directory / DATA
        self._readonly = readonly
        self._map_bytes = map_bytes
        self._map_lock = threading.Lock()  # nobody reads while the map moves
        self._env: Any = None
        self._file = -1
        self._snapshot: Any = None  # the read transaction of a read-only base
        self._numbers: set[int] = set()  # of the blocks that are stored, listed or not
        self._next = 1  # number for the next block
        self._write: Any = None  # the write transaction that takes blocks, if there is one
        self._added: list[int] = []  # numbers of the blocks in it
        self._room = 0  # bytes that it may still take
        self._failure: OSError | None = None
        self._page = 4096  # bytes of a page of LMDB
        self._short = 0  # bytes that the disk lacked for the transaction, at worst

    def open(self) -> Self:
        """Check the file, find the state, delete what it does not list.

        Raises Corrupt or UnknownFormat, and OSError if the file cannot be opened. A disk that is
        full is no obstacle, unless the base is new (DiskFull).
        """
        if not self._readonly and not self._path.exists():
            self._create()
        pages = check(self._path, frozenset((_STATE, _SEAL)))
        self._page = pages.size
        self._numbers, self._next = pages.numbers, max(pages.numbers, default=0) + 1
        self._file = open_file(self._path, os.O_RDONLY if self._readonly else os.O_RDWR)
        require_file(self.directory / LOCK)
        try:
            self._open_map()
            self._find_state()
            if not self._readonly:
                with suppress(DiskFull):
                    self._seal()
                    self.discard()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Let go of the file. Blocks added since the last commit are lost."""
        self._abort()
        with self._map_lock:
            if self._snapshot is not None:
                self._snapshot.abort()
            if self._env is not None:
                self._env.close()
            if self._file >= 0:
                os.close(self._file)
            self._snapshot, self._env, self._file = None, None, -1

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def failure(self) -> OSError | None:
        """The write or sync that failed, after which nothing is written any more."""
        return self._failure

    @property
    def bytes(self) -> int:
        """Size of the file: live blocks, free pages and what is allocated ahead."""
        return os.fstat(self._file).st_size

    # ---- writing

    def add(self, block: Data) -> int:
        """Store a sealed block, which is copied, and return its number.

        It is on disk after the commit that lists it, and gone if there is none. DiskFull loses
        also some of the blocks added before: begin the checkpoint anew, after ``discard``.
        """
        data = np.frombuffer(block, np.uint8).data
        if self._write is not None and (
            len(self._added) == BATCH_BLOCKS or self._taken(len(data)) > self._room
        ):
            self._finish()
        if self._write is None:
            self._room = max(BATCH_BYTES, self._taken(len(data)))
            self._begin(self._room)
        number = self._next
        self._try(self._write.put, _key(number), data)
        self._next += 1
        self._added.append(number)
        self._room -= self._taken(len(data))
        return number

    def commit(self, state: BaseState) -> None:
        """Make ``state`` the committed one, durably, and delete all blocks that it does not list.

        DiskFull leaves the state as it was. ValueError if it lists a block that is not stored.
        """
        self._finish()
        live = set(state.blocks)
        if missing := live - self._numbers:
            raise ValueError(f"the state lists block {min(missing)}, which is not stored")
        data = state.pack()
        self._begin(self._taken(len(data)))
        self._try(self._write.put, _STATE, data)
        self._delete(self._numbers - live)
        self.state = state
        with suppress(DiskFull):  # it is committed all the same
            self._seal()

    def discard(self) -> None:
        """Delete the blocks that the committed state does not list, as after a failed checkpoint.

        Their pages are used again.
        """
        self._abort()
        unlisted = self._numbers - set(self.state.blocks if self.state else ())
        if unlisted:
            self._begin(0)
            self._delete(unlisted)
            self._seal()  # LMDB uses pages again one transaction later

    # ---- reading

    def block(self, number: int) -> Block:
        """A listed block, in memory of its own; Corrupt names it if it is damaged. Any thread."""
        return self._read(number, None)

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """The listed blocks with their numbers, in the order of the list, each checked.

        A block is valid until the next one is asked for: all use the same memory. Corrupt names
        the first damaged one. Any thread.
        """
        buffer = np.empty(BLOCK_BYTES, np.uint8)
        for number in self.state.blocks if self.state else ():
            yield number, self._read(number, buffer)

    def _read(self, number: int, buffer: Bytes | None) -> Block:
        where = f"{self._path}: block {number}"
        with self._map_lock:
            txn = self._snapshot or self._env.begin(buffers=True)
            value = txn.get(_key(number))
            if value is not None:
                if buffer is None or len(buffer) < len(value):
                    buffer = np.empty(len(value), np.uint8)
                data = buffer[: len(value)]
                data[:] = np.frombuffer(value, np.uint8)
            if txn is not self._snapshot:
                txn.abort()
        if value is None:
            raise Corrupt(where, "the block is missing")
        return unpack(data, where)

    # ---- opening

    def _create(self) -> None:
        """Make an empty base beside its place and move it there: it is whole, or not there."""
        fresh = self.directory / "new"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            lmdb.open(str(fresh), map_size=MAP_BYTES, mode=0o644).close()
            sync(fresh / DATA)
            os.replace(fresh / DATA, self._path)
            sync(self.directory)
            sync(self.directory.parent)
            shutil.rmtree(fresh)
        except lmdb.Error as error:
            raise self._meaning(error) from error
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFull(str(self.directory), SLACK) from error
            raise

    def _open_map(self) -> None:
        size = self._map_bytes
        while size < 2 * self.bytes:
            size *= 2
        try:
            self._env = lmdb.open(
                str(self.directory), map_size=size, readonly=self._readonly, mode=0o644
            )
            self._env.reader_check()  # slots of readers that died
            if self._readonly:
                self._snapshot = self._take_snapshot()
        except lmdb.Error as error:
            raise self._meaning(error) from error

    def _take_snapshot(self) -> Any:
        """The newest state; the shard may have grown the file since it was opened."""
        while True:
            try:
                return self._env.begin(buffers=True)
            except lmdb.MapResizedError:
                self._env.set_mapsize(0)

    def _find_state(self) -> None:
        where = f"{self._path}: state"
        txn = self._snapshot or self._env.begin(buffers=True)
        value = txn.get(_STATE)
        data = None if value is None else bytes(value)
        if txn is not self._snapshot:
            txn.abort()
        if data is None:
            return
        state = BaseState.unpack(data, where)
        if not self._readonly and (missing := set(state.blocks) - self._numbers):
            raise Corrupt(f"{self._path}: block {min(missing)}", "the block is missing")
        self.state = state

    # ---- transactions

    def _seal(self) -> None:
        """Commit a transaction that changes nothing: see the top of the file."""
        self._begin(0)
        self._try(self._write.put, _SEAL, struct.pack("<Q", self._write.id()))
        self._finish()

    def _delete(self, numbers: set[int]) -> None:
        """Delete blocks and finish the transaction."""
        for number in numbers:
            self._try(self._write.delete, _key(number))
        self._finish()
        self._numbers -= numbers

    def _begin(self, size: int) -> None:
        """Begin a write transaction with room for ``size`` bytes of values; DiskFull otherwise."""
        if self._failure is not None:
            raise self._failure
        assert not self._readonly, "a read-only base was written to"
        self._reserve(size)
        self._write = self._try(self._env.begin, write=True)

    def _finish(self) -> None:
        """Commit the write transaction, if there is one; LMDB has synced it then."""
        if self._write is not None:
            self._try(self._write.commit)
            self._numbers.update(self._added)
            self._write, self._added = None, []

    def _abort(self) -> None:
        if self._write is not None:
            self._write.abort()
            self._write, self._added = None, []

    def _reserve(self, size: int) -> None:
        """Make map and file large enough for a transaction, even if no free page can be used.

        The list of free pages takes 8 bytes a page, and the whole of it may be written anew. If
        the disk has no room, the transaction may still fit into free pages, so LMDB tries.
        """
        info = self._env.info()
        used = (info["last_pgno"] + 1) * self._page
        end = used + size + used // 512 + SLACK
        held, self._short = self.bytes, 0
        if held < end:
            try:
                os.posix_fallocate(self._file, held, end - held)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                self._short = end - held
        if info["map_size"] < end:
            with self._map_lock:
                self._try(self._env.set_mapsize, max(2 * info["map_size"], end))

    def _taken(self, size: int) -> int:
        """Bytes that a value of ``size`` bytes takes: whole pages, with a header of 16 bytes."""
        return -(-(size + 16) // self._page) * self._page

    def _try(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call LMDB; on failure give up the transaction and say it in our words."""
        try:
            return call(*args, **kwargs)
        except lmdb.Error as error:
            self._abort()
            raise self._meaning(error) from error

    def _meaning(self, error: lmdb.Error) -> Exception:
        if error.code in NO_SPACE or (self._short and error.code == errno.EIO):
            return DiskFull(str(self.directory), self._short or SLACK)
        if isinstance(error, _DAMAGE):
            return Corrupt(str(self._path), str(error))
        # A failed sync among them. What is on disk is unknown, so nothing is written again.
        self._failure = OSError(max(error.code, 0) or errno.EIO, str(error), str(self._path))
        return self._failure


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")
