"""A subscriber's position in the history of a shard, and the token that stands for it.

    token = format u8 | phase u8 | zero u16 | table u32 | lineage[16] | epoch u64 | version u64
          | tables u64 | after u64 | until u64 | slot u64 | boot u64 | checksum u64

Little-endian. A subscriber is in one of five phases:

    TAIL            has every change up to ``version``
    SNAPSHOT,       is being sent the rows as they were at ``version``, those of versions above
    CATCH_UP        ``after``. Next is the row of ``slot`` in table number ``table`` (0: tables and
                    deletes come first), in the process ``boot``
    SNAPSHOT_TAIL,  has the rows, and every change up to ``version``. Once it has the changes up to
    CATCH_UP_TAIL   ``until``, its rows are a state that the shard was in

A slot is an index in memory, so a scan continues only in the same process, and begins again in
another.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from xxhash import xxh3_64_intdigest

from psserver.errors import BadRequest

FORMAT = 1
MAX_SLOT = 1 << 40  # no table of one shard has more slots
_TOKEN = struct.Struct("<BBHI16s7Q")
_CHECKSUM = struct.Struct("<Q")
_SEED = 0x70736665656431  # so that a checksum of something else is not one of a token
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
_USES: dict[Phase, frozenset[str]] = {  # fields that a phase uses; the others are 0
    Phase.TAIL: frozenset(),
    Phase.SNAPSHOT: frozenset(("after", "table", "slot", "boot")),
    Phase.CATCH_UP: frozenset(("after", "table", "slot", "boot")),
    Phase.SNAPSHOT_TAIL: frozenset(("after", "until", "boot")),
    Phase.CATCH_UP_TAIL: frozenset(("after", "until", "boot")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A position in the history of a shard; see the top of the file for the fields."""

    lineage: bytes  # 16 bytes
    epoch: int  # in which the shard was at ``version``
    tables: int  # digest of the names that are subscribed to
    phase: Phase
    version: int
    after: int = 0
    until: int = 0
    table: int = 0
    slot: int = 0
    boot: int = 0  # 0: the scan has not begun

    @property
    def newest(self) -> int:
        """Newest version that the position refers to; it was durable."""
        return max(self.version, self.after, self.until)

    def encode(self) -> bytes:
        """Return the token."""
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
    """Return the position of a token. Raises BadRequest unless every field follows its rule.

    Whether the versions are part of the shard's history is for the caller to check.
    """
    if len(token) != TOKEN_BYTES:
        raise _malformed(token, f"{len(token)} bytes, not {TOKEN_BYTES}")
    body = token[: _TOKEN.size]
    if _CHECKSUM.unpack(token[_TOKEN.size :])[0] != xxh3_64_intdigest(body, _SEED):
        raise _malformed(token, "its checksum is wrong")
    format_, phase, zero, table, lineage, epoch, *rest = _TOKEN.unpack(body)
    version, tables, after, until, slot, boot = rest
    if format_ != FORMAT:
        raise _malformed(token, f"of format {format_}, this release reads {FORMAT}")
    if zero:
        raise _malformed(token, f"bytes 2 and 3 must be 0, got {zero}")
    if phase not in Phase.__members__.values():
        raise _malformed(token, f"phase must be in 1..{len(Phase)}, got {phase}")
    position = Position(
        lineage=lineage,
        epoch=epoch,
        tables=tables,
        phase=Phase(phase),
        version=version,
        after=after,
        until=until,
        table=table,
        slot=slot,
        boot=boot,
    )
    _check(position, token)
    return position


def _check(position: Position, token: bytes) -> None:
    phase = position.phase
    for field in ("after", "until", "table", "slot", "boot"):
        value = getattr(position, field)
        if value and field not in _USES[phase]:
            raise _malformed(token, f"{field} must be 0 in phase {phase.name}, got {value}")
    if phase in SCANS and position.boot and position.after > position.version:
        raise _malformed(
            token, f"after must be in 0..version {position.version}, got {position.after}"
        )
    if phase in AFTER_SCAN.values() and position.until < position.version:
        raise _malformed(
            token, f"until must be at least version {position.version}, got {position.until}"
        )
    if position.slot > MAX_SLOT:
        raise _malformed(token, f"slot must be in 0..{MAX_SLOT}, got {position.slot}")


def digest(tables: Iterable[str]) -> int:
    """Return the digest of a set of table names; 0 of an empty set, which means all tables."""
    names = sorted(set(tables))
    return xxh3_64_intdigest("\0".join(names).encode()) if names else 0


def _malformed(token: bytes, why: str) -> BadRequest:
    shown = token[:16].hex() + ("..." if len(token) > 16 else "")
    return BadRequest("INVALID_ARGUMENT", f"token {shown} is malformed: {why}")
