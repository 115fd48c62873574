"""Check the pages of an LMDB file before LMDB opens it.

LMDB has no checksums, and crashes on damaged pages. Layout of the file:

    page      = number u64 | pad u16 | flags u16 | lower u16 | upper u16       lower, upper: bounds
                | offsets u16[(lower - 16) / 2] | unused | nodes               of the unused bytes
    meta      = page | magic u32 | version u32 | address u64 | map size u64
                | database of free pages | main database | last page u64 | transaction u64
    database  = pad u32 | flags u16 | depth u16 | branches u64 | leaves u64 | overflow pages u64
                | entries u64 | root u64                         pad of the first is the page size
    node      = low u16 | high u16 | flags u16 | key size u16 | key | value
                in a branch: child page = low | high << 16 | flags << 32, no value
                in a leaf: size of the value = low | high << 16; the value itself, or (flags 1)
                the number u64 of the first of its overflow pages
    overflow  = number u64 | pad u16 | flags u16 | pages u32 | value
    free      = transaction u64 -> count u64 | pages u64[count], descending | unused

This is version 1 of the format, which all LMDB 0.9 use, on 64-bit little-endian machines.

All pages that LMDB would follow are checked: both meta pages, the tree, and the list of free pages.
Each page of the tree must contain its own number, and no page may be used twice.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.disk import open_file
from storage.errors import Corrupt

_META = struct.Struct("<Q2xH4xIIQQ")  # number flags magic version address map
_DATABASE = struct.Struct("<IHHQQQQQ")
_TAIL = struct.Struct("<QQ")  # last page, transaction
_PAGE = struct.Struct("<Q2xHHH")
OVERFLOW = struct.Struct("<Q2xHI")
_NODE = struct.Struct("<HHHH")
_BRANCH, _LEAF, _BIG, _META_FLAG, _INTEGER_KEY = 1, 2, 4, 8, 8
_NONE = 2**64 - 1  # root of an empty database
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_UNSEEN = 1 << 20  # maximum number of free pages after the end of the file
_Key = bytes | int | None  # a bound of keys; None: no bound


class _Database(NamedTuple):
    """The description of one of the two databases in a meta page."""

    pad: int  # in the database of free pages: the page size
    flags: int
    depth: int  # levels of the tree
    branches: int  # number of branch pages
    leaves: int  # number of leaf pages
    overflow: int  # number of overflow pages
    entries: int
    root: int  # number of the root page


class _Meta(NamedTuple):
    """The contents of a meta page."""

    free: _Database  # lists of free pages
    main: _Database  # the entries
    last: int  # number of the last page in use
    transaction: int  # number of the transaction that wrote this meta page


class FreeList(NamedTuple):
    """Pages that one transaction freed, and that are still free."""

    transaction: int
    pages: NDArray[np.int64]  # [n]  their numbers, ascending


def check(path: Path, known: frozenset[bytes]) -> Pages:
    """Check all pages of an LMDB file that LMDB would follow. Raises Corrupt.

    known  keys that the file may contain besides numbers of blocks (u64, big-endian)

    If a running shard changes the file during the check, the meta pages differ afterwards. The
    check is then repeated, up to 20 times. Raises OSError if the file changed each time.
    """
    file = open_file(path, os.O_RDONLY)
    try:
        for _ in range(20):
            before = os.pread(file, 1 << 17, 0)
            try:
                return Pages(file, str(path), known)
            except Corrupt:
                if os.pread(file, 1 << 17, 0) == before:
                    raise
        raise OSError(
            errno.EAGAIN,
            "the file changed during each of 20 checks: stop the shard, or try again",
            str(path),
        )
    finally:
        os.close(file)


def overflow_page(head: bytes, size: int, page: int) -> int | None:
    """Return the number of the first overflow page of a value; None if it is in a leaf.

    head  the 16 bytes in front of the value
    size  of the value
    page  bytes per page
    """
    number, flags, count = OVERFLOW.unpack(head)
    there = flags == _BIG and count == (OVERFLOW.size + size - 1) // page + 1
    return number if there else None


class Pages:
    """The pages of an LMDB file. The constructor checks them and raises Corrupt for damage.

    size     bytes per page
    numbers  numbers of the blocks in the file
    """

    def __init__(self, file: int, path: str, known: frozenset[bytes]) -> None:
        """Check all pages.

        file   descriptor of the open file
        path   its name, for errors
        known  keys that the file may contain besides numbers of blocks
        """
        meta = self._begin(file, path)
        self.numbers: set[int] = set()
        for key, page, _ in self._entries(meta.main, free=False):
            if len(key) == 8:
                self.numbers.add(int.from_bytes(key, "big"))
            elif key not in known:
                raise self._damage(page, f"unexpected entry {key!r}")
        for _ in self._free_lists(meta):
            pass

    def _begin(self, file: int, path: str) -> _Meta:
        """Check the meta pages, and return the newer one. For the parameters see the constructor.

        Sets the attributes that the other methods need.
        """
        self._file = file
        self._path = path
        self._length = os.fstat(file).st_size
        meta = self._newest_meta()
        self._last = meta.last
        if not 1 <= meta.last < self._length // self.size + _UNSEEN:
            raise self._damage(None, f"invalid last page {meta.last} in the meta page")
        self._used = np.zeros(meta.last + 1, np.bool_)
        self._used[:2] = True
        self._counts = [0, 0, 0, 0]  # branches, leaves, overflow pages, entries
        if meta.main.flags != 0 or meta.free.flags != _INTEGER_KEY:
            raise self._damage(None, "invalid flags of a database in the meta page")
        return meta

    def _free_lists(self, meta: _Meta) -> Iterator[FreeList]:
        """Check and yield the lists of free pages, oldest first."""
        for key, page, value in self._entries(meta.free, free=True):
            yield self._check_free(page, _integer(key), value, meta.transaction)

    def _damage(self, page: int | None, what: str) -> Corrupt:
        """Return Corrupt for damage to page number ``page``, or to the file as a whole (None).

        what  description of the damage
        """
        return Corrupt(self._path if page is None else f"{self._path}: page {page}", what)

    def _newest_meta(self) -> _Meta:
        """Check both meta pages, and return the one that LMDB uses."""
        self.size = 4096
        first = self._meta(0)
        size = first.free.pad
        if size not in (1 << power for power in range(9, 17)):
            raise self._damage(0, f"invalid page size {size}")
        self.size = size
        second = self._meta(1)
        if second.free.pad != size:
            raise self._damage(1, f"page size {second.free.pad}, but {size} in page 0")
        even, odd = first.transaction, second.transaction
        if even % 2 or (odd % 2 == 0 and (even or odd)) or abs(even - odd) > 1:
            raise self._damage(
                None, f"invalid transaction numbers {even} and {odd} of the meta pages"
            )
        return second if even < odd else first

    def _meta(self, page: int) -> _Meta:
        """Return the contents of meta page 0 or 1. Raises Corrupt if it is not a meta page."""
        data = self._bytes(page, 1)
        number, flags, magic, version, _, _ = _META.unpack_from(data)
        if (number, flags, magic, version) != (page, _META_FLAG, _MAGIC, _VERSION):
            raise self._damage(page, "this is not a meta page of LMDB 0.9")
        free, main = (
            _Database(*_DATABASE.unpack_from(data, _META.size + i * _DATABASE.size)) for i in (0, 1)
        )
        return _Meta(free, main, *_TAIL.unpack_from(data, _META.size + 2 * _DATABASE.size))

    def _bytes(self, page: int, count: int) -> bytes:
        """Read ``count`` pages from number ``page`` on. Raises Corrupt if the file is too short."""
        data = os.pread(self._file, count * self.size, page * self.size)
        if len(data) < count * self.size:
            raise self._damage(page, "the file ends before the end of the page")
        return data

    def _take(self, parent: int | None, page: int, count: int) -> None:
        """Mark ``count`` pages from number ``page`` on as used.

        parent  page that refers to them, for errors; None: the meta page

        Raises Corrupt if one of them is used already, or not in the file.
        """
        end = page + count
        if page < 2 or end > self._last + 1 or end * self.size > self._length:
            raise self._damage(parent, f"refers to pages {page}..{end - 1}, which do not exist")
        if self._used[page:end].any():
            raise self._damage(
                parent, f"refers to pages {page}..{end - 1}, which are used elsewhere"
            )
        self._used[page:end] = True

    def _entries(self, database: _Database, free: bool) -> Iterator[tuple[bytes, int, bytes]]:
        """Yield (key, number of its page, value) of each entry of a database, and check the pages.

        free  True for the database of the lists of free pages. Only then are values in overflow
              pages read; otherwise b"" is returned for them
        """
        self._counts = [0, 0, 0, 0]
        if database.root != _NONE:
            self._take(None, database.root, 1)
            yield from self._walk(database.root, database.depth, free, None, None)
        said = [database.branches, database.leaves, database.overflow, database.entries]
        if self._counts != said or (database.root == _NONE and database.depth):
            raise self._damage(
                None,
                "expected branches, leaves, overflow pages and entries"
                f" {said} in a database, found {self._counts}",
            )

    def _walk(
        self, page: int, depth: int, free: bool, low: _Key, high: _Key
    ) -> Iterator[tuple[bytes, int, bytes]]:
        """Yield the entries (key, page, value) in the tree whose root is ``page``, and check it.

        depth      levels of this tree; 1: the page is a leaf
        free       True for the database of the lists of free pages; see ``_entries``
        low, high  the keys must ascend, with low <= key < high; None: no bound
        """
        data = self._bytes(page, 1)
        number, flags, lower, upper = _PAGE.unpack_from(data)
        if number != page or flags != (_LEAF if depth == 1 else _BRANCH):
            raise self._damage(page, "wrong page number or type of page")
        if lower % 2 or not _PAGE.size <= lower <= upper <= self.size:
            raise self._damage(page, f"invalid bounds {lower}..{upper} of the unused bytes")
        offsets = struct.unpack_from(f"<{(lower - _PAGE.size) // 2}H", data, _PAGE.size)
        nodes = [self._node(page, data, offset, upper) for offset in offsets]
        bounds = self._bounds(page, [key for _, key, _ in nodes], depth, free, low, high)
        self._counts[0 if depth > 1 else 1] += 1
        for i, (head, key, place) in enumerate(nodes):
            if depth > 1:
                child = head[0] | head[1] << 16 | head[2] << 32
                self._take(page, child, 1)
                yield from self._walk(child, depth - 1, free, bounds[i], bounds[i + 1])
            else:
                self._counts[3] += 1
                yield key, page, self._value(page, data, head, place, free)

    def _node(
        self, page: int, data: bytes, offset: int, upper: int
    ) -> tuple[tuple[int, ...], bytes, int]:
        """Return (header fields, key, offset after the key) of a node.

        page    number of the page, for errors
        data    contents of the page
        offset  start of the node in the page
        upper   smallest valid offset of a node
        """
        if not upper <= offset <= self.size - _NODE.size:
            raise self._damage(page, f"invalid offset {offset} of a node")
        head = _NODE.unpack_from(data, offset)
        end = offset + _NODE.size + head[3]
        if end > self.size:
            raise self._damage(
                page, f"the key at {offset} declares {head[3]} bytes, more than the page has left"
            )
        return head, data[offset + _NODE.size : end], end

    def _bounds(
        self, page: int, keys: list[bytes], depth: int, free: bool, low: _Key, high: _Key
    ) -> list[_Key]:
        """Check that a page's keys ascend within ``low`` and ``high``.

        For the parameters see ``_walk``. Returns n + 1 bounds for the n children of a branch: child
        i has keys from bound i to below bound i + 1. Returns [] for a leaf. The first key of a
        branch has no meaning. If ``free``, keys are ordered as little-endian numbers.
        """
        if free and any(len(key) != 8 for key in keys[depth > 1 :]):
            raise self._damage(page, "the key of a list of free pages must have 8 bytes")
        order: Callable[[bytes], Any] = _integer if free else bytes
        known: list[Any] = [order(key) for key in keys[depth > 1 :]]
        rising = all(a < b for a, b in pairwise(known))
        if not rising or (
            known
            and ((low is not None and known[0] < low) or (high is not None and known[-1] >= high))
        ):
            raise self._damage(page, "the keys are out of order")
        return [low, *known, high] if depth > 1 else []

    def _value(
        self, page: int, data: bytes, head: tuple[int, ...], place: int, free: bool
    ) -> bytes:
        """Return the value of a node in a leaf, and check its overflow pages.

        page   number of the page, for errors
        data   contents of the page
        head   header fields of the node
        place  offset after the node's key
        free   read a value in overflow pages; otherwise it is returned as b""
        """
        size = head[0] | head[1] << 16
        if head[2] not in (0, 1) or place + (8 if head[2] else size) > self.size:
            raise self._damage(page, f"a value declares {size} bytes, more than the page has left")
        if not head[2]:
            return data[place : place + size]
        first = int.from_bytes(data[place : place + 8], "little")
        count = (OVERFLOW.size + size - 1) // self.size + 1
        self._take(page, first, count)
        self._counts[2] += count
        length = OVERFLOW.size + (size if free else 0)
        value = os.pread(self._file, length, first * self.size)
        if OVERFLOW.unpack_from(value) != (first, _BIG, count):
            raise self._damage(first, "wrong page number, type or count of overflow pages")
        return value[OVERFLOW.size :]

    def _check_free(self, page: int, transaction: int, value: bytes, newest: int) -> FreeList:
        """Check a list of free pages, and mark its pages, so that nothing else may refer to them.

        Returns the list.

        page         number of the page that contains the list, for errors
        transaction  number of the transaction that freed the pages
        value        the encoded list
        newest       number of the newest transaction

        Raises Corrupt if the list has a wrong length, its numbers do not descend, a page in it is
        marked already or does not exist, or ``transaction`` is newer than ``newest``.
        """
        numbers = np.frombuffer(value, "<u8", len(value) // 8)
        if len(value) % 8 or not len(numbers) or numbers[0] >= len(numbers):
            raise self._damage(page, f"invalid length {len(value)} of a list of free pages")
        pages = numbers[1 : 1 + int(numbers[0])]
        falling = bool((pages[:-1] > pages[1:]).all())
        if transaction > newest or not falling or (len(pages) and pages[0] > self._last):
            raise self._damage(page, f"invalid list of pages freed by transaction {transaction}")
        if self._used[pages].any():
            raise self._damage(page, f"pages freed by transaction {transaction} are in use")
        self._used[pages] = True
        return FreeList(transaction, pages[::-1].astype(np.int64))


class FreePages(Pages):
    """The free pages of an LMDB file, as of its newest transaction. Only they are checked.

    size   bytes per page
    last   number of the last page in use
    older  the older one of the two transactions to which the meta pages lead
    lists  the lists of free pages, in the order in which LMDB uses them
    """

    def __init__(self, file: int, path: str) -> None:
        """Read the lists of free pages. Raises Corrupt if they are damaged.

        file  descriptor of the file, to which nobody writes meanwhile
        path  its name, for errors
        """
        meta = self._begin(file, path)
        self.last, self.older = meta.last, meta.transaction - 1
        self.lists = list(self._free_lists(meta))


def _integer(key: bytes) -> int:
    return int.from_bytes(key, "little")
