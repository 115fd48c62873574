"""The files of a checkpoint: what is read is what was written, or it is said what is wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocks import pack_rows, pack_tombstones

from storage import part_reader, part_writer
from storage.arena import Budget
from storage.checkpoint import open_checkpoint, read_manifest
from storage.errors import Corrupt, StorageError, UnknownCheckpoint, UnknownFormat
from storage.manifest import MANIFEST, CheckpointTable, Manifest, Parent, PartTable
from storage.part_reader import rows_of, verify_part
from storage.part_writer import PartWriter
from storage.records import Cause, Kind, Origin, encode_delete, encode_push
from storage.sealed import seal
from storage.segment import Frame
from storage.store import Store

ATTEMPT = "0123456789abcdef"
WIDTH = 3


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/checkpoints")


def u64(*numbers: int) -> Any:
    return np.array(numbers, np.uint64)


def block(keys: Any, version: int, table: int = 1) -> memoryview:
    """Rows whose numbers are their version."""
    n = len(keys)
    rows = np.full((n, WIDTH), version, np.float32)
    return pack_rows(table, u64(*keys), u64(*[version] * n), np.full(n, -version), u64(*keys), rows)


def dead(keys: Any, version: int, table: int = 1) -> memoryview:
    causes = np.full(len(keys), Cause.REQUEST, np.uint32)
    return pack_tombstones(table, u64(*keys), u64(*[version] * len(keys)), causes)


def pushed(version: int, *keys: int, table: int = 1) -> Frame:
    rows = np.full((len(keys), WIDTH), version, np.float32)
    parts = encode_push(Origin(step=-version), table, u64(*keys), u64(*keys), rows)
    return frame(version, Kind.PUSH, parts)


def deleted(version: int, *keys: int, table: int = 1) -> Frame:
    parts = encode_delete(Origin(), table, Cause.REQUEST, u64(*keys))
    return frame(version, Kind.DELETE, parts)


def frame(version: int, kind: int, parts: Any) -> Frame:
    return Frame(version, kind, memoryview(b"".join(bytes(part) for part in parts)))


def write(
    store: Store,
    name: str,
    blocks: list[Any],
    frames: list[Frame],
    rows: int,
    *,
    base: str | None = None,
    versions: tuple[int, int, int] = (10, 20, 0),  # copied, version, after
    sessions: bytes = b"",
) -> Manifest:
    """A checkpoint of one shard with one table."""
    named = None
    if base is not None:
        named = Parent(name=base, checksum=read_manifest(store, base)[1])
    told: list[int] = []
    writer = PartWriter(store, name, ATTEMPT, 0, told.append)
    for each in blocks:
        writer.block(each)
    writer.frames(frames)
    writer.sessions(sessions)
    part, file = writer.finish(
        attempt=ATTEMPT,
        shard=0,
        shards=1,
        buckets=((0, 4096),),
        lineage="ab" * 16,
        version=versions[1],
        copied=versions[0],
        after=versions[2],
        parent=named,
        tables=(PartTable(number=1, name="t", schema="{}", rows=rows),),
        micros=1,
    )
    assert sum(told) == part.bytes
    manifest = Manifest(
        name=name,
        attempt=ATTEMPT,
        parent=named,
        parts=(file,),
        versions=(versions[1],),
        tables=(CheckpointTable(name="t", schema="{}", rows=rows),),
        bytes=part.bytes + file.bytes,
        micros=2,
    )
    store.publish(f"{name}/{MANIFEST}", seal(manifest))
    return manifest


def read(store: Store, name: str) -> dict[int, int]:
    """By key: the version of its row. Everything else of the row fits it."""
    found: dict[int, int] = {}
    checkpoint = open_checkpoint(store, name)
    for piece in rows_of(store, checkpoint, 0, [1], lambda _: None):
        assert piece.table == 1
        assert np.array_equal(piece.steps, -piece.versions.astype(np.int64))
        assert np.array_equal(piece.frequencies, piece.keys)
        assert np.array_equal(piece.rows, np.repeat(piece.versions[:, None], WIDTH, 1))
        for key, version in zip(piece.keys.tolist(), piece.versions.tolist(), strict=True):
            assert key not in found
            found[key] = version
    return found


# ---- layers


def test_blocks_are_read_back(store: Store) -> None:
    write(store, "a", [block([1, 2], 3), block([4], 5)], [], 3)
    assert read(store, "a") == {1: 3, 2: 3, 4: 5}


def test_records_win_over_blocks_and_the_last_record_over_the_others(store: Store) -> None:
    records = [pushed(11, 1, 5), pushed(12, 1, 2), deleted(13, 5, 9), pushed(14, 9)]
    write(store, "a", [block([1, 2, 3], 4)], records, 4)
    assert read(store, "a") == {1: 12, 2: 12, 3: 4, 9: 14}


def test_rows_and_deletes_of_an_incremental_one_hide_those_of_its_base(store: Store) -> None:
    write(store, "a", [block([1, 2, 3, 4], 4)], [deleted(12, 4), pushed(13, 5)], 4)
    more = [dead([1, 3], 22), block([3], 25)]
    write(store, "b", more, [pushed(31, 2)], 3, base="a", versions=(30, 40, 20))
    write(store, "c", [dead([2], 45)], [], 2, base="b", versions=(50, 50, 40))
    assert read(store, "a") == {1: 4, 2: 4, 3: 4, 5: 13}
    assert read(store, "b") == {2: 31, 3: 25, 5: 13}
    assert read(store, "c") == {3: 25, 5: 13}
    assert [each.manifest.name for each in open_checkpoint(store, "c").chain] == list("cba")


def test_rows_of_other_tables_are_passed_over(store: Store) -> None:
    records = [pushed(11, 1, table=3), deleted(12, 1, table=2)]
    write(store, "a", [block([1], 4), block([2], 4, table=2)], records, 1)
    assert read(store, "a") == {1: 4}


def test_a_checkpoint_that_yields_other_rows_than_were_there_is_corrupt(store: Store) -> None:
    write(store, "a", [block([1, 2], 4)], [], 3)
    with pytest.raises(Corrupt, match="table 't': found 2 rows, but the manifest says 3"):
        read(store, "a")


@pytest.mark.parametrize("count", [1, 1000, 40_000])
def test_large_files_are_cut_and_read_in_order(
    store: Store, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writer, "FILE_BYTES", 1 << 16)
    blocks = [block(range(at, at + 500), 4) for at in range(0, 2 * count, 500)]
    frames = [pushed(11 + i, *range(i, i + 100)) for i in range(count // 100)]
    write(store, "a", blocks, frames, 500 * len(blocks))
    part = open_checkpoint(store, "a").parts[0]
    assert len(part.files) >= part.bytes // (1 << 17)
    found = read(store, "a")
    assert all(found[i] == 11 + min(i, len(frames) - 1) for i in range(len(frames)))


def test_an_empty_checkpoint_is_one(store: Store) -> None:
    write(store, "a", [], [], 0)
    assert read(store, "a") == {}


# ---- damage


@pytest.fixture
def chain(store: Store, tmp_path: Path) -> Path:
    """Two checkpoints, the second of which builds on the first; their directory."""
    write(store, "a", [block([1, 2, 3], 4)], [pushed(13, 5)], 4, sessions=b"sessions")
    more = [dead([1], 22), block([3], 25)]
    write(store, "b", more, [pushed(31, 2)], 3, base="a", versions=(30, 40, 20), sessions=b"s")
    return tmp_path / "checkpoints"


def verify(store: Store) -> None:
    for _ in verify_part(store, open_checkpoint(store, "b"), 0, lambda _: None):
        pass


def every_file(chain: Path) -> list[Path]:
    return sorted(path for path in chain.rglob("*") if path.is_file())


@pytest.mark.slow
def test_every_flipped_bit_of_every_file_is_found(store: Store, chain: Path) -> None:
    verify(store)
    rng = random.Random(1)
    for path in every_file(chain):
        whole = path.read_bytes()
        some = range(len(whole)) if len(whole) < 400 else rng.sample(range(len(whole)), 400)
        for at in some:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises((Corrupt, UnknownFormat), match=path.parent.name):
                verify(store)
        path.write_bytes(whole)
    verify(store)


@pytest.mark.parametrize("change", ["missing", "cut", "empty", "longer"])
def test_a_missing_or_cut_file_is_named(store: Store, chain: Path, change: str) -> None:
    for path in every_file(chain):
        whole = path.read_bytes()
        if change == "missing":
            path.unlink()
        else:
            path.write_bytes({"cut": whole[:-1], "empty": b"", "longer": whole + b"\0"}[change])
        with pytest.raises(StorageError, match=path.name) as caught:
            verify(store)
        gone = change == "missing" and path == chain / "b" / MANIFEST
        assert isinstance(caught.value, UnknownCheckpoint if gone else Corrupt)
        path.write_bytes(whole)


def test_a_base_that_was_taken_again_under_its_name_is_not_the_base(
    store: Store, chain: Path
) -> None:
    (chain / "a" / MANIFEST).unlink()
    store.remove(f"a/{ATTEMPT}")
    write(store, "a", [block([1, 2, 3], 4)], [pushed(13, 6)], 4)
    with pytest.raises(Corrupt, match="its parent 'a' was replaced by a different checkpoint"):
        verify(store)


def test_a_chain_that_is_too_long_is_refused(store: Store, chain: Path) -> None:
    with pytest.raises(Corrupt, match="a chain of at most 64 checkpoints"):
        open_checkpoint(store, "b", depth=1)


def test_a_store_without_local_files_works_alike(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path}")  # one that knows no rename
    assert not store.local
    write(store, "a", [block([1, 2, 3], 4)], [pushed(13, 5)], 4)
    assert read(store, "a") == {1: 4, 2: 4, 3: 4, 5: 13}
    with pytest.raises(FileExistsError):
        store.publish(f"a/{MANIFEST}", b"")
    assert store.directories() == ["a"]
    store.remove("a")
    with pytest.raises(UnknownCheckpoint):
        read(store, "a")


def test_the_keys_of_newer_layers_share_one_budget(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint may have thousands of tables, and address space is limited."""
    budgets: list[Budget] = []
    monkeypatch.setattr(
        part_reader, "Budget", lambda *limits: budgets.append(Budget(*limits)) or budgets[-1]
    )
    count = 200_000
    write(store, "a", [block(range(count), 4)], [], count)
    newer = [block(range(0, count, 2), 25), dead(range(1, count, 4), 26)]
    rows = count - len(range(1, count, 4))
    write(store, "b", newer, [pushed(31, 3 * count)], rows + 1, base="a", versions=(30, 40, 20))
    found = read(store, "b")
    assert len(found) == rows + 1
    assert found[0] == 25
    assert found[3] == 4
    (budget,) = budgets
    assert budget.addresses <= 1 << 40
    assert (budget.held, budget.reserved) == (0, 0)
