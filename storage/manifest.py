"""The schemas of a checkpoint's manifests: MANIFEST.json, and one manifest per shard.

A manifest may be damaged or malicious. So every field has a type and bounds, and a path is only
accepted in the form that a shard writes, which never leads out of the checkpoint's directory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from storage.schema import NAME as TABLE
from storage.sealed import FORMAT, STRICT

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
ATTEMPT = re.compile(r"[0-9a-f]{16}")
MANIFEST = "MANIFEST.json"
KINDS = ("blocks", "records", "counters", "sessions")
MAX_MANIFEST = 64 << 20  # bytes
MAX_FILE = 8 << 30  # bytes; a file is closed after 64 MiB, and the last record may be large
MAX_FILES = 1 << 18  # files of one kind in the part of one shard
MAX_SHARDS = 4096
MAX_TABLES = 1 << 16
MAX_SCHEMA = 1 << 16  # characters of a table's schema
MAX_CHAIN = 64  # checkpoints from an incremental one to the full one, both included

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
TableName = Annotated[str, Field(pattern=f"^{TABLE.pattern}$")]
Attempt = Annotated[str, Field(pattern=f"^{ATTEMPT.pattern}$")]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Path = Annotated[
    str, Field(pattern=rf"^[0-9a-f]{{16}}/[0-9]{{5}}(\.[0-9]{{6,7}}\.({'|'.join(KINDS)})|\.json)$")
]
Natural = Annotated[int, Field(ge=0, lt=1 << 64)]
Micros = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]  # microseconds since 1970
Step = Annotated[int, Field(ge=-(1 << 48), le=1 << 48)]
Bucket = Annotated[int, Field(ge=0, le=4096)]
Schema = Annotated[str, Field(max_length=MAX_SCHEMA)]  # JSON
Shard = Annotated[int, Field(ge=0, lt=MAX_SHARDS)]
Format = Annotated[int, Field(ge=FORMAT, le=FORMAT)]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """Path, size and checksum of one file of a checkpoint."""

    __pydantic_config__ = STRICT
    path: Path  # relative to the checkpoint's directory
    bytes: Annotated[int, Field(ge=0, le=MAX_FILE)]
    checksum: Checksum  # xxh3_128, hexadecimal


Files = Annotated[tuple[File, ...], Field(max_length=MAX_FILES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTable:
    """A table on one shard, at the version of the shard that the checkpoint contains."""

    __pydantic_config__ = STRICT
    number: Natural  # number of the table on that shard
    name: TableName
    schema: Schema
    rows: Natural  # number of rows on that shard
    step: Step | None = None  # largest step pushed to the table; None in older checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """The parent of an incremental checkpoint, which cannot be read without it."""

    __pydantic_config__ = STRICT
    name: Name
    checksum: Checksum  # xxh3_128 of the parent's MANIFEST.json


ParentField = Annotated[Parent | None, Field(validation_alias="base")]
IN_FILE = {"parent": "base"}  # names of fields -> their different names in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The manifest of one shard: the files that it wrote, and the state that they contain."""

    __pydantic_config__ = STRICT
    NAMES_IN_FILE: ClassVar = IN_FILE
    format: Format = FORMAT
    name: Name  # the checkpoint's name
    attempt: Attempt  # random id of the attempt to take the checkpoint
    shard: Shard
    shards: Annotated[int, Field(ge=1, le=MAX_SHARDS)]  # number of shards of the cluster
    # ranges of hash buckets that the shard owned: (first, last + 1)
    buckets: Annotated[tuple[tuple[Bucket, Bucket], ...], Field(max_length=4096)]
    lineage: Checksum  # random id of the shard's log, hexadecimal
    version: Natural  # version of the shard that the files contain (E in checkpoint.py)
    copied: Natural  # version at which copying the rows began (S in checkpoint.py)
    after: Natural  # ``version`` of the shard in the parent; 0 without a parent
    parent: ParentField
    tables: Annotated[tuple[PartTable, ...], Field(max_length=MAX_TABLES)]
    blocks: Files
    records: Files
    counters: Files
    sessions: Annotated[tuple[File, ...], Field(max_length=1)]
    micros: Micros  # time at which the shard had ``version``

    @property
    def files(self) -> tuple[File, ...]:
        """All files that the shard wrote, except this manifest."""
        return (*self.blocks, *self.records, *self.counters, *self.sessions)

    @property
    def bytes(self) -> int:
        """Total size of ``files``, in bytes."""
        return sum(file.bytes for file in self.files)

    def contradiction(self) -> str:
        """Describe the first contradiction between fields of this manifest; "" if there is none."""
        if not self.after <= self.copied <= self.version:
            return (
                f"expected after <= copied <= version, got {self.after}, {self.copied},"
                f" {self.version}"
            )
        if self.parent is None and self.after:
            return f"field 'after' must be 0 without a parent, got {self.after}"
        prefix = f"{self.attempt}/{self.shard:05}."
        for kind in KINDS:
            for file in getattr(self, kind):
                if not file.path.startswith(prefix) or not file.path.endswith(f".{kind}"):
                    return f"field {kind!r} names the unexpected file {file.path}"
        for what, values in (
            ("file", [file.path for file in self.files]),
            ("table name", [table.name for table in self.tables]),
            ("table number", [table.number for table in self.tables]),
        ):
            if len(set(values)) != len(values):
                return f"every {what} must be unique, but one occurs twice"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTable:
    """A table of the checkpoint on all shards together."""

    __pydantic_config__ = STRICT
    name: TableName
    schema: Schema
    rows: Natural  # number of rows on all shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of MANIFEST.json, which describes a whole checkpoint."""

    __pydantic_config__ = STRICT
    NAMES_IN_FILE: ClassVar = IN_FILE
    format: Format = FORMAT
    name: Name  # the checkpoint's name
    attempt: Attempt  # random id of the attempt that completed the checkpoint
    parent: ParentField
    # the manifests of the shards, by number of the shard
    parts: Annotated[tuple[File, ...], Field(min_length=1, max_length=MAX_SHARDS)]
    versions: Annotated[tuple[Natural, ...], Field(max_length=MAX_SHARDS)]  # by shard
    tables: Annotated[tuple[CheckpointTable, ...], Field(max_length=MAX_TABLES)]  # by name
    bytes: Natural  # size of the shards' files and manifests; the parent is not counted
    micros: Micros  # time at which the checkpoint was completed

    def contradiction(self, parts: tuple[Part, ...]) -> str:
        """Describe the first field that contradicts the manifests of the shards; "" if none does.

        parts  manifests of the shards, by number of the shard
        """
        shards = len(self.parts)
        paths = [f"{self.attempt}/{shard:05}.json" for shard in range(shards)]
        if [file.path for file in self.parts] != paths:
            return f"field 'parts' must have the paths {paths[:8]}"
        if self.versions != tuple(part.version for part in parts):
            return (
                f"field 'versions' is {self.versions[:8]}, but the shards' manifests have"
                " different versions"
            )
        size = sum(part.bytes for part in parts) + sum(file.bytes for file in self.parts)
        if self.bytes != size:
            return f"field 'bytes' is {self.bytes}, but the shards' files have {size} bytes"
        try:
            tables = tables_over(parts)
        except KeyError as error:
            return f"table {error} is missing on some shard, or has a different schema there"
        if self.tables != tables:
            return (
                "field 'tables': tables, schemas or numbers of rows differ from the shards'"
                " manifests"
            )
        return _bucket_error(parts)


def tables_over(parts: tuple[Part, ...]) -> tuple[CheckpointTable, ...]:
    """Sum up the tables of all shards, sorted by name.

    parts  manifests of the shards

    Raises KeyError with the name of a table that some shard lacks or has with a different schema.
    """
    by_part = [{table.name: table for table in part.tables} for part in parts]
    names = sorted(set().union(*by_part))
    for name in names:
        if len({each[name].schema if name in each else None for each in by_part}) > 1:
            raise KeyError(name)
    return tuple(
        CheckpointTable(
            name=name,
            schema=by_part[0][name].schema,
            rows=sum(each[name].rows for each in by_part),
        )
        for name in names
    )


def _bucket_error(parts: tuple[Part, ...]) -> str:
    """Describe the first hash bucket that no shard or several shards own; "" if there is none."""
    runs = sorted(run for part in parts for run in part.buckets)
    end = 0
    for first, last in runs:
        if first != end or last <= first:
            return f"hash buckets near {end} are owned by no shard or by several"
        end = last
    return "" if end == 4096 else f"hash buckets from {end} on are owned by no shard"
