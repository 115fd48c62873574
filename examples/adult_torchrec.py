"""Train the network of adult.py with TorchRec: one EmbeddingBagCollection with rows on the server.

    python examples/adult_torchrec.py DIRECTORY [--reference]

adult.py explains DIRECTORY, the columns and the two tables. Each column is a feature of the table
adult_deep; all columns and crosses together are the feature of adult_wide. With --reference the
example trains again with torchrec's own collection in this process, from the same initial rows.
"""

import argparse
import sys
from typing import Any

import adult
import numpy as np
import torch
import torchrec
from auc import auc
from cluster import require_empty, servers
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from psclient import Client
from psclient.torchrec import EmbeddingBagCollection

RATES = adult.DEEP_LR, adult.WIDE_LR
LOSS = nn.BCEWithLogitsLoss()


class Network(nn.Module):
    """The network of adult.py. ``keys``: all keys, whose places index torchrec's own tables."""

    def __init__(self, collection: Any, samples: adult.Samples, keys: adult.Keys | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.collection, self.keys = collection, keys
        self.dense = adult.WideDeep(samples.deep.shape[1], samples.numbers.shape[1])

    def forward(self, samples: adult.Samples) -> Any:
        people, columns = samples.deep.shape
        keys = np.concatenate([samples.deep.T.reshape(-1), samples.wide.reshape(-1)])
        lengths = torch.ones(columns + 1, people, dtype=torch.int32)
        lengths[-1] = samples.wide.shape[1]
        ids = keys if self.keys is None else np.searchsorted(self.keys, keys)
        names = [*map(str, range(columns)), "wide"]
        features = KeyedJaggedTensor(names, torch.from_numpy(ids), lengths=lengths.reshape(-1))
        pooled = self.collection(features)
        deep = torch.stack([pooled[name] for name in names[:-1]], dim=1)
        return self.dense({"wide": pooled["wide"], "deep": deep}, torch.from_numpy(samples.numbers))


def train(name: str, network: Network, rows: list[Any], given: argparse.Namespace) -> float:
    """Train a network; return its AUC. ``rows``: optimizers of the collection."""
    samples, held = adult.load(given.directory, validate=given.validate)
    generator = np.random.default_rng(given.seed)
    optimizers = [torch.optim.AdamW(network.dense.parameters(), lr=adult.DENSE_LR), *rows]
    for _ in range(given.epochs):
        for batch in adult.batches(samples, generator):
            labels = torch.from_numpy(batch.labels)
            network.zero_grad()
            LOSS(network(batch), labels).backward()
            for optimizer in optimizers:
                optimizer.step()
    network.dense.eval()
    result = auc(held.labels, network(held).detach().numpy())
    print(f"{name}  AUC {result:.4f}")
    return result


def main() -> None:
    given = adult.parse_arguments()
    torch.set_num_threads(1)
    samples = adult.load(given.directory, validate=False)
    keys = np.unique(np.concatenate([each.wide for each in samples]))
    columns = [str(column) for column in range(samples[0].deep.shape[1])]
    deep = EmbeddingBagConfig(len(keys), adult.DEEP_DIM, "adult_deep", feature_names=columns)
    wide = EmbeddingBagConfig(len(keys), 1, "adult_wide", feature_names=["wide"])
    with servers(given.servers, given.shards) as addresses, Client(addresses) as ps:
        normal: Any = {"initializer": "normal", "initializer_args": {"std": adult.INITIAL_STD}}
        tables = [
            ps.create_table("adult_deep", adult.DEEP_DIM, lr=RATES[0], **normal),
            ps.create_table("adult_wide", 1, lr=RATES[1], initializer="zeros"),
        ]
        require_empty(ps, "adult_deep", "adult_wide")
        first = [torch.from_numpy(table.pull(keys)) for table in tables]
        ebc = EmbeddingBagCollection(ps, [deep, wide])
        served = train("server", Network(ebc, samples[0], None), [ebc.optimizer()], given)
    if given.reference:
        twin, rows = torchrec.EmbeddingBagCollection(tables=[deep, wide]), []
        for bag, weights, lr in zip(twin.embedding_bags.values(), first, RATES, strict=True):
            bag.weight.data = weights
            rows.append(torch.optim.Adagrad(bag.parameters(), lr=lr))
        expected = train("torchrec", Network(twin, samples[0], keys), rows, given)
        if served < expected - adult.MAX_GAP:
            sys.exit(f"expected an AUC of at most {adult.MAX_GAP} below {expected:.4f}")


if __name__ == "__main__":
    main()
