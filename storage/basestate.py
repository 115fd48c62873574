"""The state of the base: which blocks are live, and what they are.

    state  = magic[8] | format u32 | json u32 | blocks u64 | sessions u64 | checksum u64
             | JSON in UTF-8, padded with blanks to 8 bytes | numbers u64[blocks] | sessions

Little-endian; ``json`` and ``sessions`` are in bytes, the checksum is the xxh3_64 of all other
bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from storage.errors import Corrupt, UnknownFormat
from storage.history import History

FORMAT = 2
READABLE = (1, FORMAT)  # format 1 had one epoch, and at first no `logged`
MAGIC = b"PSBASE\n\0"

_HEAD = struct.Struct("<8sIIQQQ")  # magic format json blocks sessions checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTable:
    """A table that existed at the version of a base state."""

    number: int  # given at creation, never reused
    schema: str  # JSON
    created: int  # version of its creation
    policy: bytes = b""  # state of its eviction, in the format of the eviction
    counting: int = 0  # counters of versions up to this one were dropped by an alteration


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseState:
    """What the live blocks contain: the shard at one version of its log."""

    lineage: bytes  # [16]
    history: History  # epochs of the log
    version: int  # the blocks contain every change up to it; replay starts after it
    next_table: int  # number for the next new table
    tables: tuple[BaseTable, ...] = ()
    horizon: int = 0  # deletes up to this version may have lost their tombstones
    sessions: bytes = b""  # of the clients, as the shard packs them
    blocks: tuple[int, ...] = ()  # numbers of the live blocks, in the order they were added
    cells: int = 0  # how many of these, at the end, contain sketches, which are written as a whole
    logged: bool = False  # a log exists, so a missing one is damage

    def pack(self) -> bytes:
        """Return the bytes that are stored."""
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
        """Return the state in ``data``. Raises Corrupt or UnknownFormat with ``where``."""
        if len(data) < _HEAD.size:
            raise Corrupt(where, f"{len(data)} bytes are too short for a state")
        magic, version, text, blocks, sessions, checksum = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise Corrupt(where, f"a state must begin with {MAGIC!r}, got {magic!r}")
        if xxhash.xxh3_64_intdigest(data[: _HEAD.size - 8] + data[_HEAD.size :]) != checksum:
            raise Corrupt(where, "the checksum of the state does not match its bytes")
        if version not in READABLE:
            raise UnknownFormat(where, version, FORMAT)
        numbers = _HEAD.size + text
        rest = numbers + 8 * blocks
        if len(data) != rest + sessions:
            raise Corrupt(where, f"the state is {len(data)} bytes, not {rest + sessions}")
        facts = json.loads(data[_HEAD.size : numbers])
        return cls(
            lineage=bytes.fromhex(facts["lineage"]),
            history=History(
                tuple(facts["epochs"]) if "epochs" in facts else (facts["epoch"],),
                tuple(facts.get("ends", ())),
            ),
            version=facts["version"],
            next_table=facts["next_table"],
            tables=tuple(
                BaseTable(
                    number=number,
                    schema=schema,
                    created=created,
                    policy=bytes.fromhex(policy),
                    counting=facts.get("counting", {}).get(str(number), 0),
                )
                for number, schema, created, policy in facts["tables"]
            ),
            horizon=facts["horizon"],
            cells=facts["cells"],
            logged=facts.get("logged", False),
            sessions=data[rest:],
            blocks=tuple(np.frombuffer(data, "<u8", blocks, numbers).tolist()),
        )
