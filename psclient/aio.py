"""The client for asyncio: the same calls, awaited.

    async with AsyncClient(["127.0.0.1:7000"]) as ps:
        users = await ps.create_table("user", dim=32)
        rows = await users.pull(keys)

There is one implementation, the blocking one; here it runs on a few threads, so neither the search
for distinct keys nor a scatter ever holds up the event loop. ``start_pull`` and ``start_exchange``
have no counterpart: make a task of ``pull`` or ``exchange``. Cancelling an ``await`` stops the
waiting, not the request: a push that was sent may take effect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from psclient.client import Client
from psclient.table import Table

P = ParamSpec("P")
Result = TypeVar("Result")
THREADS = 32  # calls under way at a time


class _Calls:
    """Runs blocking calls on threads of one client."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    async def run(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(call, *args, **options))


def _awaited(method: Callable[P, Result]) -> Callable[P, Any]:
    """The method of AsyncClient or AsyncTable that runs a blocking one of the same name."""

    @wraps(method)
    async def call(self: Any, *args: Any, **options: Any) -> Any:
        return await self._calls.run(getattr(self._blocking, method.__name__), *args, **options)

    return call  # type: ignore[return-value]


class AsyncTable:
    """Table, awaited: see psclient.Table for arguments and results."""

    def __init__(self, table: Table, calls: _Calls) -> None:
        self._blocking = table
        self._calls = calls
        self.name = table.name
        self.dim = table.dim

    pull = _awaited(Table.pull)
    pull_rows = _awaited(Table.pull_rows)
    pull_distinct = _awaited(Table.pull_distinct)
    pull_pooled = _awaited(Table.pull_pooled)
    push = _awaited(Table.push)
    exchange = _awaited(Table.exchange)
    delete = _awaited(Table.delete)
    alter = _awaited(Table.alter)
    describe = _awaited(Table.describe)


class AsyncClient:
    """Client, awaited: see psclient.Client for arguments and results."""

    def __init__(self, addresses: Any, **options: Any) -> None:
        self._blocking = Client(addresses, **options)
        self._threads = ThreadPoolExecutor(THREADS, "psclient-aio")
        self._calls = _Calls(self._threads)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def create_table(self, name: str, dim: int, **options: Any) -> AsyncTable:
        """See Client.create_table."""
        table = await self._calls.run(self._blocking.create_table, name, dim, **options)
        return AsyncTable(table, self._calls)

    async def table(self, name: str) -> AsyncTable:
        """See Client.table."""
        return AsyncTable(await self._calls.run(self._blocking.table, name), self._calls)

    alter_table = _awaited(Client.alter_table)
    describe_table = _awaited(Client.describe_table)
    list_tables = _awaited(Client.list_tables)
    drop_table = _awaited(Client.drop_table)
    evict = _awaited(Client.evict)
    wait_durable = _awaited(Client.wait_durable)
    barrier = _awaited(Client.barrier)
    batch = _awaited(Client.batch)
    pull = _awaited(Client.pull)
    push = _awaited(Client.push)
    exchange = _awaited(Client.exchange)
    pull_distinct = _awaited(Client.pull_distinct)
    push_distinct = _awaited(Client.push_distinct)

    async def close(self) -> None:
        """See Client.close."""
        await self._calls.run(self._blocking.close)
        self._threads.shutdown(wait=False)
