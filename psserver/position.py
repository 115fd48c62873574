"""Where a subscriber stands in the history of a shard, and the token that says so.

    token = format u8 | phase u8 | zero u16 | table u32 | lineage[16] | epoch u64 | version u64
          | tables u64 | after u64 | until u64 | slot u64 | boot u64 | checksum u64

Little-endian. A subscriber is in one of five phases:

    TAIL                    has every change up to ``version``
    SNAPSHOT, CATCH_UP      is being sent the rows as they were at ``version``, of versions above
                            ``after``: the next is that of ``slot`` in table number ``table``
                            (0: tables and deletes come first), in the process called ``boot``
    SNAPSHOT_TAIL,          has had the rows, and has every change up to ``version``; the rows and
    CATCH_UP_TAIL           the changes up to ``until`` together are a state of the shard

Slots are places in memory, so a scan goes on in the same process only, and else begins again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from xxhash import xxh3_64_intdigest

from psserver.errors import BadRequest

FORMAT = 1
_TOKEN = struct.Struct("<BBHI16s7Q")
_CHECKSUM = struct.Struct("<Q")
_SEED = 0x70736665656431  # a checksum of something else is none of a token
TOKEN_BYTES = _TOKEN.size + _CHECKSUM.size


class Phase(IntEnum):
    """What a subscriber is being sent."""

    TAIL = 1
    SNAPSHOT = 2
    CATCH_UP = 3
    SNAPSHOT_TAIL = 4
    CATCH_UP_TAIL = 5


SCANS = (Phase.SNAPSHOT, Phase.CATCH_UP)
AFTER_SCAN = {Phase.SNAPSHOT: Phase.SNAPSHOT_TAIL, Phase.CATCH_UP: Phase.CATCH_UP_TAIL}
WHEN_CUT_OFF = {
    Phase.TAIL: Phase.CATCH_UP,
    Phase.SNAPSHOT_TAIL: Phase.SNAPSHOT,
    Phase.CATCH_UP_TAIL: Phase.CATCH_UP,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place in the history of a shard; see the module for the fields."""

    lineage: bytes  # 16 bytes
    epoch: int  # of the lineage; reserved, always 1
    tables: int  # digest of the names that are subscribed to
    phase: Phase
    version: int
    after: int = 0
    until: int = 0
    table: int = 0
    slot: int = 0
    boot: int = 0  # 0: the scan has not begun

    def encode(self) -> bytes:
        """The token."""
        token = _TOKEN.pack(
            FORMAT,
            self.phase,
            0,
            self.table,
            self.lineage,
            self.epoch,
            self.version,
            self.tables,
            self.after,
            self.until,
            self.slot,
            self.boot,
        )
        return token + _CHECKSUM.pack(xxh3_64_intdigest(token, _SEED))


def decode(token: bytes) -> Position:
    """The position that a token stands for; BadRequest unless it is whole and of this format."""
    if len(token) != TOKEN_BYTES:
        raise _malformed(token, f"{len(token)} bytes, not {TOKEN_BYTES}")
    body = token[: _TOKEN.size]
    if _CHECKSUM.unpack(token[_TOKEN.size :])[0] != xxh3_64_intdigest(body, _SEED):
        raise _malformed(token, "its checksum is wrong")
    version, phase, _, table, lineage, epoch, *rest = _TOKEN.unpack(body)
    if version != FORMAT:
        raise _malformed(token, f"of format {version}, this release reads {FORMAT}")
    stands, tables, after, until, slot, boot = rest
    return Position(
        lineage=lineage,
        epoch=epoch,
        tables=tables,
        phase=Phase(phase),
        version=stands,
        after=after,
        until=until,
        table=table,
        slot=slot,
        boot=boot,
    )


def digest(tables: Iterable[str]) -> int:
    """Of a set of table names; 0 of none, which means all."""
    names = sorted(set(tables))
    return xxh3_64_intdigest("\0".join(names).encode()) if names else 0


def _malformed(token: bytes, why: str) -> BadRequest:
    shown = token[:16].hex() + ("..." if len(token) > 16 else "")
    return BadRequest("INVALID_ARGUMENT", f"token {shown} is malformed: {why}")
