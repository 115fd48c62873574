"""AsyncClient for asyncio: has most methods of Client, to be awaited.

    async with AsyncClient(["127.0.0.1:7000"]) as ps:
        users = await ps.create_table("user", dim=32)
        rows = await users.pull(keys)

AsyncClient runs the calls of a blocking Client on threads, so finding distinct keys or scattering
rows does not block the event loop. ``start_pull`` and ``start_exchange`` have no counterpart:
create a task of ``pull`` or ``exchange``. Cancelling an ``await`` ends the wait but not the
request: a push that was sent may take effect.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from collections.abc import Callable
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
    """Runs blocking calls of one client on threads of this process."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._process = 0
        self._pool: ThreadPoolExecutor | None = None

    async def run(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run ``call(*args, **options)`` on a pool thread and return its result.

        The client's timeout begins now, so it includes the wait for a free thread. Raises
        DeadlineExceeded if no thread became free in time.
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
        """Run ``call(*args, **options)``, which may take long, on a new thread; return its
        result.
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
        """Stop the pool; calls that run are not interrupted."""
        pool, self._pool = self._pool, None
        if pool is not None and self._process == os.getpid():
            pool.shutdown(wait=False)

    def _threads(self) -> ThreadPoolExecutor:
        """Return the thread pool; create one in a new or forked process, since a fork copies no
        threads.
        """
        if self._pool is None or self._process != os.getpid():
            self._process = os.getpid()
            self._pool = ThreadPoolExecutor(THREADS, "psclient-aio")
        return self._pool


def _run(
    begun: float, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Run ``call`` on this thread; its timeout counts from ``begun`` (monotonic seconds)."""

    def work() -> Any:
        started.set(begun)
        return call(*args, **options)

    return contextvars.copy_context().run(work)


def _awaited(method: Callable[P, Result]) -> Callable[P, Any]:
    """Return an async method that runs the blocking method of the same name on a pool thread."""

    @wraps(method)
    async def call(self: Any, *args: Any, **options: Any) -> Any:
        return await self._calls.run(getattr(self._blocking, method.__name__), *args, **options)

    return call  # type: ignore[return-value]


class AsyncTable:
    """A table whose methods are awaited; psclient.Table explains their arguments and results."""

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

    def __repr__(self) -> str:
        return f"AsyncTable({self.name!r}, dim={self.dim})"


class AsyncClient:
    """A client whose methods are awaited; psclient.Client explains their arguments and results.

    One AsyncClient may be used by several event loops, and in forked processes. An operation's
    timeout begins with the ``await``.
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
        """Pickle addresses and options. The unpickled client opens its own connections."""
        return _load_client, (type(self), self._blocking)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self

    async def create_table(self, name: str, dim: int, **options: Any) -> AsyncTable:
        """See Client.create_table."""
        table = await self._calls.run(self._blocking.create_table, name, dim, **options)
        return AsyncTable(self, table)

    async def table(self, name: str) -> AsyncTable:
        """See Client.table."""
        return AsyncTable(self, await self._calls.run(self._blocking.table, name))

    async def evict(self, *args: Any, **options: Any) -> dict[str, int]:
        """See Client.evict."""
        return await self._calls.run_long(  # type: ignore[no-any-return]
            self._blocking.evict, *args, **options
        )

    alter_table = _awaited(Client.alter_table)
    describe_table = _awaited(Client.describe_table)
    incomplete_tables = _awaited(Client.incomplete_tables)
    list_tables = _awaited(Client.list_tables)
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
        """See Client.close."""
        self._blocking.close()
        self._calls.close()


def _load(client: AsyncClient, name: str, dim: int) -> AsyncTable:
    return AsyncTable(client, Table(client._blocking, name, dim))


def _load_client(kind: type[AsyncClient], blocking: Client) -> AsyncClient:
    client = kind(blocking._addresses)
    client._blocking, client._calls = blocking, _Calls(blocking)
    return client
