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


def new(samples: adult.Samples, seed: int) -> tuple[nnx.Sequential, nnx.Optimizer]:
    """Return the MLP of adult.py and its optimizer."""
    width, rngs = samples.deep.shape[1] * adult.DEEP_DIM + 7, nnx.Rngs(seed)
    parts: list[Any] = []
    for hidden in adult.HIDDEN:
        dropout = nnx.Dropout(adult.DROPOUT, rngs=rngs)
        parts += [nnx.Linear(width, hidden, rngs=rngs), nnx.relu, dropout]
        width = hidden
    mlp = nnx.Sequential(*parts, nnx.Linear(width, 1, rngs=rngs))
    return mlp, nnx.Optimizer(mlp, optax.adamw(adult.DENSE_LR), wrt=nnx.Param)


def logits_of(mlp: nnx.Sequential, rows: Any, places: Any, numbers: Any) -> Any:
    wide = rows["adult.wide"][places["wide"]].sum(1)[:, 0]
    deep = rows["adult.deep"][places["deep"]].reshape(len(numbers), -1)
    return wide + mlp(jnp.concatenate([deep, numbers], axis=1))[:, 0]


@nnx.jit
def step(mlp: Any, dense: Any, rows: Any, places: Any, numbers: Any, labels: Any) -> Any:
    """Update the MLP; return the gradients of the rows."""

    def loss_of(mlp: nnx.Sequential, rows: Any) -> Any:
        logits = logits_of(mlp, rows, places, numbers)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    gradients, row_gradients = nnx.grad(loss_of, argnums=(0, 1))(mlp, rows)
    dense.update(mlp, gradients)
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

    def score(name: str, mlp: nnx.Sequential, rows: Any) -> float:
        mlp.eval()
        result = auc(held.labels, logits_of(mlp, rows, places(held), held.numbers))
        print(f"{name}  AUC {result:.4f}")
        return result

    mlp, dense = new(samples, given.seed)
    with servers(given.servers, given.shards) as addresses, Client(addresses) as ps:
        wide, deep = adult.make_tables(ps, given.seed)
        first = {table.name: jnp.array(table.pull(keys)) for table in (wide, deep)}
        features, keys_of = {"wide": wide, "deep": deep}, adult.Samples.ids
        with Feed(ps, features, batches(), keys=keys_of, staleness=1) as feed:
            for t in feed:
                some = t.batch
                feed.push(t, step(mlp, dense, t.rows, t.places, some.numbers, some.labels))
        last = {table.name: jnp.array(table.pull(keys, mode="serve")) for table in (wide, deep)}
        served = score("server", mlp, last)
    if given.reference:
        (mlp, dense), rows = new(samples, given.seed), first
        rates = {"adult.wide": adult.WIDE_LR, "adult.deep": adult.DEEP_LR}
        adagrads = {name: optax.adagrad(lr, 0.0, eps=1e-20) for name, lr in rates.items()}
        states = {name: each.init(first[name]) for name, each in adagrads.items()}
        for some in batches():
            gradients = step(mlp, dense, rows, places(some), some.numbers, some.labels)
            for name, each in adagrads.items():
                change, states[name] = each.update(gradients[name], states[name])
                rows[name] += change
        adult.require_close(served, score("flax", mlp, rows))


if __name__ == "__main__":
    main()
