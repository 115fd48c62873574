"""The client for asyncio."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster, free_ports
from tables import DIM

from psclient import Client, Table
from psclient.aio import AsyncClient, AsyncTable
from psclient.errors import (
    TableNotFound,
    Unavailable,
)


class TestAsyncio:
    def test_pulls_and_pushes_run_concurrently(self, cluster: Cluster, name: str) -> None:
        async def train() -> np.ndarray:
            async with AsyncClient(cluster.addresses, timeout=60.0) as ps:
                table = await ps.create_table(
                    name, DIM, optimizer="sgd", lr=1.0, initializer="zeros"
                )
                ones = np.ones((50, DIM), np.float32)
                await asyncio.gather(*(table.push(np.arange(50), ones) for _ in range(40)))
                pulls = await asyncio.gather(*(table.pull([n]) for n in range(50)))
                assert (await table.describe()).rows == 50
                assert await table.prefetch(np.arange(60)) is None
                assert await ps.prefetch({name: np.arange(60)}) is None
                assert name in [info.name for info in await ps.list_tables()]
                rows = await (await ps.table(name)).pull_rows([0])
                assert rows.frequencies.tolist() == [40]
                await ps.drop_table(name)
                with pytest.raises(TableNotFound):
                    await ps.describe_table(name)
                return np.concatenate(pulls)

        assert_array_equal(asyncio.run(train()), np.full((50, DIM), -40, np.float32))

    @pytest.mark.parametrize(("blocking", "awaited"), [(Client, AsyncClient), (Table, AsyncTable)])
    def test_every_call_has_its_counterpart(self, blocking: type, awaited: type) -> None:
        started = {"start_pull", "start_exchange"}  # tasks of asyncio are that
        calls = {name for name in dir(blocking) if not name.startswith("_")} - started
        assert calls <= set(dir(awaited))

    def test_deletes_barriers_and_durability(self, cluster: Cluster, name: str) -> None:
        async def work() -> None:
            async with AsyncClient(cluster.addresses, timeout=60.0) as ps:
                table = await ps.create_table(name, DIM)
                await table.push(np.arange(50), np.ones((50, DIM), np.float32))
                assert await table.delete(np.arange(40)) == 40
                marks = await ps.barrier("epoch")
                on_disk = await ps.wait_durable()
                assert all(disk >= mark for disk, mark in zip(on_disk, marks, strict=True))

        asyncio.run(work())

    def test_the_event_loop_goes_on_while_a_call_waits(self, cluster: Cluster, name: str) -> None:
        async def unreachable() -> int:
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0)

            async with AsyncClient([f"127.0.0.1:{free_ports(1)}"], timeout=0.3) as ps:
                ticking = asyncio.create_task(tick())
                with pytest.raises(Unavailable):
                    await ps.list_tables()
                ticking.cancel()
            return ticks

        assert asyncio.run(unreachable()) > 10
