"""Every public class, enumerated: closed, forked, pickled, copied and forgotten."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import multiprocessing
import pickle
import time
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from public import (
    DIM,
    ELSEWHERE,
    MAKERS,
    OPTIONS,
    PLAIN,
    arguments,
    own_methods,
    public_classes,
    use,
)
from servers import Cluster
from tables import summing
from torch.utils.data import DataLoader, Dataset

from psclient import Client, Pending, Table
from psclient.aio import AsyncClient, AsyncTable
from psclient.errors import InvalidArgument, PsError
from psclient.torch import Embedding, EmbeddingGroup

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]
FORK = multiprocessing.get_context("fork")
EVERY = pytest.mark.parametrize("kind", MAKERS)
LOCAL = {  # methods that ask no server, and what ends or describes an object
    *("close", "codes", "row_keys", "collisions", "compose", "combine", "collect", "merge"),
    *("remotes", "requests", "extra_repr", "optimizer", "seen", "pipeline"),
}


def reloaded(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301


def end(thing: Any) -> None:
    """Close the client of an object."""
    client = thing if isinstance(thing, Client | AsyncClient) else getattr(thing, "client", None)
    client = client or thing.rows.client
    closing = client.close()
    if inspect.isawaitable(closing):
        asyncio.run(closing)  # type: ignore[arg-type]


def call(thing: Any, method: str, name: str) -> None:
    result = getattr(thing, method)(*arguments(thing, method, name), **OPTIONS.get(method, {}))
    if inspect.iscoroutine(result):
        asyncio.run(result)


def use_in_a_child(thing: Any, name: str) -> None:
    torch.set_num_threads(1)  # as data loaders do: OpenMP's threads do not survive a fork
    use(thing, name)


def test_every_public_class_is_known_to_these_tests() -> None:
    assert set(public_classes()) == {*MAKERS, *PLAIN, *ELSEWHERE}


@EVERY
def test_every_method_of_a_closed_object_raises_at_once(
    cluster2: Cluster, connect: Any, name: str, kind: str
) -> None:
    thing = MAKERS[kind](connect(cluster2), name)
    use(thing, name)
    end(thing)
    methods = own_methods(thing) - LOCAL
    assert methods
    for method in sorted(methods):
        if method == "step":  # nothing was collected since the last one
            continue
        started = time.monotonic()
        with pytest.raises(InvalidArgument, match="the client is closed"):
            call(thing, method, name)
        assert time.monotonic() - started < 10, method
    end(thing)


@EVERY
def test_an_object_used_before_a_fork_works_in_the_child_and_in_the_parent(
    cluster2: Cluster, connect: Any, name: str, kind: str
) -> None:
    thing = MAKERS[kind](connect(cluster2), name)
    first = use(thing, name)
    child = FORK.Process(target=use_in_a_child, args=(thing, name))
    child.start()
    child.join(20)
    try:
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
    third = use(thing, name)
    if thing.__class__.__name__.startswith("Mixed"):
        return  # the wide part changes with the frequencies
    assert_array_equal(third, 3 * first)
    end(thing)


@EVERY
def test_an_object_is_pickled_as_addresses_and_options(
    cluster2: Cluster, connect: Any, name: str, kind: str
) -> None:
    client = connect(cluster2, client_id=991, wire="float16", transport="unary", timeout=17.0)
    thing = MAKERS[kind](client, name)
    use(thing, name)
    loaded = reloaded(thing)
    assert type(loaded) is type(thing)
    use(loaded, name)
    if kind not in ("AsyncClient", "AsyncTable"):
        again = loaded if isinstance(loaded, Client) else loaded.__dict__.get("client")
        again = again or loaded.rows.client
        assert again is not client
        assert (again._client_id, again._timeout, again._transport) == (0, 17.0, "unary")
        assert (again._dtype, again._addresses) == (client._dtype, client._addresses)
    end(loaded)
    use(thing, name)
    end(thing)


@EVERY
def test_a_deep_copy_shares_the_client(
    cluster2: Cluster, connect: Any, name: str, kind: str
) -> None:
    client = connect(cluster2)
    thing = MAKERS[kind](client, name)
    for copied in (copy.deepcopy(thing), copy.copy(thing)):
        if kind in ("Client", "AsyncClient"):
            assert copied is thing
        elif kind == "AsyncTable":
            assert copied.client is thing.client
        else:
            one, other = (
                (each.__dict__.get("client") or each.rows.client) for each in (thing, copied)
            )
            assert one is other is client
        use(copied, name)
    end(thing)


def test_objects_that_share_a_client_share_it_when_they_are_loaded(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    client = connect(cluster2)
    a, b = summing(client, f"{name}.a"), summing(client, f"{name}.b")
    group = EmbeddingGroup(client, {"a": Embedding(a), "b": Embedding(b)})
    loaded, table = reloaded((group, a))
    assert loaded.client is loaded.features["b"].table.client is table.client is not client
    keys = torch.tensor([1, 2])
    loaded({"a": keys, "b": keys})["a"].sum().backward()
    loaded.step()
    assert_array_equal(a.pull([1, 2]), -np.ones((2, DIM), np.float32))
    table.client.close()


def test_collected_gradients_are_neither_pickled_nor_copied(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    table = summing(connect(cluster2), name)
    module = Embedding(table)
    module(torch.tensor([1])).sum().backward()
    for other in (copy.deepcopy(module), reloaded(module)):
        other.step()
    assert_array_equal(table.pull([1]), np.zeros((1, DIM), np.float32))
    module.step()
    assert_array_equal(table.pull([1]), -np.ones((1, DIM), np.float32))
    other.client.close()


def test_a_pickled_client_has_an_identity_of_its_own(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    """Else its pushes would be taken for repeated ones of the first client."""
    table = summing(connect(cluster2, client_id=77123), name)
    loaded = reloaded(table)
    for each in (table, loaded, table, loaded):
        each.push([1], np.ones((1, DIM), np.float32))
    assert_array_equal(table.pull([1]), np.full((1, DIM), -4, np.float32))
    loaded.client.close()


def test_a_request_in_flight_is_not_pickled(cluster2: Cluster, connect: Any, name: str) -> None:
    pending: Pending = summing(connect(cluster2), name).start_pull([1])
    for how in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="a request in flight cannot be pickled"):
            how(pending)
    pending.result()


class Pulled(Dataset[torch.Tensor]):
    """Sample i is the row of key i, pulled by the process that loads it."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: int) -> torch.Tensor:
        return torch.from_numpy(self.table.pull([key])[0])


@pytest.mark.slow
def test_a_data_loader_with_spawned_workers_pulls(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    table = summing(connect(cluster2), name)
    table.push(np.arange(8), np.ones((8, DIM), np.float32))
    loader = DataLoader(
        Pulled(table), batch_size=4, num_workers=1, multiprocessing_context="spawn", timeout=60
    )
    rows = np.concatenate([batch.numpy() for batch in loader])
    assert_array_equal(rows, -np.ones((8, DIM), np.float32))


def test_a_request_in_flight_keeps_its_client(cluster2: Cluster, name: str) -> None:
    pending = summing(Client(cluster2.addresses, timeout=60.0), name).start_pull([1])
    gc.collect()
    time.sleep(0.3)
    assert_array_equal(pending.result(), np.zeros((1, DIM), np.float32))


def test_a_closed_client_can_be_closed_in_a_child_and_again(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    client = connect(cluster2)
    table = summing(client, name)
    child = FORK.Process(target=client.close)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert_array_equal(table.pull([1]), np.zeros((1, DIM), np.float32))
    client.close()
    client.close()
    with pytest.raises(PsError, match="closed"):
        table.pull([1])


def test_an_async_table_knows_its_client(cluster2: Cluster, name: str) -> None:
    async def make() -> AsyncTable:
        async with AsyncClient(cluster2.addresses, timeout=60.0) as client:
            table = await client.create_table(name, DIM)
            assert table.client is client
            await client.close()
            with pytest.raises(InvalidArgument, match="the client is closed"):
                await client.pull({name: [1]})
            return table

    asyncio.run(make())
