"""The state record of the base: which of its blocks are live, and which tables they contain.

The base is the on-disk copy of all rows at one log version. It consists of blocks. A live block is
one that the newest state record lists.

    state  = magic[8] | format u32 | json u32 | blocks u64 | sessions u64 | checksum u64
             | JSON in UTF-8, padded with blanks to 8 bytes | numbers u64[blocks] | sessions

Little-endian; ``json`` and ``sessions`` are in bytes, the checksum is the xxh3_64 of all other
bytes. ``sessions`` is the record of the pushes already applied, by client.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from storage.errors import Corrupt, UnknownFormat
from storage.history import History

FORMAT = 3
READABLE = (1, 2, FORMAT)  # 1: one epoch, and at first no `logged`; 2: no directory
MAGIC = b"PSBASE\n\0"

_HEAD = struct.Struct("<8sIIQQQ")  # magic format json blocks sessions checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTable:
    """A table as recorded in the base (the on-disk copy of all rows at one log version)."""

    number: int  # given at creation, never reused
    schema: str  # JSON
    created: int  # version of the log at which the table was created
    policy: bytes = b""  # state of the table's Evictor, from Evictor.pack
    counting: int = 0  # admission counters of versions up to this one are no longer valid


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseState:
    """The state record of the base, which describes the shard at one version of its log."""

    lineage: bytes  # [16]  random id of the log
    history: History  # epochs of the log
    version: int  # the blocks contain every change up to this version; replay starts after it
    next_table: int  # number for the next new table
    tables: tuple[BaseTable, ...] = ()
    horizon: int = 0  # tombstones of deletes up to this version may be missing
    sessions: bytes = b""  # record of the pushes already applied, by client, as the shard packs it
    blocks: tuple[int, ...] = ()  # numbers of the live blocks, in the order they were added
    cells: int = 0  # number of blocks at the end of ``blocks`` that contain sketches
    logged: bool = False  # True: a log was created, so a missing log is damage
    directory: int = 0  # number of blocks of kind DIRECTORY in ``blocks``, just before the sketches
    distinct: bool = False  # True: the directory lists each key's newest row as the only live one

    def pack(self) -> bytes:
        """Return the state record as bytes, in the format that the module docstring gives."""
        tables = [[t.number, t.schema, t.created, t.policy.hex()] for t in self.tables]
        facts = {
            "lineage": self.lineage.hex(),
            "epochs": self.history.epochs,
            "ends": self.history.ends,
            "version": self.version,
            "next_table": self.next_table,
            "tables": tables,
            "horizon": self.horizon,
            "cells": self.cells,
            "logged": self.logged,
            "directory": self.directory,
            "distinct": self.distinct,
        }
        if counting := {str(t.number): t.counting for t in self.tables if t.counting}:
            facts["counting"] = counting
        text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        head = _HEAD.pack(MAGIC, FORMAT, len(text), len(self.blocks), len(self.sessions), 0)
        body = text + np.array(self.blocks, "<u8").tobytes() + self.sessions
        checksum = xxhash.xxh3_64_intdigest(head[:-8] + body)
        return head[:-8] + checksum.to_bytes(8, "little") + body

    @classmethod
    def unpack(cls, data: bytes, where: str) -> BaseState:
        """Decode the state record in ``data``. Raises Corrupt or UnknownFormat.

        where  name of the record, for errors
        """
        text, blocks, sessions = _verified(data, where)
        facts = json.loads(text)
        return cls(
            lineage=bytes.fromhex(facts["lineage"]),
            history=History(
                tuple(facts["epochs"]) if "epochs" in facts else (facts["epoch"],),
                tuple(facts.get("ends", ())),
            ),
            version=facts["version"],
            next_table=facts["next_table"],
            tables=tuple(_table(facts.get("counting", {}), *each) for each in facts["tables"]),
            horizon=facts["horizon"],
            cells=facts["cells"],
            logged=facts.get("logged", False),
            directory=facts.get("directory", 0),
            distinct=facts.get("distinct", False),
            sessions=sessions,
            blocks=blocks,
        )


def _table(
    counting: dict[str, int], number: int, schema: str, created: int, policy: str
) -> BaseTable:
    return BaseTable(
        number=number,
        schema=schema,
        created=created,
        policy=bytes.fromhex(policy),
        counting=counting.get(str(number), 0),
    )


def _verified(data: bytes, where: str) -> tuple[bytes, tuple[int, ...], bytes]:
    """Verify the state record in ``data``, and return its (JSON, block numbers, sessions).

    where  name of the record, for errors

    Raises Corrupt or UnknownFormat.
    """
    if len(data) < _HEAD.size:
        raise Corrupt(where, f"expected at least {_HEAD.size} bytes, got {len(data)}")
    magic, version, text, blocks, sessions, checksum = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise Corrupt(where, f"a state record must begin with {MAGIC!r}, got {magic!r}")
    if xxhash.xxh3_64_intdigest(data[: _HEAD.size - 8] + data[_HEAD.size :]) != checksum:
        raise Corrupt(where, "the checksum of the state record does not match its bytes")
    if version not in READABLE:
        raise UnknownFormat(where, version, FORMAT)
    numbers = _HEAD.size + text
    rest = numbers + 8 * blocks
    if len(data) != rest + sessions:
        raise Corrupt(where, f"expected a state record of {rest + sessions} bytes, got {len(data)}")
    stored = tuple(np.frombuffer(data, "<u8", blocks, numbers).tolist())
    return data[_HEAD.size : numbers], stored, data[rest:]
