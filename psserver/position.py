"""A subscriber's position in the history of a shard, and its token: the position as bytes.

A subscriber stores the token, and sends it to continue where it stopped.

    token = format u8 | phase u8 | zero u16 | table u32 | lineage[16] | epoch u64 | version u64
          | tables u64 | after u64 | until u64 | slot u64 | boot u64 | checksum u64

Numbers are little-endian. lineage: random id of the shard's log; a restore from a checkpoint begins
a new one. epoch: random number that each start of a server draws. boot: random number of the server
process. tables: hash of the subscribed table names. A subscriber is in one of five phases:

    TAIL            it has every change up to ``version``
    SNAPSHOT,       a scan is sending it the rows with versions in ``after + 1..version``; the next
    CATCH_UP        row is at slot ``slot`` of table number ``table``, in the server process
                    ``boot``. Table 0: the list of tables and the deletes come first
    SNAPSHOT_TAIL,  the scan is finished, and the subscriber has every change up to ``version``.
    CATCH_UP_TAIL   Once it has all changes up to ``until``, its rows are consistent (equal to those
                    of the shard at one version)

SNAPSHOT sends all rows (after = 0 at first), CATCH_UP those that changed after the last version
that the subscriber has. A slot is a position in the scan of a table: the index of a row in memory,
or 2^56 + the number of a block on disk * 2^16 + the index of a row in the block. Another process
has the rows at different indices in memory, so a scan can only continue in the same process; in a
different one it starts over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from xxhash import xxh3_64_intdigest

from psserver.errors import BadRequest

FORMAT = 1
MAX_SLOT = 1 << 57  # upper bound on the positions in the scan of a table
_TOKEN = struct.Struct("<BBHI16s7Q")
_CHECKSUM = struct.Struct("<Q")
_SEED = 0x70736665656431  # seed of the checksum; bytes of formats with other seeds are refused
TOKEN_BYTES = _TOKEN.size + _CHECKSUM.size


class Phase(IntEnum):
    """Phase of a subscription; the module docstring explains each."""

    TAIL = 1
    SNAPSHOT = 2
    CATCH_UP = 3
    SNAPSHOT_TAIL = 4
    CATCH_UP_TAIL = 5


SCANS = (Phase.SNAPSHOT, Phase.CATCH_UP)
# phase that follows the end of a scan
AFTER_SCAN = {Phase.SNAPSHOT: Phase.SNAPSHOT_TAIL, Phase.CATCH_UP: Phase.CATCH_UP_TAIL}
# phase that follows if the log no longer has the next change
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
    """A subscriber's position in the history of a shard: how far it has received the changes.

    The module docstring explains the phases.
    """

    lineage: bytes  # 16 bytes: random id of the log
    epoch: int  # epoch (random number of a server start) in which the shard was at ``version``
    tables: int  # hash of the subscribed table names; 0: all tables
    phase: Phase
    version: int  # the subscriber has the changes up to this version, or a scan sends them
    after: int = 0  # the scan sends only rows newer than this version
    until: int = 0  # version from which on the rows of the subscriber are consistent
    table: int = 0  # number of the table that the scan is at
    slot: int = 0  # slot of that table from which the scan continues
    boot: int = 0  # random number of the process that scans; 0: the scan has not begun

    @property
    def newest(self) -> int:
        """Largest version in the position. It was on disk before the subscriber got the token."""
        return max(self.version, self.after, self.until)

    def encode(self) -> bytes:
        """Return the position as a token, in the format that the module docstring describes."""
        small = FORMAT, self.phase, 0, self.table
        large = self.version, self.tables, self.after, self.until, self.slot, self.boot
        token = _TOKEN.pack(*small, self.lineage, self.epoch, *large)
        return token + _CHECKSUM.pack(xxh3_64_intdigest(token, _SEED))


def decode(token: bytes) -> Position:
    """Return the position that a token encodes.

    Raises BadRequest if the length, the checksum or a field is wrong. The caller must check that
    the position's versions belong to the history of the shard.
    """
    if len(token) != TOKEN_BYTES:
        raise _malformed(token, f"expected {TOKEN_BYTES} bytes, got {len(token)}")
    body = token[: _TOKEN.size]
    if _CHECKSUM.unpack(token[_TOKEN.size :])[0] != xxh3_64_intdigest(body, _SEED):
        raise _malformed(token, "its checksum does not match its contents")
    format_, phase, zero, table, lineage, epoch, *large = _TOKEN.unpack(body)
    if format_ != FORMAT:
        raise _malformed(token, f"expected format {FORMAT}, got {format_}")
    if zero:
        raise _malformed(token, f"bytes 2 and 3 must be 0, got {zero}")
    if phase not in Phase.__members__.values():
        raise _malformed(token, f"field 'phase' must be in 1..{len(Phase)}, got {phase}")
    names = ("version", "tables", "after", "until", "slot", "boot")
    fields = dict(zip(names, large, strict=True))
    position = Position(lineage=lineage, epoch=epoch, phase=Phase(phase), table=table, **fields)
    _check(position, token)
    return position


def _check(position: Position, token: bytes) -> None:
    """Raise BadRequest if a field is out of range or not used in the position's phase.

    token  encoded position, for the message
    """
    phase = position.phase
    for field in ("after", "until", "table", "slot", "boot"):
        value = getattr(position, field)
        if value and field not in _USES[phase]:
            raise _malformed(token, f"field {field!r} must be 0 in phase {phase.name}, got {value}")
    if phase in SCANS and position.boot and position.after > position.version:
        rule = f"must be at most the version, {position.version}"
        raise _malformed(token, f"field 'after' {rule}, got {position.after}")
    if phase in AFTER_SCAN.values() and position.until < position.version:
        rule = f"must be at least the version, {position.version}"
        raise _malformed(token, f"field 'until' {rule}, got {position.until}")
    if position.slot > MAX_SLOT:
        raise _malformed(token, f"field 'slot' must be in 0..{MAX_SLOT}, got {position.slot}")


def digest(tables: Iterable[str]) -> int:
    """Return a 64-bit hash of a set of table names; 0 for an empty set, which means all tables."""
    names = sorted(set(tables))
    return xxh3_64_intdigest("\0".join(names).encode()) if names else 0


def _malformed(token: bytes, why: str) -> BadRequest:
    """Return the error for a malformed token.

    why  the cause, which the message shows after the first 16 bytes of the token
    """
    shown = token[:16].hex() + ("..." if len(token) > 16 else "")
    return BadRequest("INVALID_ARGUMENT", f"token {shown} is malformed: {why}")
