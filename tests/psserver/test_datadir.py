"""A shard's data directory: whose it is."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from alone import alone
from stores import Home, make_shard

from psproto.routing import ShardMap, even_map
from psserver import datadir as module
from psserver.config import ConfigError, load
from psserver.datadir import OWNER, DataDirectory, claim, lock, unusable
from psserver.engine import Engine
from psserver.swap import COMMITTED, State
from storage.errors import Corrupt

NOBODY = 65534


class TestClaim:
    def test_a_directory_is_its_shards_from_the_first_start_on(self, tmp_path: Path) -> None:
        for _ in range(2):
            claim(tmp_path, 1, even_map(2))
            assert os.listdir(tmp_path) == [OWNER]

    @pytest.mark.parametrize(("shard", "shards"), [(0, 2), (1, 3), (0, 1)])
    def test_another_shard_or_another_number_of_them_is_refused_with_both_named(
        self, tmp_path: Path, shard: int, shards: int
    ) -> None:
        claim(tmp_path, 1, even_map(2))
        with pytest.raises(ConfigError) as caught:
            claim(tmp_path, shard, even_map(shards))
        assert str(caught.value) == (
            f"data_dir: {tmp_path} belongs to shard 1 of 2 (shard map of epoch 1), but this server"
            f" is shard {shard} of {shards} (shard map of epoch 1); to change the number of shards:"
            " take a checkpoint (psctl checkpoint), start all servers on new directories, then"
            " restore it (psctl restore)"
        )
        claim(tmp_path, 1, even_map(2))

    def test_another_map_of_as_many_shards_is_refused(self, tmp_path: Path) -> None:
        claim(tmp_path, 0, even_map(2))
        moved = ShardMap(2, even_map(2).shards, even_map(2).shard_of_bucket)
        with pytest.raises(ConfigError, match=r"epoch 1\), but this server is .* epoch 2\)"):
            claim(tmp_path, 0, moved)

    def test_a_damaged_note_is_refused_by_name(self, tmp_path: Path) -> None:
        claim(tmp_path, 0, even_map(2))
        path = tmp_path / OWNER
        data = path.read_bytes()
        for at in range(0, len(data), 7):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(Corrupt, match=rf"^{path}: "):
                claim(tmp_path, 0, even_map(2))


class TestUnusable:
    """Each fault of a data directory is one line that says what to do."""

    @pytest.mark.parametrize(
        ("number", "text"),
        [
            (errno.EROFS, "Read-only file system; mount it for writing, or choose another"),
            (errno.ENOSPC, "No space left on device; free some space, or choose another"),
            (errno.ENOTDIR, "it is not a directory; choose another"),
            (errno.EIO, "Input/output error; choose another"),
        ],
    )
    def test_the_reason_and_the_remedy_are_named(
        self, tmp_path: Path, number: int, text: str
    ) -> None:
        path = str(tmp_path / "LOCK")
        error = unusable(tmp_path, OSError(number, os.strerror(number), path))
        assert str(error) == f"data_dir: cannot use {path}: {text} data_dir"

    def test_a_file_is_no_directory(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        for directory in (path, path / "below"):
            with pytest.raises(ConfigError, match=r"^data_dir: cannot use .*not a directory"):
                lock(directory)

    @pytest.mark.slow
    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
    @pytest.mark.parametrize("within", ["", "LOCK", "SHARD", "base", "log"])
    @alone  # gRPC of other tests does not survive the fork
    def test_a_directory_of_another_user_names_both_users(
        self, public_path: Path, within: str
    ) -> None:
        data = public_path / "data"
        with Home(data):
            pass
        lock(data).close()
        claim(data, 0, even_map(1))
        for each in (data, *data.rglob("*")):
            os.chown(each, NOBODY, NOBODY)
        target = data / within
        target.chmod(0o000)
        os.chown(target, 0, 0)
        message = as_nobody(lambda: start(data))
        assert re.match(
            rf"data_dir: cannot use {data}.*: Permission denied for user nobody \(uid {NOBODY}\);"
            r" /.* belongs to root \(uid 0\), mode \d+; start the server as its owner, change the"
            r" owner, or choose another data_dir$",
            message,
        )

    def test_a_fault_during_a_restore_does_not_end_the_restore(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only damaged data makes a committed restore fail, and the old state return."""
        state = State.__new__(State)
        monkeypatch.setattr(State, "phase", COMMITTED, raising=False)
        monkeypatch.setattr(module, "settle", lambda _: state)
        monkeypatch.setattr(module, "failed", lambda *_: pytest.fail("ended"))

        def unreadable(*_: object) -> None:
            raise PermissionError(errno.EACCES, "no", str(tmp_path / "log"))

        monkeypatch.setattr(module, "recover", unreadable)
        with pytest.raises(ConfigError, match=r"^data_dir: cannot use .*/log: Permission denied"):
            start(tmp_path)


def start(directory: Path) -> None:
    """Do what a server does with its data directory."""
    with lock(directory):
        made = DataDirectory(directory, load([]), Engine(), make_shard, lambda: None)
        made.open()
        made.close()


def as_nobody(call: Callable[[], None]) -> str:
    """Return the message of the ConfigError that ``call`` raises in a process of another user."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            call()
            os.write(write, b"no error")
        except ConfigError as error:
            os.write(write, str(error).encode())
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        message = file.read()
    os.waitpid(pid, 0)
    return message
