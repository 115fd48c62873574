"""One shard as a process: signals and restarts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import pytest

from psserver import process as module
from psserver.config import load


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
