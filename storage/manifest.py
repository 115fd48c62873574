"""The schemas of a checkpoint's manifests: MANIFEST.json, and one for each shard's part.

A manifest may come from a damaged disk or from somebody who may write to the store. So every field
has a type and a bound, and every path is one that a shard writes, inside the checkpoint.
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
MAX_FILES = 1 << 18  # of one kind in one part
MAX_SHARDS = 4096
MAX_TABLES = 1 << 16
MAX_SCHEMA = 1 << 16  # characters of a table's schema
MAX_CHAIN = 64  # checkpoints, from an incremental one to the full one

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
TableName = Annotated[str, Field(pattern=f"^{TABLE.pattern}$")]
Attempt = Annotated[str, Field(pattern=f"^{ATTEMPT.pattern}$")]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Path = Annotated[
    str, Field(pattern=rf"^[0-9a-f]{{16}}/[0-9]{{5}}(\.[0-9]{{6,7}}\.({'|'.join(KINDS)})|\.json)$")
]
Natural = Annotated[int, Field(ge=0, lt=1 << 64)]
Micros = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]  # since 1970
Step = Annotated[int, Field(ge=-(1 << 48), le=1 << 48)]
Bucket = Annotated[int, Field(ge=0, le=4096)]
Schema = Annotated[str, Field(max_length=MAX_SCHEMA)]  # JSON
Shard = Annotated[int, Field(ge=0, lt=MAX_SHARDS)]
Format = Annotated[int, Field(ge=FORMAT, le=FORMAT)]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of a checkpoint, as a manifest names it."""

    __pydantic_config__ = STRICT
    path: Path  # within the checkpoint
    bytes: Annotated[int, Field(ge=0, le=MAX_FILE)]
    checksum: Checksum  # xxh3_128, hexadecimal


Files = Annotated[tuple[File, ...], Field(max_length=MAX_FILES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTable:
    """A table of one shard at the version of the checkpoint."""

    __pydantic_config__ = STRICT
    number: Natural  # on that shard
    name: TableName
    schema: Schema
    rows: Natural
    step: Step | None = None  # of the table; None: the largest of its rows (older checkpoints)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """The checkpoint that an incremental one needs."""

    __pydantic_config__ = STRICT
    name: Name
    checksum: Checksum  # of its MANIFEST.json


ParentField = Annotated[Parent | None, Field(validation_alias="base")]
IN_FILE = {"parent": "base"}  # fields whose names in the file differ


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one shard wrote."""

    __pydantic_config__ = STRICT
    NAMES_IN_FILE: ClassVar = IN_FILE
    format: Format = FORMAT
    name: Name
    attempt: Attempt
    shard: Shard
    shards: Annotated[int, Field(ge=1, le=MAX_SHARDS)]
    # runs of buckets that the shard owned: first, last + 1
    buckets: Annotated[tuple[tuple[Bucket, Bucket], ...], Field(max_length=4096)]
    lineage: Checksum  # hexadecimal
    version: Natural  # E
    copied: Natural  # S
    after: Natural  # the version of the parent; 0 without
    parent: ParentField
    tables: Annotated[tuple[PartTable, ...], Field(max_length=MAX_TABLES)]
    blocks: Files
    records: Files
    counters: Files
    sessions: Annotated[tuple[File, ...], Field(max_length=1)]
    micros: Micros  # at E

    @property
    def files(self) -> tuple[File, ...]:
        """All files of the part, without its manifest."""
        return (*self.blocks, *self.records, *self.counters, *self.sessions)

    @property
    def bytes(self) -> int:
        """Size of the files, in bytes."""
        return sum(file.bytes for file in self.files)

    def contradiction(self) -> str:
        """Return the first statement of this manifest that contradicts another; "" if none."""
        if not self.after <= self.copied <= self.version:
            return f"versions {self.after}, {self.copied}, {self.version} do not ascend"
        if self.parent is None and self.after:
            return f"builds on version {self.after} without a parent"
        prefix = f"{self.attempt}/{self.shard:05}."
        for kind in KINDS:
            for file in getattr(self, kind):
                if not file.path.startswith(prefix) or not file.path.endswith(f".{kind}"):
                    return f"{file.path} is not one of its {kind}"
        for what, values in (
            ("file", [file.path for file in self.files]),
            ("table name", [table.name for table in self.tables]),
            ("table number", [table.number for table in self.tables]),
        ):
            if len(set(values)) != len(values):
                return f"names a {what} twice"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTable:
    """A table over all shards."""

    __pydantic_config__ = STRICT
    name: TableName
    schema: Schema
    rows: Natural


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole checkpoint."""

    __pydantic_config__ = STRICT
    NAMES_IN_FILE: ClassVar = IN_FILE
    format: Format = FORMAT
    name: Name
    attempt: Attempt
    parent: ParentField
    # the shards' manifests, by shard
    parts: Annotated[tuple[File, ...], Field(min_length=1, max_length=MAX_SHARDS)]
    versions: Annotated[tuple[Natural, ...], Field(max_length=MAX_SHARDS)]  # by shard
    tables: Annotated[tuple[CheckpointTable, ...], Field(max_length=MAX_TABLES)]  # by name
    bytes: Natural  # of everything, the parent not counted
    micros: Micros

    def contradiction(self, parts: tuple[Part, ...]) -> str:
        """Return the first statement that the manifests of the parts contradict; "" if none."""
        shards = len(self.parts)
        paths = [f"{self.attempt}/{shard:05}.json" for shard in range(shards)]
        if [file.path for file in self.parts] != paths:
            return "the paths of its parts are not those that shards write"
        if self.versions != tuple(part.version for part in parts):
            return f"has versions {self.versions[:8]}, its parts have others"
        size = sum(part.bytes for part in parts) + sum(file.bytes for file in self.parts)
        if self.bytes != size:
            return f"has {self.bytes} bytes, its parts have {size}"
        try:
            tables = tables_over(parts)
        except KeyError as error:
            return f"not all of its parts have table {error} with one schema"
        if self.tables != tables:
            return "has other tables, schemas or numbers of rows than its parts"
        return _bucket_error(parts)


def tables_over(parts: tuple[Part, ...]) -> tuple[CheckpointTable, ...]:
    """Sum up the tables of all parts, by name.

    Raises KeyError with the name of a table that not all parts have with the same schema.
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
    """Return why the parts do not cover each bucket exactly once; "" if they do."""
    runs = sorted(run for part in parts for run in part.buckets)
    end = 0
    for first, last in runs:
        if first != end or last <= first:
            return f"its parts cover the buckets around {end} not exactly once"
        end = last
    return "" if end == 4096 else f"its parts do not cover the buckets from {end} on"
