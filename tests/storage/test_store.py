"""Files under a URL: complete or not there, inside the prefix, and never waited for for ever."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from alone import alone

from storage import deadline
from storage.deadline import MAX_THREADS, Deadlines
from storage.errors import Corrupt, StoreFailed
from storage.store import BUFFER_BYTES, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/checkpoints")


def test_publish_creates_a_file_once(store: Store) -> None:
    store.publish("a/x", b"one")
    with pytest.raises(FileExistsError):
        store.publish("a/x", b"two")
    assert store.read("a/x", 100) == b"one"
    assert store.read("a/x", 3) == b"one"


def test_nothing_is_left_of_a_publication_that_failed(store: Store, tmp_path: Path) -> None:
    store.publish("a/x", b"one")
    with pytest.raises(FileExistsError):
        store.publish("a/x", b"two")
    assert [path.name for path in (tmp_path / "checkpoints" / "a").iterdir()] == ["x"]


def test_directories_are_listed_and_removed(store: Store) -> None:
    assert store.directories() == []
    store.publish("b/x", b"")
    store.publish("a/y/z", b"")
    store.publish("file", b"")
    assert store.directories() == ["a", "b"]
    assert store.directories("a") == ["y"]
    store.remove("a/y")
    store.remove("a/y")
    assert store.directories("a") == []


def test_a_scheme_that_nobody_knows_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        Store("nosuch://bucket/x")


def test_a_store_that_refuses_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreFailed, match="file/: not a directory"):
        Store(f"file://{tmp_path}/file").publish("a/x", b"")


# ---- what is not a regular file


@pytest.fixture
def place(store: Store, tmp_path: Path) -> Path:
    """The directory of the store, with a file "a/x" and an outsider "secret" next to it."""
    store.publish("a/x", b"one")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"secret")
    return tmp_path / "checkpoints"


def test_a_fifo_is_refused_and_does_not_block(store: Store, place: Path) -> None:
    os.mkfifo(place / "a" / "fifo")
    started = time.monotonic()
    for call in (
        lambda: store.read("a/fifo", 100),
        lambda: store.create("a/fifo"),
    ):
        with pytest.raises((Corrupt, StoreFailed), match="a/fifo"):
            call()
    with pytest.raises(FileExistsError):
        store.publish("a/fifo", b"")
    assert store.exists("a/fifo")
    assert store.directories() == ["a"]
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "use",
    [
        lambda store, path: store.read(path, 100),
        lambda store, path: store.create(path),
    ],
)
@pytest.mark.parametrize("path", ["a/link", "linked/x"])
def test_a_symbolic_link_is_not_followed(
    store: Store, place: Path, path: str, use: Callable[[Store, str], object]
) -> None:
    (place / "a" / "link").symlink_to(place.parent / "outside" / "x")
    (place / "linked").symlink_to(place.parent / "outside")
    with pytest.raises(Corrupt, match="symbolic link") as caught:
        use(store, path)
    assert "secret" not in str(caught.value)
    assert (place.parent / "outside" / "x").read_bytes() == b"secret"


def test_removing_a_link_leaves_what_it_links_to(store: Store, place: Path) -> None:
    (place / "a" / "link").symlink_to(place.parent / "outside")
    (place / "linked").symlink_to(place.parent / "outside")
    store.remove("a")
    store.remove("linked")
    assert store.directories() == []
    assert (place.parent / "outside" / "x").read_bytes() == b"secret"


def test_a_large_file_is_refused_before_it_is_read(store: Store, place: Path) -> None:
    with (place / "a" / "sparse").open("wb") as file:
        file.truncate(300 << 30)
    started = time.monotonic()
    with pytest.raises(Corrupt, match=f"at most 1000 bytes, got {300 << 30} bytes"):
        store.read("a/sparse", 1000)
    assert time.monotonic() - started < 10


def test_what_is_written_in_pieces_is_read_back(store: Store) -> None:
    output = store.create("a/b/c")
    pieces = [b"x" * size for size in (1, 0, 1000, BUFFER_BYTES - 5, 7, 2 * BUFFER_BYTES, 3)]
    for piece in pieces:
        buffer = bytearray(piece)
        output.write([buffer[:1], buffer[1:]])
        buffer[:] = b"-" * len(buffer)  # the caller may use it again
    output.close()
    assert store.read("a/b/c", 1 << 30) == b"".join(pieces)
    assert output.bytes == sum(map(len, pieces))


# ---- deadlines


def test_a_call_that_never_returns_ends_at_its_deadline() -> None:
    never = threading.Event()
    deadlines = Deadlines(0.05)
    with pytest.raises(StoreFailed, match=r"place: no answer within 0\.05 s"):
        deadlines.call("place", never.wait)
    assert deadlines.call("place", lambda: 5) == 5
    never.set()


def test_a_stop_ends_the_calls_that_wait_and_refuses_others() -> None:
    never, begun = threading.Event(), threading.Event()
    deadlines = Deadlines(60.0)
    errors: list[Exception] = []

    def work() -> None:
        try:
            deadlines.call("place", lambda: (begun.set(), never.wait()))
        except StoreFailed as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    deadlines.stop()
    thread.join(5)
    assert "the server is stopping" in str(errors)
    with pytest.raises(StoreFailed, match="stopping"):
        deadlines.call("place", lambda: 5)
    never.set()


def test_calls_that_never_return_are_limited_in_number() -> None:
    never = threading.Event()
    deadlines = Deadlines(0.001)
    for _ in range(MAX_THREADS):
        with pytest.raises(StoreFailed, match="no answer within"):
            deadlines.call("place", never.wait)
    with pytest.raises(StoreFailed, match="earlier file operations"):
        deadlines.call("place", lambda: 5)
    never.set()


def test_a_result_that_comes_at_the_deadline_is_returned_or_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The deadline passes after the thread has the result, and before the caller can have it."""
    undone, made, passed = threading.Event(), threading.Event(), threading.Event()

    class Late(Future[int]):
        def done(self) -> bool:  # asked by whoever has a result
            answer = super().done()
            made.set()
            passed.wait(5)
            return answer

        def set_result(self, result: int) -> None:
            made.set()
            passed.wait(5)
            super().set_result(result)

        def set_exception(self, error: BaseException | None) -> None:
            super().set_exception(error)
            passed.set()

    def wait(futures: object, seconds: float) -> None:
        assert made.wait(5)

    monkeypatch.setattr(deadline, "Future", Late)
    monkeypatch.setattr(deadline, "wait", wait)
    with pytest.raises(StoreFailed):
        Deadlines(0.01).call("place", lambda: 7, lambda _: undone.set())
    assert undone.wait(5)


def test_a_result_that_comes_too_late_is_undone() -> None:
    late, undone = threading.Event(), threading.Event()
    results: list[int] = []

    def undo(result: int) -> None:
        results.append(result)
        undone.set()

    with pytest.raises(StoreFailed):
        Deadlines(0.01).call("place", lambda: late.wait() and 7, undo)
    late.set()
    assert undone.wait(5)
    assert results == [7]


@alone
def test_threads_are_used_again() -> None:
    deadlines, before = Deadlines(5.0), threading.active_count()
    assert [deadlines.call("place", lambda i=i: i) for i in range(100)] == list(range(100))
    assert threading.active_count() <= before + 2


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://user:s3cret@host/a", "memory://user:***@host/a/b"),
        ("memory://:s3cret@host/a/", "memory://:***@host/a/b"),
        ("memory://user:s3c@ret@host/a", "memory://user:***@host/a/b"),
        ("memory://container@account/a", "memory://container@account/a/b"),
        ("memory://host/a:b@c", "memory://host/a:b@c/b"),
    ],
)
def test_no_message_has_the_password_of_a_url(url: str, shown: str) -> None:
    assert Store(url).where("b") == shown
    with pytest.raises(ValueError, match=r"^unknown://user:\*\*\*@host/a: "):
        Store("unknown://user:s3cret@host/a")
