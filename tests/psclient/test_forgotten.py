"""Clients that nobody closes: their threads end with them."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from alone import alone
from servers import Cluster, eventually
from tables import DIM, summing

from psclient import Client
from psclient.aio import AsyncClient


@pytest.fixture
def addresses(cluster2: Cluster) -> list[str]:
    return cluster2.addresses


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["stream", "unary"])
@alone
def test_clients_that_are_forgotten_leave_no_threads(
    addresses: list[str], name: str, transport: Any
) -> None:
    def forget() -> weakref.ref[Client]:
        client = Client(addresses, transport=transport, timeout=60.0)
        table = summing(client, name)
        table.push([1], np.ones((1, DIM), np.float32))
        table.start_pull([1]).result()
        return weakref.ref(client)

    forget()
    gc.collect()
    time.sleep(0.5)
    before = threading.active_count()
    clients = [forget() for _ in range(30)]
    assert not any(client() for client in clients)  # without a collection
    eventually(lambda: threading.active_count() <= before)


@pytest.mark.slow
@alone
def test_asyncio_clients_that_are_forgotten_leave_no_threads(addresses: list[str]) -> None:
    def forget() -> None:
        client = AsyncClient(addresses, timeout=60.0)
        asyncio.run(client.list_tables())

    forget()
    gc.collect()
    time.sleep(0.5)
    before = threading.active_count()
    for _ in range(5):
        forget()
    gc.collect()
    eventually(lambda: threading.active_count() <= before)
