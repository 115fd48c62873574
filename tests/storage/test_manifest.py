"""Manifests: whatever a file contains, it is read as written or refused as Corrupt."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

from storage.checkpoint import open_checkpoint
from storage.errors import Corrupt, UnknownFormat
from storage.manifest import (
    MANIFEST,
    MAX_MANIFEST,
    MAX_SHARDS,
    CheckpointTable,
    File,
    Manifest,
    Parent,
    Part,
    PartTable,
)
from storage.sealed import FORMAT, STRICT, fields_of, seal, seal_fields, unseal
from storage.store import Store

ATTEMPT = "0123456789abcdef"
SUM = "ab" * 16
FILE = File(path=f"{ATTEMPT}/00000.000000.blocks", bytes=1, checksum=SUM)
TABLE = PartTable(number=1, name="t", schema="{}", rows=3)
PART = Part(
    name="a",
    attempt=ATTEMPT,
    shard=0,
    shards=1,
    buckets=((0, 4096),),
    lineage=SUM,
    version=20,
    copied=10,
    after=0,
    parent=None,
    tables=(TABLE,),
    blocks=(FILE,),
    records=(),
    counters=(),
    sessions=(),
    micros=1,
)
WHOLE = Manifest(
    name="a",
    attempt=ATTEMPT,
    parent=None,
    parts=(File(path=f"{ATTEMPT}/00000.json", bytes=1, checksum=SUM),),
    versions=(20,),
    tables=(CheckpointTable(name="t", schema="{}", rows=3),),
    bytes=2,
    micros=2,
)


# ---- sealed files


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    __pydantic_config__ = STRICT
    format: int = FORMAT
    name: str


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "\n",
        lambda text: text.replace('"name": "a"', '"name": "b"'),
        lambda text: json.dumps(json.loads(text)),
        lambda _: "[]",
        lambda _: "",
        lambda _: '{"checksum": "", "content": 3}',
        lambda _: "{" * 100_000,
        lambda _: "\ud800",
    ],
)
def test_a_sealed_file_is_what_was_written_to_the_byte(change: Callable[[str], str]) -> None:
    data = seal(Small(name="a"))
    with pytest.raises(Corrupt, match="here"):
        unseal(Small, change(data.decode()).encode(errors="surrogatepass"), "here")
    assert unseal(Small, data, "here") == Small(name="a")


def test_sealed_bytes_are_those_of_earlier_releases() -> None:
    content = fields_of(PART)
    checksum = xxh3_128_hexdigest(json.dumps(content, sort_keys=True, indent=1).encode())
    whole = {"checksum": checksum, "content": content}
    assert seal(PART) == (json.dumps(whole, sort_keys=True, indent=1) + "\n").encode()
    assert '"base": null' in seal(PART).decode()


def test_another_format_is_unknown_and_not_corrupt() -> None:
    with pytest.raises(UnknownFormat, match="format 2"):
        unseal(Small, seal_fields({"format": 2, "other": 5}), "here")


@pytest.mark.parametrize("content", [{}, {"format": None}, {"format": "1"}, {"format": True}])
def test_a_file_without_a_format_is_corrupt(content: dict[str, Any]) -> None:
    with pytest.raises(Corrupt, match="here: format"):
        unseal(Small, seal_fields(content), "here")


# ---- types, every field of every schema


WRONG = (None, True, 1.5, -1, 1 << 70, "", "x" * 100_000, "../../etc/passwd", [], [1], {}, {"a": 1})


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, by keys and positions."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list | tuple) else items
    for key, inner in items:
        yield from places(inner, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return copy


def error_of(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


CASES = [
    (kind, at)
    for kind, content in ((Manifest, WHOLE), (Part, PART))
    for at in places(fields_of(dataclasses.replace(content, parent=Parent(name="p", checksum=SUM))))
]


@pytest.mark.parametrize(("kind", "at"), CASES, ids=str)
def test_a_value_of_another_type_is_refused_by_name(kind: type[Any], at: tuple[Any, ...]) -> None:
    content = WHOLE if kind is Manifest else PART
    fields = fields_of(dataclasses.replace(content, parent=Parent(name="p", checksum=SUM)))
    refused = 0
    for wrong in WRONG:
        data = seal_fields(replaced(fields, at, wrong))
        error = error_of(lambda data=data: unseal(kind, data, "here"))  # type: ignore[misc]
        if error is None:  # the value is a valid one
            assert seal(unseal(kind, data, "here")) == data
        else:
            assert isinstance(error, Corrupt | UnknownFormat)
            assert str(error).startswith("here: ")
            assert len(str(error)) < 500
            refused += 1
    assert refused >= 5


def test_unknown_and_missing_fields_are_refused() -> None:
    fields = fields_of(WHOLE)
    with pytest.raises(Corrupt, match="more: "):
        unseal(Manifest, seal_fields({**fields, "more": 1}), "here")
    for name in fields:
        rest = {other: value for other, value in fields.items() if other != name}
        with pytest.raises(Corrupt, match=name):
            unseal(Manifest, seal_fields(rest), "here")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../x",
        f"{ATTEMPT}/../x",
        f"{ATTEMPT}/00000.json\n",
        f"../{ATTEMPT}/00000.json",
    ],
)
def test_a_path_stays_inside_the_checkpoint(path: str) -> None:
    fields = replaced(fields_of(WHOLE), ("parts", 0, "path"), path)
    with pytest.raises(Corrupt, match=r"parts\.0\.path"):
        unseal(Manifest, seal_fields(fields), "here")


# ---- sizes


@pytest.mark.slow
def test_many_parts_are_refused_soon() -> None:
    fields = fields_of(WHOLE)
    fields["parts"] = list(fields["parts"]) * 200_000
    data = seal_fields(fields)
    started = time.thread_time()
    with pytest.raises(Corrupt, match=f"parts: .* at most {MAX_SHARDS} items"):
        unseal(Manifest, data, "here")
    assert time.thread_time() - started < 1


def test_a_sparse_manifest_is_refused_before_it_is_read(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / MANIFEST).open("wb") as file:
        file.truncate(300 << 30)
    with pytest.raises(Corrupt, match=f"at most {MAX_MANIFEST} bytes, got {300 << 30}"):
        open_checkpoint(store, "a")


# ---- agreement


def publish(store: Store, manifest: Manifest, *parts: Part) -> None:
    """Write manifests; ``manifest`` gets the sizes and checksums of the parts' manifests."""
    files = []
    for shard, part in enumerate(parts):
        data, path = seal(part), f"{ATTEMPT}/{shard:05}.json"
        store.publish(f"{manifest.name}/{path}", data)
        files.append(File(path=path, bytes=len(data), checksum=xxh3_128_hexdigest(data)))
    size = sum(file.bytes for file in files) + sum(part.bytes for part in parts)
    size += manifest.bytes - WHOLE.bytes  # a test may want it wrong
    whole = dataclasses.replace(manifest, parts=tuple(files), bytes=size)
    store.publish(f"{manifest.name}/{MANIFEST}", seal(whole))


CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "version": ({"versions": (21,)}, {}),
    "no versions": ({"versions": ()}, {}),
    "bytes": ({"bytes": 7}, {}),
    "rows": ({"tables": (CheckpointTable(name="t", schema="{}", rows=4),)}, {}),
    "schema": ({"tables": (CheckpointTable(name="t", schema="{1}", rows=3),)}, {}),
    "table that the part lacks": ({}, {"tables": ()}),
    "table that the manifest lacks": ({"tables": ()}, {}),
    "shard": ({}, {"shard": 1}),
    "shards": ({}, {"shards": 2}),
    "attempt": ({"attempt": "f" * 16}, {}),
    "name": ({}, {"name": "b"}),
    "buckets missing": ({}, {"buckets": ((0, 4095),)}),
    "buckets twice": ({}, {"buckets": ((0, 4096), (5, 6))}),
    "no buckets": ({}, {"buckets": ()}),
    "versions descend": ({}, {"copied": 21}),
    "after without a parent": ({}, {"after": 5}),
    "file of another kind": ({}, {"blocks": (), "records": (FILE,)}),
    "file of another shard": (
        {},
        {"blocks": (dataclasses.replace(FILE, path=f"{ATTEMPT}/00001.000000.blocks"),)},
    ),
    "file twice": ({}, {"blocks": (FILE, FILE)}),
    "table twice": ({}, {"tables": (TABLE, TABLE)}),
    "number twice": ({}, {"tables": (TABLE, dataclasses.replace(TABLE, name="u"))}),
    "parent": ({}, {"parent": Parent(name="p", checksum=SUM)}),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_manifests_that_contradict_each_other_are_corrupt(tmp_path: Path, case: str) -> None:
    store = Store(f"file://{tmp_path}")
    whole, part = CONTRADICTIONS[case]
    publish(store, dataclasses.replace(WHOLE, **whole), dataclasses.replace(PART, **part))
    with pytest.raises(Corrupt, match="a/"):
        open_checkpoint(store, "a")


def test_manifests_that_agree_are_read(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    publish(store, WHOLE, PART)
    assert open_checkpoint(store, "a").parts == (PART,)
