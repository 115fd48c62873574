"""Tables for tests, and what their rows must be."""

from __future__ import annotations

import numpy as np

from psclient import Client, Table
from psproto import ps_pb2 as pb

DIM = 4


def summing(client: Client, name: str, dim: int = DIM) -> Table:
    """A table whose rows are minus the sums of the gradients pushed."""
    return client.create_table(name, dim, optimizer="sgd", lr=1.0, initializer="zeros")


def create_on(client: Client, shard: int, name: str, dim: int) -> None:
    """Create the table of ``summing`` on one shard only."""
    schema = pb.TableSchema(name=name, dim=dim)
    schema.optimizer.name, schema.optimizer.parameters["lr"] = "sgd", 1.0
    schema.initializer.name = "zeros"
    message = pb.CreateTableRequest(schema=schema).SerializeToString()
    client._connect().links[shard].channel.call("/ps.v1.TableService/CreateTable", message, 20.0)


def integers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float32)


def sums_by_key(keys: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys and the sum of the gradients of each."""
    distinct, inverse = np.unique(keys.reshape(-1), return_inverse=True)
    sums = np.zeros((len(distinct), gradients.shape[-1]), np.float32)
    np.add.at(sums, inverse, gradients.reshape(-1, gradients.shape[-1]))
    return distinct, sums
