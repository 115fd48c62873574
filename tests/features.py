"""Features over several tables: what their rows and embeddings must be."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch

from psclient import Client, Table
from psclient.multihash import (
    ChineseRemainder,
    KHash,
    MultiHash,
    QuotientRemainder,
)

MASK = 2**64 - 1
EXTREME = np.array([-1, -2, 0, 1, -(2**63), -(2**63) + 1, 2**63 - 1, 2**63 - 2])
ANY = np.random.default_rng(0).integers(0, 2**64, 5000, np.uint64)
KINDS: list[Any] = [QuotientRemainder, ChineseRemainder, KHash]
SIZES = (5, 7, 9)  # pairwise coprime, so that every kind takes them


def summing(client: Client, name: str, dim: int) -> Table:
    """A table whose rows are minus the sums of the gradients pushed."""
    return client.create_table(name, dim, optimizer="sgd", lr=1.0, initializer="zeros")


def offline(count: int = 1, dim: int = 4) -> list[Table]:
    """Tables of a client that never connects."""
    client = Client(["127.0.0.1:1"])
    return [Table(client, f"t{number}", dim) for number in range(count)]


def every_row(feature: MultiHash) -> list[np.ndarray]:
    """By part: the keys of its rows, as the documentation has them."""
    keys, used = [], Counter[str]()
    for table, size in zip(feature.tables, feature.sizes, strict=True):
        keys.append(np.arange(used[table.name], used[table.name] + size))
        used[table.name] += size
    return keys


def dense(feature: MultiHash) -> list[np.ndarray]:
    """By part: all its rows, float32[size, dim], row c that of code c."""
    rows = zip(feature.tables, every_row(feature), strict=True)
    return [table.pull(keys) for table, keys in rows]


def integers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def keys_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.append(np.arange(-60, 60), EXTREME), shape)


def composed(combine: str, rows: list[Any], codes: Any) -> torch.Tensor:
    """The composition in torch, of dense parts."""
    places = torch.from_numpy(codes.astype(np.int64))
    parts = [part[place] for part, place in zip(rows, places, strict=True)]
    if combine == "add":
        return sum(parts[1:], parts[0])
    if combine == "multiply":
        return math.prod(parts[1:], start=parts[0])
    return torch.cat(parts, -1)


# ---- codes, without a server


def mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def stream(key: int, number: int) -> int:
    return mix(mix(key & MASK) + (number + 1) * 0x9E3779B97F4A7C15 & MASK)
