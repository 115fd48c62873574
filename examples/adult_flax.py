"""Train the network of adult.py with JAX and Flax: rows are inputs of the compiled step.

    python examples/adult_flax.py DIRECTORY [--reference]

adult.py explains DIRECTORY, the columns and the two tables. With --reference the example trains
again with rows in this process and Optax's Adagrad, from the same rows, and compares the AUCs.
"""

from collections.abc import Iterator
from typing import Any

import adult
import jax.numpy as jnp
import numpy as np
import optax
from auc import auc
from cluster import servers
from flax import nnx

from psclient import Client
from psclient.jax import Feed


class Network(nnx.Module):
    """The network of adult.py and its optimizer."""

    def __init__(self, samples: adult.Samples, seed: int) -> None:
        width, rngs = samples.deep.shape[1] * adult.DEEP_DIM + 7, nnx.Rngs(seed)
        parts: list[Any] = []
        for hidden in adult.HIDDEN:
            dropout = nnx.Dropout(adult.DROPOUT, rngs=rngs)
            parts += [nnx.Linear(width, hidden, rngs=rngs), nnx.relu, dropout]
            width = hidden
        self.mlp = nnx.Sequential(*parts, nnx.Linear(width, 1, rngs=rngs))
        self.dense = nnx.Optimizer(self.mlp, optax.adamw(adult.DENSE_LR), wrt=nnx.Param)

    def __call__(self, rows: Any, places: Any, numbers: Any) -> Any:
        wide = rows["adult.wide"][places["wide"]].sum(1)[:, 0]
        deep = rows["adult.deep"][places["deep"]].reshape(len(numbers), -1)
        return wide + self.mlp(jnp.concatenate([deep, numbers], axis=1))[:, 0]


@nnx.jit
def step(network: Network, rows: Any, places: Any, numbers: Any, labels: Any) -> Any:
    """Update the dense layers; return the gradients of the rows."""

    def loss_of(mlp: Any, rows: Any) -> Any:
        logits = network(rows, places, numbers)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    gradients, row_gradients = nnx.grad(loss_of, argnums=(0, 1))(network.mlp, rows)
    network.dense.update(network.mlp, gradients)
    return row_gradients


def main() -> None:
    given = adult.parse_arguments()
    samples, held = adult.load(given.directory, validate=given.validate)
    keys = np.unique(np.concatenate([samples.wide, held.wide]))

    def batches() -> Iterator[adult.Samples]:
        generator = np.random.default_rng(given.seed)
        return (some for _ in range(given.epochs) for some in adult.batches(samples, generator))

    def places(some: adult.Samples) -> dict[str, Any]:
        return {name: np.searchsorted(keys, each) for name, each in some.ids().items()}

    def score(name: str, network: Network, rows: Any) -> float:
        network.eval()
        result = auc(held.labels, network(rows, places(held), held.numbers))
        print(f"{name}  AUC {result:.4f}")
        return result

    network = Network(samples, given.seed)
    with servers(given.servers, given.shards) as addresses, Client(addresses) as ps:
        wide, deep = adult.make_tables(ps, given.seed)
        first = {table.name: jnp.array(table.pull(keys)) for table in (wide, deep)}
        features, keys_of = {"wide": wide, "deep": deep}, adult.Samples.ids
        with Feed(ps, features, batches(), keys=keys_of, staleness=1) as feed:
            for t in feed:
                feed.push(t, step(network, t.rows, t.places, t.batch.numbers, t.batch.labels))
        last = {table.name: jnp.array(table.pull(keys, mode="serve")) for table in (wide, deep)}
        served = score("server", network, last)
    if given.reference:
        network, rows = Network(samples, given.seed), first
        rates = {"adult.wide": adult.WIDE_LR, "adult.deep": adult.DEEP_LR}
        adagrads = {name: optax.adagrad(lr, 0.0) for name, lr in rates.items()}
        states = {name: each.init(first[name]) for name, each in adagrads.items()}
        for some in batches():
            gradients = step(network, rows, places(some), some.numbers, some.labels)
            for name, each in adagrads.items():
                change, states[name] = each.update(gradients[name], states[name])
                rows[name] += change
        adult.require_close(served, score("flax", network, rows))


if __name__ == "__main__":
    main()
