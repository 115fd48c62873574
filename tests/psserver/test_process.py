"""One shard as a process: signals and restarts."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from alone import alone
from servers import free_ports

from psserver import process as module
from psserver.config import ConfigError, load
from storage.errors import OutOfMemory


class TestRestart:
    """A server that is to start anew becomes the same command again."""

    @pytest.mark.parametrize(("number", "again"), [(None, True), (signal.SIGTERM, False)])
    def test_a_signal_on_the_way_ends_it_for_good(
        self, monkeypatch: pytest.MonkeyPatch, number: signal.Signals | None, again: bool
    ) -> None:
        class Restarting:
            def __init__(self, _: object, restart: Callable[[], None]) -> None:
                self._restart = restart

            async def listen(self) -> None:
                pass

            async def open(self) -> None:
                self._restart()

            async def close(self) -> None:
                if number is not None:
                    signal.raise_signal(number)
                    await asyncio.sleep(0.01)  # the loop hears of it

        monkeypatch.setattr(module, "Server", Restarting)
        monkeypatch.setattr(module, "warm", lambda: None)
        assert asyncio.run(module._serve(load([]))) is again


class TestStart:
    """A signal before the shard is ready ends the process, however long the recovery takes."""

    def test_a_signal_during_recovery_is_not_kept_waiting(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Recovering:
            def __init__(self, *_: object) -> None:
                pass

            async def listen(self) -> None:
                asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGTERM)

            async def open(self) -> None:
                await asyncio.sleep(3600)

            async def abandon(self) -> None:
                pass

        monkeypatch.setattr(module, "Server", Recovering)
        monkeypatch.setattr(module, "warm", lambda: None)
        assert asyncio.run(module._serve(load([]))) is False


class TestMemory:
    """A server reports how the memory limit is divided, and what does not fit into it."""

    @pytest.mark.parametrize(("memory", "warned"), [(1 << 30, False), (1 << 50, True)])
    def test_the_parts_are_logged_and_an_excess_is_a_warning(
        self, capsys: pytest.CaptureFixture[str], memory: int, warned: bool
    ) -> None:
        module.report_memory(load(["--memory-bytes", str(memory)]))
        text = capsys.readouterr().out
        for part in ("limit=", "base=", "max_inflight=", "transport=", "tables="):
            assert part in text
        assert ("memory limit may be exceeded" in text) is warned

    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "size"), [("-v", 12 << 20), ("-d", 3 << 20)])
    def test_a_server_starts_below_a_ulimit(self, tmp_path: Path, kind: str, size: int) -> None:
        flags = f"--port {free_ports(1)} --metrics-port 0 --data-dir {tmp_path}"
        command = f"ulimit {kind} {size}; exec {sys.executable} -m psserver serve {flags}"
        process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(20) == 0
        process.stdout.close()

    def test_too_little_address_space_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise OutOfMemory(1, 0, 2)

        monkeypatch.setattr(module, "warm", fail)
        with pytest.raises(ConfigError, match=r"^not enough address space to start"):
            module._warm()


class TestStop:
    """A stop ends, even if a file system never answers."""

    def test_what_does_not_close_is_left_behind(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Stuck:
            def __init__(self, *_: object) -> None:
                pass

            async def listen(self) -> None:
                pass

            async def open(self) -> None:  # the server is ready right after it
                asyncio.get_running_loop().call_later(1, signal.raise_signal, signal.SIGTERM)

            async def close(self) -> None:
                await asyncio.sleep(3600)

        monkeypatch.setattr(module, "Server", Stuck)
        monkeypatch.setattr(module, "warm", lambda: None)
        monkeypatch.setattr(module, "CLOSE_SECONDS", 0.05)
        assert asyncio.run(module._serve(load(["--drain-seconds", "0"]))) is False
        assert "stopped without closing" in capsys.readouterr().out


@pytest.mark.slow
class TestExit:
    """Exit statuses of the command."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_is_status_0_with_a_worker_that_hangs(
        self, tmp_path: Path, number: signal.Signals
    ) -> None:
        os.mkfifo(tmp_path / "pipe")
        flags = ["--port", str(free_ports(1)), "--metrics-port", "0", "--data-dir", str(tmp_path)]
        code = (
            "import threading, sys; from psserver import server, cli;"
            "whole = server.Server.open;"
            f"hang = lambda: open({str(tmp_path / 'pipe')!r});"
            "server.Server.open = lambda self:"
            " (threading.Thread(target=hang).start(), whole(self))[1];"
            f"sys.argv = ['psserver', 'serve', *{flags!r}]; cli.main()"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(20) == 0
        process.stdout.close()


@alone
def test_what_is_there_from_the_start_costs_no_collection() -> None:
    module._warm()
    assert gc.get_freeze_count() > 50_000
    assert len(gc.get_objects()) < 5_000
