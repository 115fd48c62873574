"""Every public object that uses a cluster, how to make one, and how to call each of its methods."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tables import summing

import psclient
from psclient import Batch, Client, Table
from psclient.aio import AsyncClient, AsyncTable
from psclient.mixed import MixedDimension
from psclient.multihash import ChineseRemainder, KHash, MultiHash, QuotientRemainder
from psclient.torch import (
    Embedding,
    EmbeddingBag,
    EmbeddingGroup,
    MixedDimensionEmbedding,
    MultiHashEmbedding,
)

DIM = 4
MODULES = ("psclient.aio", "psclient.torch", "psclient.multihash", "psclient.mixed")
PLAIN = {  # values and exceptions: no cluster
    *(
        "Alteration",
        "Batch",
        "Change",
        "PsError",
        "PulledRows",
        "ShardStatus",
        "TableInfo",
        "Tls",
        "Versions",
    ),
    *("PulledParts", "PulledMixed"),
}
ELSEWHERE = {  # tests of their own; abstract
    *("Follower", "Subscriber", "Pending", "Pipeline", "MultiHash", "RowOptimizer", "JobRanks"),
}


def public_classes() -> dict[str, type]:
    """Every public class of psclient, by name."""
    found = {name: getattr(psclient, name) for name in psclient.__all__}
    for module in map(importlib.import_module, MODULES):
        found |= {
            name: each
            for name, each in vars(module).items()
            if inspect.isclass(each) and _in(module.__name__, each) and name[0] != "_"
        }
    return {name: each for name, each in found.items() if inspect.isclass(each)}


def _in(module: str, each: type) -> bool:
    """Whether a class is defined in a module, or in a file of it if it is a package."""
    return f"{each.__module__}.".startswith(f"{module}.")


def two(client: Client, name: str) -> list[Table]:
    return [summing(client, f"{name}.{n}", DIM) for n in range(2)]


def on(client: AsyncClient, name: str) -> AsyncTable:
    return AsyncTable(client, summing(client._blocking, name, DIM))


MAKERS: dict[str, Callable[[Client, str], Any]] = {
    "Client": lambda client, name: (summing(client, name, DIM), client)[1],
    "Table": lambda client, name: summing(client, name, DIM),
    "AsyncClient": lambda client, name: awaited(client, name)[0],
    "AsyncTable": lambda client, name: awaited(client, name)[1],
    "QuotientRemainder": lambda client, name: QuotientRemainder(two(client, name), [7, 5]),
    "ChineseRemainder": lambda client, name: ChineseRemainder(two(client, name), [7, 5]),
    "KHash": lambda client, name: KHash(two(client, name), [7, 5]),
    "MixedDimension": lambda client, name: MixedDimension(*two(client, name), threshold=2),
    "Embedding": lambda client, name: Embedding(summing(client, name, DIM)),
    "EmbeddingBag": lambda client, name: EmbeddingBag(summing(client, name, DIM)),
    "MultiHashEmbedding": lambda client, name: MultiHashEmbedding(KHash(two(client, name), [7, 5])),
    "MixedDimensionEmbedding": lambda client, name: MixedDimensionEmbedding(
        MixedDimension(*two(client, name), threshold=2)
    ),
    "EmbeddingGroup": lambda client, name: EmbeddingGroup(
        client, {"a": Embedding(summing(client, name, DIM))}
    ),
}


def awaited(client: Client, name: str) -> tuple[AsyncClient, AsyncTable]:
    """An AsyncClient of the same cluster that has been used, and its table."""
    made = AsyncClient(client._addresses, timeout=60.0)

    async def use() -> AsyncTable:
        table = await made.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="zeros")
        await table.pull([1])
        return table

    return made, asyncio.run(use())


def use(thing: Any, name: str) -> np.ndarray:
    """Pull and push by any of the above; returns rows float32[2, ...] of the keys 1 and 2."""
    keys, ones = np.array([1, 2]), np.ones((2, DIM), np.float32)
    match thing:
        case Client():
            thing.push({name: (keys, ones)})
            return thing.pull({name: keys})[name]
        case Table():
            thing.push(keys, ones)
            return thing.pull(keys)
        case AsyncClient():
            asyncio.run(thing.push({name: (keys, ones)}))
            return asyncio.run(thing.pull({name: keys}))[name]
        case AsyncTable():
            asyncio.run(thing.push(keys, ones))
            return asyncio.run(thing.pull(keys))
        case MultiHash() | MixedDimension():
            thing.push(keys, np.ones((2, thing.dim), np.float32))
            return thing.pull(keys)
        case EmbeddingGroup():
            thing({"a": torch.from_numpy(keys)})["a"].sum().backward()
            thing.step()
            return thing({"a": torch.from_numpy(keys)})["a"].detach().numpy()
        case EmbeddingBag():
            thing(torch.from_numpy(keys)[:, None]).sum().backward()
            thing.step()
            return thing(torch.from_numpy(keys)[:, None]).detach().numpy()
    thing(torch.from_numpy(keys)).sum().backward()
    thing.step()
    return thing(torch.from_numpy(keys)).detach().numpy()


def own_methods(thing: Any) -> set[str]:
    """Names of the public methods that psclient defines for the class of an object."""
    kinds = [kind for kind in type(thing).__mro__ if kind.__module__.startswith("psclient")]
    return {
        name
        for kind in kinds
        for name, each in vars(kind).items()
        if name[0] != "_" and callable(each)
    }


def arguments(thing: Any, method: str, name: str) -> tuple[Any, ...]:
    """Good arguments for a method."""
    keys, ones = np.array([1, 2]), np.ones((2, getattr(thing, "dim", DIM)), np.float32)
    batch = Batch(keys, EVEN)
    whole = isinstance(thing, Client | AsyncClient)
    push: Any = {name: (keys, ones)} if whole else (keys, ones)
    pull: Any = {name: keys} if whole else keys
    match method:
        case "create_table":
            return (f"{name}.new", DIM)
        case "push" if not whole:
            return push
        case "exchange" | "start_exchange":
            return (push, pull) if whole else (pull, push)
        case "push" | "push_distinct":
            return ({name: (batch, ones)},) if method == "push_distinct" else (push,)
        case "pull_distinct":
            return ({name: batch} if whole else keys,)
        case "pull_pooled":
            return (keys, [0, 2])
        case (
            "alter"
            | "describe"
            | "incomplete_tables"
            | "list_tables"
            | "wait_durable"
            | "step"
            | "status"
        ):
            return ()
        case "alter_table" | "describe_table" | "drop_table" | "evict" | "table" | "barrier":
            return (name,)
        case "gradients":
            return (keys, ones)
        case "forward" | "prefetch" if isinstance(thing, EmbeddingGroup):
            return ({"a": torch.tensor([1, 2])},)
        case "forward" | "prefetch" if isinstance(thing, torch.nn.Module):
            bag = isinstance(thing, EmbeddingBag)
            return (torch.tensor([[1], [2]] if bag else [1, 2]),)
    return (pull,)


EVEN = psclient.batch.routing.even_map(1)
OPTIONS: dict[str, dict[str, Any]] = {"alter": {"lr": 0.5}, "alter_table": {"lr": 0.5}}
