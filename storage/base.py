"""The base: the on-disk copy of all rows at one log version, as blocks in LMDB.

A shard loads the base when it starts, then replays its log from that version on.

    base   = data.mdb lock.mdb spare         an LMDB environment with one database
    entry  = number u64, big-endian -> block     see block.py; numbers begin at 1
           | "state" -> state                    see basestate.py
           | "seal" -> transaction u64

A flush adds blocks in transactions of up to 32 MiB, then commits a state record that lists the live
blocks. Every other block is deleted: it was replaced, or its flush did not commit. Only pinned
blocks are kept for as long as they are pinned.

**Blocks in place.** A block is a value in overflow pages of its own, which LMDB never moves until
the block is deleted. So others can read it from the file, at the offset that ``offset`` returns.
LMDB would store a small value within a page of the tree, which moves. So zeros are added to a small
block until it needs a page of its own.

**Integrity.** LMDB has no checksums and trusts its pages. Damaged pages can make it fail, hang or
overwrite live blocks. So all pages that LMDB would follow are checked before it opens the file:
both meta pages, the tree and the lists of free pages (pages.py). The state record and the blocks
have checksums, which are verified at every read. LMDB has two meta pages, which refer to its two
newest transactions. If the newer one is damaged, LMDB may use the older one, and silently bring
back the previous state record. Therefore each commit is followed by a transaction without blocks,
the *seal*, after which both meta pages lead to the newest state record. If the process is killed
between commit and seal, the next ``open`` seals. Damage to unused bytes is not noticed. Damage to
the tree of an open base is noticed at the next ``open``.

**A full disk.** LMDB reports a full disk like a broken disk. So after a failed transaction, the
base tries to allocate as much space as the transaction may have needed. If that fails for lack of
space, DiskFull is raised, and nothing has changed. Blocks are only added while the file "spare"
takes some space, too. If a transaction that deletes blocks does not find enough space, this file is
emptied, so that a full disk can always be freed.

**Space on disk.** The length of the file never shrinks. But free pages are turned into holes, which
take no space on disk, except for some that the next transactions will use (holes.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import lmdb
import numpy as np

from storage.basestate import BaseState
from storage.block import BLOCK_BYTES, Block, Bytes, Data, header_of, unpack
from storage.disk import NO_SPACE, open_file, require_file
from storage.emptybase import DATA, begin_read, create
from storage.errors import Corrupt, DiskFull
from storage.holes import Spare, allocated, give_back, oldest_seen
from storage.pages import OVERFLOW, check, overflow_page

P = ParamSpec("P")
T = TypeVar("T")

LOCK, SPARE = "lock.mdb", "spare"
MAP_BYTES = 1 << 30  # smallest size of LMDB's memory map: address space, not memory
BATCH_BLOCKS = 16  # maximum number of blocks per transaction
BATCH_BYTES = 32 << 20  # maximum bytes of blocks per transaction of more than one block
SLACK = 1 << 20  # bytes that a transaction may need besides its values and the free list

_STATE, _SEAL = b"state", b"seal"
_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
)


class Base:
    """The base of one shard: the on-disk copy of its rows, in blocks, and one state record.

    state  the committed state record; None before the first commit
    pins   how often each block is pinned, by number; use ``pin`` and ``unpin``

    Only one thread may write (``add``, ``commit``, ``discard``). Any thread may call ``block`` and
    ``blocks`` meanwhile: they return copies, which stay valid.

    A read-only base is for tools, which may run while the shard runs. It shows the state at the
    time of ``open``. Until it is closed, the shard cannot reuse the pages of deleted blocks.
    """

    def __init__(
        self, directory: Path, *, readonly: bool = False, map_bytes: int = MAP_BYTES
    ) -> None:
        """Store the settings. ``open`` opens the file.

        map_bytes  initial size of LMDB's memory map (address space only); at least twice the size
                   of the file is taken. It doubles when a transaction might not fit
        """
        self.directory = directory
        self.state: BaseState | None = None
        self.pins: Counter[int] = Counter()
        self._pin_lock = threading.Lock()
        self._path = directory / DATA
        self._readonly = readonly
        self._map_bytes = map_bytes
        self._map_lock = threading.Lock()  # held while the memory map is read or resized
        self._env: Any = None
        self._file = -1
        self._snapshot: Any = None  # the read transaction of a read-only base
        self._numbers: set[int] = set()  # numbers of all stored blocks, live or not
        self._next = 1  # number for the next block
        self._write: Any = None  # the open write transaction, if any
        self._added: list[int] = []  # numbers of the blocks in the write transaction
        self._room = 0  # bytes of blocks for which the write transaction has room left
        self._failure: OSError | None = None
        self._page = 4096  # size of LMDB's pages in bytes
        self._spare = Spare(directory / SPARE, SLACK)
        self._wanted = 0  # bytes that the transaction may need on disk

    def open(self) -> Self:
        """Check the file, read the state record, and delete blocks that it does not list.

        Creates the file if it is missing, unless the base is read-only. Raises Corrupt or
        UnknownFormat, and OSError if the file cannot be opened. On a full disk an existing base
        still opens; creating one raises DiskFull.
        """
        require_file(self.directory / SPARE)
        if not self._readonly and not self._path.exists():
            try:
                create(self.directory, SLACK)
            except lmdb.Error as error:
                raise self._meaning(error) from error
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
                    self._shrink(self._seal)
                    self.discard()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Close the file. Blocks added since the last commit are lost."""
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
        """Error of the write or sync that failed. Every later write raises it. None: no failure."""
        return self._failure

    @property
    def bytes(self) -> int:
        """Bytes that the file takes on disk: blocks, the tree, and free pages that are no holes."""
        return allocated(self._file)

    @property
    def size(self) -> int:
        """Length of the file in bytes, with holes."""
        return os.fstat(self._file).st_size

    # ---- writing

    def add(self, block: Data) -> int:
        """Store a copy of a sealed block, and return its number.

        The block is kept only if the next ``commit`` lists it. After DiskFull, any block that was
        added since the last commit may be lost: call ``discard``, and add all of them again.
        """
        data = self._padded(np.frombuffer(block, np.uint8)).data
        if self._write is not None and (
            len(self._added) == BATCH_BLOCKS or self._taken(len(data)) > self._room
        ):
            self._finish()
        if self._write is None:
            self._spare.hold()
            self._room = max(BATCH_BYTES, self._taken(len(data)))
            self._begin(self._room)
        number = self._next
        self._try(self._write.put, _key(number), data)
        self._next += 1
        self._added.append(number)
        self._room -= self._taken(len(data))
        return number

    def commit(self, state: BaseState) -> None:
        """Atomically replace the state record, and delete all blocks that ``state`` does not list,
        except pinned ones.

        On return the new state record is synced to disk. Raises DiskFull, and keeps the old state
        record then. Raises ValueError if a listed block is not stored.
        """
        self._finish()
        live = set(state.blocks)
        if missing := live - self._numbers:
            raise ValueError(f"the state record lists block {min(missing)}, which is not stored")
        data = state.pack()
        self._begin(self._taken(len(data)))
        self._try(self._write.put, _STATE, data)
        self._delete(self._unused(state))
        self.state = state
        with suppress(DiskFull):  # the state record is committed already
            self._seal()
            self._give_back()

    def discard(self) -> None:
        """Delete the blocks that are neither listed by the committed state record nor pinned.

        Call it after a failed flush. The pages of the deleted blocks become free.
        """
        self._abort()
        unused = sorted(self._unused(self.state))
        for at in range(0, len(unused), BATCH_BLOCKS):
            self._shrink(partial(self._remove, set(unused[at : at + BATCH_BLOCKS])))
        self._give_back()

    def pin(self, numbers: Iterable[int]) -> None:
        """Keep committed blocks, even if a later state record does not list them, until ``unpin``.

        Any thread may call this. The caller makes sure that no commit deletes them meanwhile.
        """
        with self._pin_lock:
            self.pins.update(numbers)

    def unpin(self, numbers: Iterable[int]) -> None:
        """Undo one ``pin`` of each block. The next commit deletes those that are not listed."""
        with self._pin_lock:
            self.pins.subtract(numbers)
            self.pins = +self.pins  # drops zeros

    def _remove(self, numbers: set[int]) -> None:
        """Delete the blocks with these numbers in a transaction of its own."""
        self._begin(0)
        self._delete(numbers)
        self._seal()  # LMDB reuses free pages only one transaction later

    def _shrink(self, call: Callable[[], None]) -> None:
        """Call a function that frees space. If the disk is too full for it, use the spare space."""
        try:
            call()
        except DiskFull:
            self._give_back()
            self._spare.release()
            call()

    def _give_back(self) -> None:
        """Give disk space of free pages back to the file system."""
        assert self._write is None, "a transaction may use free pages"
        with suppress(OSError):  # then the space stays allocated, and the next commit tries again
            give_back(self._file, str(self._path), oldest_seen(self._env))

    def _unused(self, state: BaseState | None) -> set[int]:
        """Return the numbers of stored blocks that are neither listed by ``state`` nor pinned."""
        with self._pin_lock:
            return self._numbers - set(state.blocks if state else ()) - set(self.pins)

    def _padded(self, data: Bytes) -> Bytes:
        """Return a block, followed by zeros if it is too small for a page of its own."""
        if len(data) >= self._page // 2:
            return data
        padded = np.zeros(self._page - OVERFLOW.size, np.uint8)
        padded[: len(data)] = data
        return padded

    # ---- reading

    def offset(self, number: int) -> int | None:
        """Return the offset in the file of the first byte of a committed block.

        None: the block has no page of its own, because an older release stored it. It may move. All
        other blocks stay where they are until they are deleted. Any thread may call this. Raises
        Corrupt if the block is missing.
        """
        with self._map_lock:
            txn = self._snapshot or self._env.begin(buffers=True)
            value = txn.get(_key(number))
            if value is not None:
                address, size = np.frombuffer(value, np.uint8).ctypes.data, len(value)
                head = ctypes.string_at(address - OVERFLOW.size, OVERFLOW.size)
                page = overflow_page(head, size, self._page)
            if txn is not self._snapshot:
                txn.abort()
        if value is None:
            raise Corrupt(f"{self._path}: block {number}", "the block is missing")
        return None if page is None else page * self._page + OVERFLOW.size

    def block(self, number: int, buffer: Bytes | None = None) -> Block:
        """Return a copy of the block with this number. Any thread may call this.

        buffer  uint8[]  memory for the copy, if it is large enough; None: new memory

        Raises Corrupt if the block is damaged or missing.
        """
        return self._read(number, buffer)

    def raw(self, number: int) -> Bytes:
        """Return a copy of the bytes of a block, which may be damaged, and may end with zeros.

        Any thread may call this. Raises Corrupt if the block is missing.
        """
        return self._copy(number, None)

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Yield (number, block) for each live block, in the order of the state record's list.

        Any thread may call this. A block is valid only until the next one is requested, because all
        use the same memory. Each block is verified; raises Corrupt at the first damaged one.
        """
        buffer = np.empty(BLOCK_BYTES, np.uint8)
        for number in self.state.blocks if self.state else ():
            yield number, self._read(number, buffer)

    def _read(self, number: int, buffer: Bytes | None) -> Block:
        """Return a verified copy of a block; for ``buffer`` see ``_copy``."""
        data = self._copy(number, buffer)
        header = header_of(data)
        where = f"{self._path}: block {number}"
        return unpack(data if header is None else data[: header.size], where)

    def _copy(self, number: int, buffer: Bytes | None) -> Bytes:
        """Return a copy of the bytes of a block.

        buffer  memory for the copy; None or too small: new memory
        """
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
            raise Corrupt(f"{self._path}: block {number}", "the block is missing")
        return data

    # ---- opening

    def _open_map(self) -> None:
        size = self._map_bytes
        while size < 2 * self.size:
            size *= 2
        try:
            self._env = lmdb.open(
                str(self.directory), map_size=size, readonly=self._readonly, mode=0o644
            )
            self._env.reader_check()  # slots of readers that died
            if self._readonly:
                self._snapshot = begin_read(self._env)
        except lmdb.Error as error:
            raise self._meaning(error) from error

    def _find_state(self) -> None:
        """Read the state record into ``state``.

        Raises Corrupt or UnknownFormat if it cannot be read, or Corrupt if a block that it lists is
        missing.
        """
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
        """Commit a transaction that writes only the entry "seal", so that both of LMDB's meta pages
        lead to the newest state record.
        """
        self._begin(0)
        self._try(self._write.put, _SEAL, struct.pack("<Q", self._write.id()))
        self._finish()

    def _delete(self, numbers: set[int]) -> None:
        """Delete the blocks with these numbers, and commit the open transaction."""
        for number in numbers:
            self._try(self._write.delete, _key(number))
        self._finish()
        self._numbers -= numbers

    def _begin(self, size: int) -> None:
        """Begin a write transaction.

        size  bytes of values that it will write

        Raises the error of an earlier failed write or sync, if there was one.
        """
        if self._failure is not None:
            raise self._failure
        assert not self._readonly, "a read-only base was written to"
        self._reserve(size)
        self._write = self._try(self._env.begin, write=True)

    def _finish(self) -> None:
        """Commit and sync the open write transaction, if there is one."""
        if self._write is not None:
            self._try(self._write.commit)
            self._numbers.update(self._added)
            self._write, self._added = None, []

    def _abort(self) -> None:
        if self._write is not None:
            self._write.abort()
            self._write, self._added = None, []

    def _reserve(self, size: int) -> None:
        """Enlarge the memory map for a transaction that writes ``size`` bytes.

        Assumes that the transaction uses no free page and rewrites the whole list of free pages, 8
        bytes per page.
        """
        info = self._env.info()
        used = (info["last_pgno"] + 1) * self._page
        self._wanted = size + used // 512 + SLACK
        if info["map_size"] < used + self._wanted:
            with self._map_lock:
                self._try(self._env.set_mapsize, max(2 * info["map_size"], used + self._wanted))

    def _disk_is_full(self) -> bool:
        """Return whether the disk lacks the space that the last transaction may have needed."""
        try:
            os.posix_fallocate(self._file, self.size, self._wanted)
        except OSError as error:
            return error.errno in NO_SPACE
        return False

    def _taken(self, size: int) -> int:
        """Return the bytes of the whole pages that a value of ``size`` bytes takes in the file."""
        return -(-(size + 16) // self._page) * self._page

    def _try(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``call(*args, **kwargs)``, a call of LMDB.

        If it fails, aborts the transaction and raises DiskFull, Corrupt or OSError instead.
        """
        try:
            return call(*args, **kwargs)
        except lmdb.Error as error:
            self._abort()
            raise self._meaning(error) from error

    def _meaning(self, error: lmdb.Error) -> Exception:
        """Return DiskFull, Corrupt or OSError for an error of LMDB.

        An OSError is also stored as ``failure``, so that nothing is written any more.
        """
        if error.code in NO_SPACE or (error.code == errno.EIO and self._disk_is_full()):
            return DiskFull(str(self.directory), self._wanted)
        if isinstance(error, _DAMAGE):
            return Corrupt(str(self._path), str(error))
        # After a failed sync it is unknown what is on disk, so nothing may be written any more.
        self._failure = OSError(max(error.code, 0) or errno.EIO, str(error), str(self._path))
        return self._failure


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")
