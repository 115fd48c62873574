"""A data directory with special files, or on a file system that hangs: an error, never a hang."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import free_ports
from stores import Home, make_shard, push, schema

from psproto.routing import even_map
from psserver.config import ConfigError, load
from psserver.datadir import DataDirectory, claim, lock
from psserver.engine import Engine
from psserver.flusher import Flusher
from psserver.server import Server
from storage.disk import replace
from storage.errors import Corrupt

SECONDS = 20.0  # in which a start must end


def start(directory: Path) -> None:
    """Do what a server does with its data directory."""
    with lock(directory):
        made = DataDirectory(directory, load([]), Engine(), make_shard, lambda: None)
        made.open()
        made.close()


def in_time(call: Callable[[], Any]) -> Exception | None:
    """Return what a call raises; fail if it does not end."""
    outcome: list[Exception | None] = []

    def work() -> None:
        try:
            call()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert outcome, "it hangs"
    return outcome[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with some of everything."""
    directory = tmp_path_factory.mktemp("stopped") / "data"
    with lock(directory):
        claim(directory, 0, even_map(1))
    with Home(directory, segment_bytes=4096, keep=(1 << 20, 0.0)) as home:
        home.shard.create_table(schema())
        for key in range(200):
            home.shard.exchange([push([key])], [])
        home.flush()
        for key in range(200):
            home.shard.exchange([push([key])], [])
    return directory


FILES = [
    "LOCK",
    "SHARD",
    "log/SYNCED",
    "log/first",
    "log/last",
    "base/data.mdb",
    "base/lock.mdb",
    "base/spare",
]
SPECIAL: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
}


def path_of(directory: Path, name: str) -> Path:
    if name in ("log/first", "log/last"):
        segments = sorted((directory / "log").glob("*.log"))
        return segments[0 if name == "log/first" else -1]
    return directory / name


def test_the_list_of_files_is_complete(stopped: Path) -> None:
    found = {str(p.relative_to(stopped)) for p in stopped.rglob("*") if p.is_file()}
    segments = {each for each in found if re.fullmatch(r"log/\d{20}\.log", each)}
    assert found - segments == set(FILES) - {"log/first", "log/last"}
    assert len(segments) > 2


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", FILES)
def test_a_special_file_is_named_at_the_start(
    stopped: Path, tmp_path: Path, name: str, kind: str
) -> None:
    directory = tmp_path / "data"
    shutil.copytree(stopped, directory)
    path = path_of(directory, name)
    path.unlink()
    SPECIAL[kind](path)
    error = in_time(lambda: start(directory))
    assert isinstance(error, ConfigError)
    assert str(error) == f"data_dir: DATA_LOSS: {path}: is {kind}, not a regular file"


def test_a_fifo_in_the_place_of_the_next_contents_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "STATE.new")
    assert in_time(lambda: replace(tmp_path / "STATE", b"contents")) is None
    assert (tmp_path / "STATE").read_bytes() == b"contents"


def test_a_segment_that_becomes_a_fifo_is_damage_for_who_reads_it(tmp_path: Path) -> None:
    with Home(tmp_path / "data", segment_bytes=4096) as home:
        home.shard.create_table(schema())
        for key in range(200):
            home.shard.exchange([push([key])], [])
        home.log.sync(home.log.last)
        path = path_of(tmp_path / "data", "log/first")
        path.unlink()
        os.mkfifo(path)
        error = in_time(lambda: home.log.read(0))
        assert isinstance(error, Corrupt)


def test_a_stop_does_not_wait_for_a_file_system_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends after a deadline, which works only if the loop is not blocked."""
    answers = threading.Event()
    monkeypatch.setattr(Flusher, "close", lambda _: answers.wait())
    flags = ["--data-dir", str(tmp_path), "--metrics-port", "0", "--port", str(free_ports(1))]

    async def run() -> float:
        server = Server(load(flags), lambda: None)
        await server.listen()
        await server.open()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(server.close(), 1.0)
        took = time.monotonic() - began
        answers.set()
        return took

    assert asyncio.run(run()) < 5
