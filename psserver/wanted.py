"""What a subscriber asked for: tables, content, dtype, coalescing."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.errors import BadRequest
from storage.schema import NAME, TableSchema

CHUNK_BYTES = 1 << 20  # bytes of arrays per message, unless the subscriber asks for another size
MOST_CHUNK_BYTES = 16 << 20
PROGRESS_SECONDS = 1.0
MOST_COALESCE_MS = 60_000
MAX_TABLES = 4096  # names in one request


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a subscriber asked for."""

    tables: frozenset[str]  # empty: all
    content: int
    dtype: int
    coalesce_seconds: float
    coalesce_rows: int
    progress_seconds: float
    chunk_bytes: int

    @property
    def coalesces(self) -> bool:
        """Whether several changes may be sent as one."""
        return self.coalesce_seconds > 0 or self.coalesce_rows > 0

    def wants(self, table: str) -> bool:
        """Return whether a table is subscribed to."""
        return not self.tables or table in self.tables

    def width(self, schema: TableSchema) -> int:
        """Return how many numbers of a row are sent."""
        if self.content == pb.CONTENT_KEYS:
            return 0
        return schema.width if self.content == pb.CONTENT_VALUES_AND_STATE else schema.dim

    def rows_per_message(self, width: int) -> int:
        """Return how many rows of ``width`` numbers fill a message; at least one."""
        state = self.content == pb.CONTENT_VALUES_AND_STATE
        row = 16 + width * codec.WIRE[self.dtype].itemsize + 16 * state
        return max(1, self.chunk_bytes // row)


def parse(data: bytes) -> pb.SubscribeRequest:
    """Parse a SubscribeRequest. Raises Malformed."""
    request = pb.SubscribeRequest()
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise codec.Malformed(f"SubscribeRequest: {error}") from error
    return request


def read_wanted(request: pb.SubscribeRequest) -> Wanted:
    """Return what a request asks for, with defaults. Raises BadRequest if it breaks a rule."""
    if len(request.tables) > MAX_TABLES:
        raise _bad(f"{len(request.tables)} tables named, {MAX_TABLES} may be")
    for name in request.tables:
        if not NAME.fullmatch(name):
            raise _bad(f"{name[:200]!r} cannot be the name of a table")
    content = request.content or pb.CONTENT_VALUES
    if content not in pb.Content.values():
        raise _bad(f"content {content} is unknown")
    dtype = codec.wire_dtype(request.dtype)
    if content == pb.CONTENT_VALUES_AND_STATE and dtype != pb.DTYPE_FLOAT32:
        raise _bad("state is sent as float32 only")
    if request.start not in pb.Start.values():
        raise _bad(f"start {request.start} is unknown")
    if request.coalesce_ms > MOST_COALESCE_MS:
        raise _bad(f"coalesce_ms must be in 0..{MOST_COALESCE_MS}, got {request.coalesce_ms}")
    if request.chunk_bytes > MOST_CHUNK_BYTES:
        raise _bad(f"chunk_bytes must be in 0..{MOST_CHUNK_BYTES}, got {request.chunk_bytes}")
    return Wanted(
        tables=frozenset(request.tables),
        content=content,
        dtype=dtype,
        coalesce_seconds=request.coalesce_ms / 1000,
        coalesce_rows=request.coalesce_rows,
        progress_seconds=request.progress_ms / 1000 or PROGRESS_SECONDS,
        chunk_bytes=request.chunk_bytes or CHUNK_BYTES,
    )


def _bad(why: str) -> BadRequest:
    return BadRequest("INVALID_ARGUMENT", f"subscription: {why}")
