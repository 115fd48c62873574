"""The handshake that explains why a server is not reached must not delay the next try."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest

from psclient.handshake import SECONDS, diagnose

SILENT = "127.0.0.1:9"


def test_a_machine_that_does_not_answer_costs_a_fraction_of_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client waits for such an address once per second while it reconnects."""
    waited: list[float] = []

    def silent(_: Any, timeout: float) -> socket.socket:
        waited.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    assert diagnose(SILENT, None, "localhost") is None
    assert sum(waited) <= 0.5


def test_a_server_that_accepts_and_says_nothing_has_the_time_of_a_handshake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("psclient.handshake.SECONDS", SECONDS / 10)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        assert diagnose(f"127.0.0.1:{server.getsockname()[1]}", None, "localhost") is None
        assert time.monotonic() - began >= SECONDS / 10
