"""The manifests of a checkpoint: what MANIFEST.json and a shard's manifest contain."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from storage.errors import Corrupt
from storage.sealed import FORMAT

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
ATTEMPT = re.compile(r"[0-9a-f]{16}")
MANIFEST = "MANIFEST.json"
MAX_MANIFEST = 256 << 20  # bytes
MAX_CHAIN = 64  # checkpoints, from an incremental one to the full one

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of a checkpoint, as a manifest names it."""

    path: str  # within the checkpoint
    bytes: int
    checksum: str  # xxh3_128, hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTable:
    """A table of one shard at the version of the checkpoint."""

    number: int  # on that shard
    name: str
    schema: str  # JSON
    rows: int
    step: int | None = None  # of the table; None: the largest of its rows (older checkpoints)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The checkpoint that an incremental one builds on."""

    name: str
    checksum: str  # xxh3_128 of its MANIFEST.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one shard wrote."""

    name: str
    attempt: str
    shard: int
    shards: int
    buckets: tuple[tuple[int, int], ...]  # that the shard owned: first, last + 1
    lineage: str  # hexadecimal
    version: int  # E
    copied: int  # S
    after: int  # the version of the base; 0 without
    base: Base | None
    tables: tuple[PartTable, ...]
    blocks: tuple[File, ...]
    records: tuple[File, ...]
    counters: tuple[File, ...]
    sessions: tuple[File, ...]  # one, or none
    micros: int  # since 1970, at E

    @property
    def files(self) -> tuple[File, ...]:
        """All of them."""
        return (*self.blocks, *self.records, *self.counters, *self.sessions)

    @property
    def bytes(self) -> int:
        """Of the files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTable:
    """A table over all shards."""

    name: str
    schema: str  # JSON
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole checkpoint."""

    name: str
    attempt: str
    base: Base | None
    parts: tuple[File, ...]  # the shards' manifests, by shard
    versions: tuple[int, ...]  # by shard
    tables: tuple[CheckpointTable, ...]  # by name
    bytes: int  # of everything, the base not counted
    micros: int  # since 1970


def facts(item: Any) -> dict[str, Any]:
    """A manifest as what json can express, with its format."""
    return {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(item)))}


def parse(kind: type[T], content: dict[str, Any], where: str) -> T:
    """A dataclass of what ``facts`` made."""
    try:
        values = dict(content)
        if values["base"] is not None:
            values["base"] = Base(**values["base"])
        for field, item in _ITEMS[kind].items():
            values[field] = tuple(item(**each) for each in values[field])
        for field in ("versions", "buckets"):
            if field in values:
                values[field] = tuple(
                    tuple(each) if isinstance(each, list) else each for each in values[field]
                )
        return kind(**values)
    except (TypeError, KeyError) as error:
        raise Corrupt(where, f"no manifest of this kind: {error}") from error


_ITEMS: dict[type, dict[str, type]] = {
    Manifest: {"parts": File, "tables": CheckpointTable},
    Part: {"tables": PartTable}
    | dict.fromkeys(("blocks", "records", "counters", "sessions"), File),
}
