"""`psserver doctor`: every finding, made to happen."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from authority import HOUR, Authority, Mount, dates, expired
from fault import disks
from servers import environment

from psproto import routing
from psproto.kernelcache import KernelCache
from psserver import datadir, doctor
from psserver.config import load
from psserver.doctor import Finding, examine

GIB = 1 << 30
ROOT = Path(__file__).parents[2]
ABSENT = "+tbm"  # a feature that no processor of the last ten years has


def found(check: str, *flags: str) -> Finding:
    """Return the only finding of a check, as a running server would report it."""
    [one] = [each for each in examine(load(flags), running=True) if each.check == check]
    return one


def command(*flags: str, **variables: str) -> tuple[int, list[dict[str, Any]]]:
    """Run `psserver doctor --json`; return its exit status and its list."""
    done = subprocess.run(
        [sys.executable, "-m", "psserver", "doctor", "--json", *flags],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def states(listed: list[dict[str, Any]]) -> dict[str, str]:
    return {each["check"]: each["state"] for each in listed}


def test_a_good_machine_has_no_errors(tmp_path: Path) -> None:
    warm = [sys.executable, "-m", "psserver", "warm"]
    subprocess.run(warm, env=environment(), check=True)
    status, listed = command("--data-dir", str(tmp_path / "new"))
    assert status == 0
    assert set(states(listed)) == {
        *("release", "number", "memory", "open files", "processor", "kernels"),
        *("disk", "fsync", "data directory", "TLS", "clock"),
    }
    assert states(listed)["kernels"] == "ok"
    assert all(bool(each["advice"]) is (each["state"] != "ok") for each in listed)
    assert not (tmp_path / "new").exists()


def test_as_text() -> None:
    words = [sys.executable, "-m", "psserver", "doctor", "--shard", "1"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "\nerror   number          shard 1 of 1\n" in done.stdout
    assert "What to do: this server has number 1, but the cluster has 1 shards" in done.stdout


def test_a_setting_that_is_wrong() -> None:
    status, listed = command("--port", "0")
    assert (status, states(listed)) == (1, {"settings": "error"})
    assert "port: " in listed[0]["found"]


def test_a_processor_that_cannot_run_the_kernels() -> None:
    status, listed = command(NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES=ABSENT)
    assert (status, states(listed)["processor"]) == (1, "error")
    assert "does not have tbm" in next(e for e in listed if e["check"] == "processor")["found"]
    assert "kernels" not in states(listed)


@pytest.mark.parametrize("name", ["x86-64", "nehalem"])
def test_a_processor_that_may_not_be_portable_and_an_empty_cache(name: str) -> None:
    named = {"NUMBA_CPU_NAME": name} | ({"NUMBA_CPU_FEATURES": ""} if name == "nehalem" else {})
    status, listed = command(**named)
    assert (status, states(listed)["processor"], states(listed)["kernels"]) == (
        0,
        "warning",
        "warning",
    )
    advice = next(each["advice"] for each in listed if each["check"] == "kernels")
    assert "run psserver warm" in advice


def test_memory_that_does_not_suffice() -> None:
    assert found("memory").state == "ok"
    one = found("memory", "--host-bytes", str(1 << 50))
    assert one.state == "error"
    assert "limit " in one.found
    assert "lower host_bytes" in one.advice


def test_a_number_beyond_the_shards() -> None:
    assert found("number", "--shard", "2", "--shards", "3").state == "ok"
    assert found("number", "--shard", "3", "--shards", "3").state == "error"


def test_too_few_open_files() -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert found("open files", "--max-connections", "10").state == "ok"
    one = found("open files", "--max-connections", str(limit))
    assert one.state == "warning"
    assert "raise ulimit -n" in one.advice


def test_a_server_that_compiled_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelCache, "compiled", 0)
    assert found("kernels").state == "ok"
    monkeypatch.setattr(KernelCache, "compiled", 3)
    assert (found("kernels").state, found("kernels").advice) == ("warning", doctor.WARM)


class TestDataDirectory:
    def test_none(self) -> None:
        assert found("data directory").state == "warning"

    def test_a_file_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        one = found("data directory", "--data-dir", str(tmp_path / "file"))
        assert one.state == "error"
        assert "not a directory" in one.found

    def test_one_of_another_shard(self, tmp_path: Path) -> None:
        datadir.claim(tmp_path, 1, routing.even_map(3))
        flags = ["--data-dir", str(tmp_path), "--shards", "3", "--shard"]
        assert found("data directory", *flags, "1").state == "ok"
        one = found("data directory", *flags, "2")
        assert one.state == "error"
        assert "belongs to shard 1 of 3" in one.found
        assert os.listdir(tmp_path) == [datadir.OWNER]

    def test_one_that_is_damaged(self, tmp_path: Path) -> None:
        (tmp_path / datadir.OWNER).write_bytes(b"x")
        assert found("data directory", "--data-dir", str(tmp_path)).state == "error"

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system read-only")
    def test_one_that_cannot_be_written(self) -> None:
        with disks.small(4) as disk:
            disks.command("mount", "-o", "remount,ro", str(disk))
            one = found("data directory", "--data-dir", str(disk))
        assert one.state == "error"
        assert "mount it for writing" in one.found


class TestDisk:
    @pytest.mark.parametrize(
        ("free", "disk_bytes", "state"),
        [(0.9, 0, "ok"), (0.05, 0, "warning"), (0.9, 100 * GIB, "warning"), (0.001, 0, "error")],
    )
    def test_space(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        free: float,
        disk_bytes: int,
        state: str,
    ) -> None:
        blocks = 100 * GIB // 4096
        fields = (4096, 4096, blocks, blocks, int(free * blocks), 10**6, 10**6, 10**6, 0, 255)
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
        flags = ["--data-dir", str(tmp_path), "--disk-bytes", str(disk_bytes)]
        one = found("disk", *flags)
        assert (one.state, bool(one.advice)) == (state, state != "ok")

    def test_one_that_is_full(self) -> None:
        with disks.small(4) as disk:
            (disk / "all").write_bytes(bytes((4 << 20) - 8192))
            one = found("disk", "--data-dir", str(disk))
            assert (one.state, "DISK_FULL" in one.advice) == ("error", True)
            (disk / "rest").write_bytes(bytes(8192))
            one = found("data directory", "--data-dir", str(disk))
            assert (one.state, "No space left" in one.found) == ("error", True)

    @pytest.mark.parametrize(
        ("seconds", "state"), [(0.0, "ok"), (0.06, "warning"), (1.01, "error")]
    )
    def test_a_sync(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, state: str
    ) -> None:
        monkeypatch.setattr(os, "fdatasync", lambda _: time.sleep(seconds))
        start = time.monotonic()
        assert found("fsync", "--data-dir", str(tmp_path)).state == state
        assert time.monotonic() - start < 5  # psctl doctor waits 10 s


def test_a_name_that_is_gone_or_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("name", "--advertise", "localhost:7000").state == "ok"
    one = found("name", "--advertise", "no.such.host.example:7000")
    assert (one.state, "cannot be looked up" in one.found) == ("error", True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(0.6))
    assert found("name", "--advertise", "localhost:7000").state == "warning"


def test_a_clock_that_is_not_synchronized() -> None:
    assert doctor._clock(lambda: 0).state == "ok"
    assert doctor._clock(lambda: doctor.TIME_ERROR).state == "warning"
    assert 0 <= doctor._adjtimex() <= doctor.TIME_ERROR


def test_certificates_that_are_missing_wrong_or_expire_soon(tmp_path: Path) -> None:
    ca, mount = Authority(), Mount(tmp_path / "server")
    assert found("TLS").state == "ok"
    assert found("TLS", "--host", "0.0.0.0", "--plaintext").state == "warning"  # noqa: S104
    one = found("TLS", *mount.flags)
    assert (one.state, "tls_certificate: cannot read" in one.found) == ("error", True)
    mount.put(ca.pem, ca.server("ps.test", **dates(-HOUR, 360 * HOUR)))
    one = found("TLS", *mount.flags)
    assert (one.state, one.found) == (
        "ok",
        "the certificate is for ps.test, and valid for 15.0 days",
    )
    mount.put(ca.pem, ca.server(**dates(-HOUR, 13 * 24 * HOUR)))
    assert found("TLS", *mount.flags).state == "warning"
    mount.put(ca.pem, ca.server(**expired()))
    assert found("TLS", *mount.flags).state == "error"
