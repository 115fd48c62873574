"""Read the options of a subscription from its request."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from psproto import codec, names
from psproto import ps_pb2 as pb
from psserver.errors import BadRequest
from storage.schema import TableSchema

MAX_REQUEST_BYTES = 640 << 10  # maximum size of a request; MAX_TABLES table names fit
LEAST_CHUNK_BYTES = 4096  # smaller values of chunk_bytes are raised to this number
LEAST_PROGRESS_MS = 100
CHUNK_BYTES = 1 << 20  # default number of bytes of arrays per message
MOST_CHUNK_BYTES = 16 << 20
PROGRESS_SECONDS = 1.0  # default time between progress messages
MOST_COALESCE_MS = 60_000
MAX_TABLES = 4096  # maximum number of table names in a request


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Options that a subscriber requested, with defaults for those that it did not."""

    tables: frozenset[str]  # names of the tables to send; empty: all tables
    content: int  # pb.Content: keys only, embeddings, or embeddings with optimizer state
    dtype: int  # pb.DType of the rows
    coalesce_seconds: float  # how long changes may wait to be merged; 0: changes do not wait
    coalesce_rows: int  # number of waiting rows at which merged changes are sent; 0: no limit
    progress_seconds: float  # time between progress messages while there are no changes
    chunk_bytes: int  # approximate bytes of arrays per message

    @property
    def coalesces(self) -> bool:
        """Whether several changes may be merged, so that only the newest value of a row is sent."""
        return self.coalesce_seconds > 0 or self.coalesce_rows > 0

    def wants(self, table: str) -> bool:
        """Return whether the subscription includes the table with this name."""
        return not self.tables or table in self.tables

    def width(self, schema: TableSchema) -> int:
        """Return how many numbers of each row are sent: none, the embedding, or the whole row."""
        if self.content == pb.CONTENT_KEYS:
            return 0
        return schema.width if self.content == pb.CONTENT_VALUES_AND_STATE else schema.dim

    def rows_per_message(self, width: int) -> int:
        """Return how many rows fit into a message of ``chunk_bytes``; at least 1.

        width  numbers per row
        """
        state = self.content == pb.CONTENT_VALUES_AND_STATE
        row = 16 + width * codec.WIRE[self.dtype].itemsize + 16 * state
        return max(1, self.chunk_bytes // row)


def parse(data: bytes) -> pb.SubscribeRequest:
    """Parse a SubscribeRequest. Raises Malformed if it cannot be parsed, BadRequest if it is larger
    than MAX_REQUEST_BYTES.
    """
    if len(data) > MAX_REQUEST_BYTES:
        raise _bad(f"a request may have at most {MAX_REQUEST_BYTES} bytes, got {len(data)}")
    request = pb.SubscribeRequest()
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise codec.Malformed(f"SubscribeRequest: {error}") from error
    return request


def read_wanted(request: pb.SubscribeRequest) -> Wanted:
    """Return the options in a request, with defaults for those that are not set.

    Raises BadRequest if one is invalid.
    """
    _require_in_range(request)
    content = request.content or pb.CONTENT_VALUES
    if content not in pb.Content.values():
        raise _bad(f"content must be one of {pb.Content.values()}, got {content}")
    dtype = codec.wire_dtype(request.dtype)
    if content == pb.CONTENT_VALUES_AND_STATE and dtype != pb.DTYPE_FLOAT32:
        raise _bad(f"dtype must be 1 (float32) for embeddings with optimizer state, got {dtype}")
    if request.start not in pb.Start.values():
        raise _bad(f"start must be one of {pb.Start.values()}, got {request.start}")
    return Wanted(
        tables=frozenset(request.tables),
        content=content,
        dtype=dtype,
        coalesce_seconds=request.coalesce_ms / 1000,
        coalesce_rows=request.coalesce_rows,
        progress_seconds=request.progress_ms / 1000 or PROGRESS_SECONDS,
        chunk_bytes=max(request.chunk_bytes or CHUNK_BYTES, LEAST_CHUNK_BYTES),
    )


def _require_in_range(request: pb.SubscribeRequest) -> None:
    """Raise BadRequest if a table name is invalid, or a number is out of range."""
    if len(request.tables) > MAX_TABLES:
        raise _bad(f"at most {MAX_TABLES} tables may be named, got {len(request.tables)}")
    for name in request.tables:
        if problem := names.problem("table", name):
            raise _bad(problem)
    if request.coalesce_ms > MOST_COALESCE_MS:
        raise _bad(f"coalesce_ms must be in 0..{MOST_COALESCE_MS}, got {request.coalesce_ms}")
    if request.chunk_bytes > MOST_CHUNK_BYTES:
        raise _bad(f"chunk_bytes must be in 0..{MOST_CHUNK_BYTES}, got {request.chunk_bytes}")
    if 0 < request.progress_ms < LEAST_PROGRESS_MS:
        raise _bad(
            f"progress_ms must be 0 or at least {LEAST_PROGRESS_MS}, got {request.progress_ms}"
        )


def _bad(why: str) -> BadRequest:
    """Return the error for an invalid subscription request; its message contains ``why``."""
    return BadRequest("INVALID_ARGUMENT", f"subscription: {why}")
