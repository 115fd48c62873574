"""Client for asyncio: AsyncClient has most methods of Client as coroutines.

    async with AsyncClient(["127.0.0.1:7000"]) as ps:
        users = await ps.create_table("user", dim=32)
        rows = await users.pull(keys)

AsyncClient runs the calls of a blocking Client on threads, so finding distinct keys or scattering
rows does not block the event loop. Instead of ``start_pull`` and ``start_exchange``, which do not
exist here, create a task that awaits ``pull`` or ``exchange``. Cancelling an ``await`` ends the
wait but not the request: a push that was sent may still take effect.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from typing import Any, ParamSpec, Self, TypeVar

from psclient.client import Client
from psclient.connection import started
from psclient.errors import DeadlineExceeded
from psclient.table import Table

P = ParamSpec("P")
Result = TypeVar("Result")
THREADS = 32  # maximum number of calls in flight; further calls wait for a free thread


class _Calls:
    """Runs the blocking calls of one client on threads, so that coroutines can await them."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._process = 0
        self._pool: ThreadPoolExecutor | None = None

    async def run(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run ``call(*args, **options)`` on a pool thread and return its result.

        The call's timeout (that of the client) starts now, so it includes the wait for a free
        thread. Raises DeadlineExceeded if no thread becomes free before the timeout.
        """
        self.client._require_open()
        future = self._threads().submit(_run, time.monotonic(), call, args, options)
        late = False

        def expire() -> None:
            nonlocal late
            late = future.cancel()  # works only before the call begins; later it times out itself

        timer = asyncio.get_running_loop().call_later(self.client._timeout, expire)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not late:
                raise
            raise DeadlineExceeded(
                f"the call did not start within the timeout, {self.client._timeout} s:"
                f" {THREADS} other calls of this client, the maximum, were running"
            ) from None
        finally:
            timer.cancel()

    async def run_long(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run ``call(*args, **options)`` on a new thread and return its result.

        For calls that may take minutes: they would occupy the pool's threads.
        """
        self.client._require_open()
        future: Future[Any] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(*args, **options))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=work, name="psclient-aio-long", daemon=True).start()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Stop the pool of threads. Calls that are running are not interrupted."""
        pool, self._pool = self._pool, None
        if pool is not None and self._process == os.getpid():
            pool.shutdown(wait=False)

    def _threads(self) -> ThreadPoolExecutor:
        """Return this process's pool of threads; create it at the first use.

        A forked child needs its own, because a fork does not copy threads.
        """
        if self._pool is None or self._process != os.getpid():
            self._process = os.getpid()
            self._pool = ThreadPoolExecutor(THREADS, "psclient-aio")
        return self._pool


def _run(
    begun: float, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Run ``call(*args, **options)`` on this thread and return its result.

    begun  when the timeout of the call started, in monotonic seconds
    """

    def work() -> Any:
        started.set(begun)
        return call(*args, **options)

    return contextvars.copy_context().run(work)


def _awaited(method: Callable[P, Result]) -> Callable[P, Any]:
    """Return a coroutine method that awaits ``method``, which runs on a thread of the pool.

    method  method of Client or Table. It is called on the blocking Client or Table that belongs to
            the object whose coroutine is awaited
    """

    @wraps(method)
    async def call(self: Any, *args: Any, **options: Any) -> Any:
        return await self._calls.run(getattr(self._blocking, method.__name__), *args, **options)

    return call  # type: ignore[return-value]


class AsyncTable:
    """A table whose methods are coroutines. Their arguments and results are those of Table.

    client  the AsyncClient that created it
    name    name of the table
    dim     length of the embeddings
    """

    def __init__(self, client: AsyncClient, table: Table) -> None:
        self.client = client
        self._blocking = table
        self._calls = client._calls
        self.name = table.name
        self.dim = table.dim

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self.client, self.name, self.dim)

    pull = _awaited(Table.pull)
    pull_rows = _awaited(Table.pull_rows)
    pull_distinct = _awaited(Table.pull_distinct)
    pull_pooled = _awaited(Table.pull_pooled)
    push = _awaited(Table.push)
    exchange = _awaited(Table.exchange)
    delete = _awaited(Table.delete)
    alter = _awaited(Table.alter)
    describe = _awaited(Table.describe)

    async def prefetch(self, keys: Any) -> None:
        """Ask the shards to read the rows of keys from disk into memory. See Table.prefetch.

        Returns once the shards have accepted the request. They read the rows after that.
        """
        await self._calls.run(lambda: self._blocking.prefetch(keys).result())

    def __repr__(self) -> str:
        return f"AsyncTable({self.name!r}, dim={self.dim})"


class AsyncClient:
    """A client whose methods are coroutines. Arguments and results are those of Client.

    Several event loops, and forked processes, may use one AsyncClient. The timeout of an operation
    starts when its coroutine starts.
    """

    def __init__(self, addresses: Any, **options: Any) -> None:
        self._blocking = Client(addresses, **options)
        self._calls = _Calls(self._blocking)

    async def __aenter__(self) -> Self:
        self._blocking._require_open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the addresses and options. The unpickled client opens its own connections."""
        return _load_client, (type(self), self._blocking)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self

    async def create_table(self, name: str, dim: int, **options: Any) -> AsyncTable:
        """Create a table on every shard and return it. Client.create_table explains the arguments.

        If an equal table exists, returns that. Raises the errors of Client.create_table.
        """
        table = await self._calls.run(self._blocking.create_table, name, dim, **options)
        return AsyncTable(self, table)

    async def table(self, name: str) -> AsyncTable:
        """Return an existing table. Raises TableNotFound if it does not exist."""
        return AsyncTable(self, await self._calls.run(self._blocking.table, name))

    async def evict(self, *args: Any, **options: Any) -> dict[str, int]:
        """Apply a table's eviction rules now; return the number of rows evicted, by rule.

        Client.evict explains the arguments. The call runs on a thread of its own, because it may
        take long.
        """
        return await self._calls.run_long(  # type: ignore[no-any-return]
            self._blocking.evict, *args, **options
        )

    async def prefetch(self, keys: Mapping[str, Any]) -> None:
        """Ask the shards to read the rows of keys from disk into memory. See Client.prefetch.

        Returns once the shards have accepted the request. They read the rows after that.
        """
        await self._calls.run(lambda: self._blocking.prefetch(keys).result())

    alter_table = _awaited(Client.alter_table)
    describe_table = _awaited(Client.describe_table)
    incomplete_tables = _awaited(Client.incomplete_tables)
    list_tables = _awaited(Client.list_tables)
    status = _awaited(Client.status)
    drop_table = _awaited(Client.drop_table)
    wait_durable = _awaited(Client.wait_durable)
    barrier = _awaited(Client.barrier)
    batch = _awaited(Client.batch)
    pull = _awaited(Client.pull)
    push = _awaited(Client.push)
    exchange = _awaited(Client.exchange)
    pull_distinct = _awaited(Client.pull_distinct)
    push_distinct = _awaited(Client.push_distinct)

    async def close(self) -> None:
        """Close the connections; calls in progress fail. Idempotent."""
        self._blocking.close()
        self._calls.close()


def _load(client: AsyncClient, name: str, dim: int) -> AsyncTable:
    return AsyncTable(client, Table(client._blocking, name, dim))


def _load_client(kind: type[AsyncClient], blocking: Client) -> AsyncClient:
    client = kind(blocking._addresses)
    client._blocking, client._calls = blocking, _Calls(blocking)
    return client
