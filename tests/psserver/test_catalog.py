"""Checkpoints listed and verified, whatever lies in their place and whether it answers or not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from homes import Homes
from stores import schema

from psproto import ps_pb2 as pb
from psserver.errors import CheckpointUnfit
from psserver.stored import number_in, read_stored
from storage.errors import Corrupt, StorageError, StoreFailed
from storage.manifest import MANIFEST, Manifest
from storage.part_reader import verify_part
from storage.part_writer import PartWriter
from storage.sealed import fields_of, seal_fields, unseal
from storage.store import Store


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Homes]:
    """Two shards with the complete checkpoint "good"."""
    with Homes(tmp_path / "shards", 2, f"file://{tmp_path}/checkpoints") as cluster:
        cluster.create(schema())
        cluster.push(range(100))
        cluster.checkpoint("good")
        yield cluster


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def listed(cluster: Homes) -> dict[str, str]:
    """The problems of all checkpoints, by name."""
    found = cluster.nodes[0].checkpoints.catalog.listed(pb.ListCheckpointsRequest())
    return {each.name: each.problem for each in found.checkpoints}


def manifest(place: Path) -> dict[str, Any]:
    path = place / "good" / MANIFEST
    return fields_of(unseal(Manifest, path.read_bytes(), str(path)))


def sparse(path: Path, _: dict[str, Any]) -> None:
    with path.open("wb") as file:
        file.truncate(300 << 30)


BAD: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "fifo": lambda path, _: os.mkfifo(path),
    "directory": lambda path, _: path.mkdir(),
    "link": lambda path, _: path.symlink_to("/etc/passwd"),
    "empty": lambda path, _: path.write_bytes(b""),
    "noise": lambda path, _: path.write_bytes(os.urandom(1000)),
    "sparse": sparse,
    "types": lambda path, content: path.write_bytes(seal_fields(content | {"bytes": "many"})),
    "tables": lambda path, content: path.write_bytes(seal_fields(content | {"tables": 7})),
    "other": lambda path, content: path.write_bytes(seal_fields(content)),
    "format": lambda path, content: path.write_bytes(seal_fields(content | {"format": 9})),
}


def test_a_damaged_checkpoint_is_listed_as_such_and_hides_no_other(
    cluster: Homes, place: Path
) -> None:
    content = manifest(place)
    for name, damage in BAD.items():
        (place / name).mkdir()
        damage(place / name / MANIFEST, content)
    (place / "outside").symlink_to("/etc")
    os.mkfifo(place / "fifo-instead-of-a-directory")
    started = time.monotonic()
    problems = listed(cluster)
    assert time.monotonic() - started < 5
    assert problems.pop("good") == ""
    assert problems.keys() == {*BAD, "outside"}
    for name, problem in problems.items():
        assert name in problem
        assert "root:" not in problem  # nothing of the file that a link leads to
        with pytest.raises(StorageError):
            cluster.verify(name)


def test_a_schema_that_nobody_can_read_is_named(cluster: Homes, place: Path) -> None:
    for text in ("{", "[]", "7", '{"name": "t", "dim": -1}', '{"name": "t", "no": 1}'):
        with pytest.raises(CheckpointUnfit, match="schema of table 't'"):
            read_schema_as(text)
    with pytest.raises(Corrupt, match="table 't', but its schema has the name 'u'"):
        read_schema_as('{"name": "u", "dim": 2}')


def read_schema_as(text: str) -> None:
    read_stored("good", "t", text)


def test_verify_compares_the_rows_with_the_manifest(cluster: Homes, place: Path) -> None:
    """Files, sizes and checksums are right, and the number of rows is not that of the parts."""
    path = place / "good" / MANIFEST
    content = manifest(place)
    content["tables"][0]["rows"] += 1
    path.write_bytes(seal_fields(content))
    with pytest.raises(Corrupt, match="tables, schemas or numbers of rows differ"):
        cluster.verify("good")


def test_a_checkpoint_can_be_taken_while_the_clock_is_before_1970(tmp_path: Path) -> None:
    url, before = f"file://{tmp_path}/checkpoints", lambda: -86400.5
    with Homes(tmp_path / "shards", 1, url, now=before) as cluster:
        cluster.nodes[0].checkpoints._now = before
        cluster.nodes[0].checkpoints.completion._now = before
        cluster.create(schema())
        cluster.push(range(5))
        assert cluster.checkpoint("old").time_us == -86_400_500_000
        assert cluster.restore("old", replace=True) == 5


# ---- a store that does not answer


class Hanging:
    """Makes every read of a store wait until it is let go."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        real = store._read

        def read(path: str, most: int) -> bytes:
            self.begun.set()
            self.go.wait()
            return real(path, most)

        monkeypatch.setattr(store, "_read", read)


@pytest.fixture
def hanging(cluster: Homes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    hanging = Hanging(cluster.nodes[0].checkpoints.catalog.store, monkeypatch)
    yield hanging
    hanging.go.set()


def test_a_stop_ends_all_that_waits_for_the_store(cluster: Homes, hanging: Hanging) -> None:
    work = cluster.nodes[0].checkpoints
    calls: list[Callable[[], Any]] = [
        lambda: work.catalog.listed(pb.ListCheckpointsRequest(name="good")),
        lambda: work.catalog.verify(pb.VerifyCheckpointRequest(name="good"), work.work.progress()),
        lambda: next(work.rows.read_rows(pb.ReadRowsRequest(table="t", checkpoint="good"))),
        lambda: cluster.nodes[0].prepare("good", "a" * 16, replace=True),
        lambda: cluster.nodes[0].checkpoints.write(
            pb.WriteCheckpointRequest(name="b", attempt="a" * 16, parent="good"),
            work.work.progress(),
        ),
    ]
    errors: list[Exception] = []

    def run(call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[call], daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    hanging.begun.wait()
    started = time.monotonic()
    work.work.stop()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - started < 5
    assert len(errors) == len(calls)
    assert {type(error).__name__ for error in errors} <= {"StoreFailed", "CheckpointBusy"}
    assert any(isinstance(error, StoreFailed) for error in errors)


def test_every_operation_of_a_store_has_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By reflection: each public method that takes a path, and each of a file being written."""
    store = Store(f"file://{tmp_path}/checkpoints")
    store.publish("a/x", b"")
    output = store.create("a/y")
    seen: list[str] = []
    real = store._deadlines.call

    def call(where: str, *args: Any) -> Any:
        seen.append(where)
        return real(where, *args)

    monkeypatch.setattr(store._deadlines, "call", call)
    arguments: dict[str, tuple[Any, ...]] = {
        "create": ("a/z",),
        "publish": ("a/p", b""),
        "sync": ("a/x",),
        "read": ("a/x", 10),
        "exists": ("a/x",),
        "directories": ("a",),
        "remove": ("a/x",),
    }
    names = {name for name, value in vars(Store).items() if callable(value) and name[0] != "_"}
    assert names - {"where", "stop"} == set(arguments)
    for name, given in arguments.items():
        before = len(seen)
        made = getattr(store, name)(*given)
        if name == "create":
            made.close()
        assert len(seen) > before, name
    for name, given in {"write": ([bytes(1 << 20)],), "close": ()}.items():
        before = len(seen)
        getattr(output, name)(*given)
        assert len(seen) > before, name


def test_a_part_that_lacks_a_table_is_damage_and_no_hang(cluster: Homes) -> None:
    checkpoint = cluster.nodes[0].checkpoints.catalog.open("good")
    with pytest.raises(Corrupt, match="part 0 does not list the table 'no'"):
        number_in(checkpoint, 0, "no")
    store = cluster.nodes[0].checkpoints.catalog.store
    assert sum(len(each.keys) for each in verify_part(store, checkpoint, 0, lambda _: None)) > 0


def test_sessions_that_cannot_be_read_are_found_before_a_restore_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PartWriter.sessions
    monkeypatch.setattr(PartWriter, "sessions", lambda self, data: real(self, data[:-8]))
    with Homes(tmp_path / "shards", 1, f"file://{tmp_path}/checkpoints") as cluster:
        cluster.create(schema())
        cluster.push(range(5), client=7, incarnation=1, sequence=1)
        cluster.checkpoint("bad")
        before = cluster.rows()
        for use in (
            lambda: cluster.verify("bad"),
            lambda: cluster.nodes[0].prepare("bad", "a" * 16, replace=True),
        ):
            with pytest.raises(Corrupt, match=r"bad/.*: cannot read the client sessions"):
                use()
        assert cluster.rows() == before
