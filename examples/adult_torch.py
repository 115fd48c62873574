"""Train the network of adult.py in a plain PyTorch loop, with rows that are pulled ahead.

    python examples/adult_torch.py DIRECTORY [--staleness 1] [--epochs 8]

adult.py explains DIRECTORY, the columns and the two tables. With --staleness 0 the example computes
the same numbers as a loop that waits for each pull and each push. With a larger staleness the
rows of a batch may lack the pushes of that many batches before it, and the loop waits less.
"""

import argparse
import time
from pathlib import Path

import adult
import numpy as np
import torch
from auc import auc
from cluster import arguments, require_empty, servers
from torch import nn

from psclient import Client
from psclient.torch import Embedding, EmbeddingBag, EmbeddingGroup


def train(
    ps: Client, samples: adult.Samples, *, epochs: int, staleness: int, seed: int
) -> tuple[EmbeddingGroup, adult.WideDeep]:
    """Train two new tables and a new dense network; return both.

    seed  determines the initial rows and weights, and the order of the samples
    """
    wide, deep = adult.make_tables(ps, seed)
    require_empty(ps, wide.name, deep.name)
    group = EmbeddingGroup(ps, {"wide": EmbeddingBag(wide, "sum"), "deep": Embedding(deep)})
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    net = adult.WideDeep(samples.deep.shape[1], samples.numbers.shape[1]).train()
    dense = torch.optim.AdamW(net.parameters(), lr=adult.DENSE_LR)
    rows = group.optimizer()
    loss_of = nn.BCEWithLogitsLoss()
    for _ in range(epochs):
        loader = adult.batches(samples, generator)
        with group.pipeline(loader, adult.Samples.keys, staleness=staleness) as batches:
            for batch, outputs in batches:
                logits = net(outputs, torch.from_numpy(batch.numbers))
                loss = loss_of(logits, torch.from_numpy(batch.labels))
                dense.zero_grad()
                loss.backward()
                dense.step()
                rows.step()
    return group, net.eval()


@torch.no_grad()
def score(group: EmbeddingGroup, net: adult.WideDeep, samples: adult.Samples) -> float:
    """Return the AUC of a network on ``samples``."""
    logits = net(group(samples.keys()), torch.from_numpy(samples.numbers))
    return auc(samples.labels, logits.numpy())


def parse_arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("directory", type=Path, help="Directory with adult.data and adult.test.")
    parser.add_argument("--epochs", type=int, default=8, metavar="N")
    parser.add_argument("--staleness", type=int, default=1, metavar="N")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    torch.set_num_threads(1)  # the layers are small; other cores run the servers
    samples, held = adult.load(given.directory, validate=False)
    with servers(given.servers, given.shards) as addresses, Client(addresses) as ps:
        start = time.monotonic()
        group, net = train(
            ps, samples, epochs=given.epochs, staleness=given.staleness, seed=given.seed
        )
        print(f"{time.monotonic() - start:.1f} s  AUC {score(group, net, held):.4f}")


if __name__ == "__main__":
    main()
