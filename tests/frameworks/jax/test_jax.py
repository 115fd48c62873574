"""psclient.jax: Feed, and lookup inside jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from servers import Cluster

from psclient import Client, Table
from psclient.errors import InvalidArgument, PushFailed
from psclient.jax import Feed, lookup
from psclient.padding import padded

DIM, BATCH, KEYS, LR, ROWS_LR = 4, 32, 300, 0.1, 0.5
TOLERANCE = 1e-6  # of rows after 60 steps of SGD; XLA may add in another order than NumPy


@pytest.fixture
def ps(cluster2: Cluster, connect: Callable[..., Client]) -> Client:
    return connect(cluster2)


def make(ps: Client, name: str, **options: Any) -> Table:
    options = {"optimizer": "sgd", "lr": ROWS_LR, "initializer": "normal", **options}
    return ps.create_table(name, dim=DIM, seed=7, **options)


def data(count: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        {
            "user": rng.integers(0, KEYS, BATCH) + (1 << 40),  # no keys of 32 bits
            "friends": rng.integers(0, KEYS, (BATCH, 2)) + (1 << 40),
            "item": rng.integers(0, KEYS, BATCH),
            "y": rng.normal(size=BATCH).astype(np.float32),
        }
        for _ in range(count)
    ]


def loss_of(params: Any, rows: Any, places: Any, y: Any) -> Any:
    users, items = rows["users"], rows["items"]
    whole = users[places["user"]] + users[places["friends"]].sum(1)
    out = (jnp.tanh(whole) * items[places["item"]]) @ params
    return ((out - y) ** 2).mean()


def step_of(traces: list[Any]) -> Any:
    @jax.jit
    def step(params: Any, rows: Any, places: Any, y: Any) -> Any:
        traces.append({table: each.shape for table, each in rows.items()})
        loss, (g, row_gradients) = jax.value_and_grad(loss_of, argnums=(0, 1))(
            params, rows, places, y
        )
        return params - LR * g, row_gradients, loss

    return step


def train(ps: Client, tables: dict[str, Table], batches: Any, **options: Any) -> tuple[Any, Any]:
    """Train; return (params, the shapes for which the step was compiled)."""
    traces: list[Any] = []
    step, params = step_of(traces), jnp.ones(DIM)
    features = {"user": tables["users"], "friends": tables["users"], "item": tables["items"]}
    names = {each.name: name for name, each in tables.items()}
    with Feed(ps, features, batches, **options) as feed:
        for t in feed:
            rows = {names[table]: each for table, each in t.rows.items()}
            params, gradients, _ = step(params, rows, t.places, t.batch["y"])
            feed.push(t, {tables[name].name: each for name, each in gradients.items()})
    assert feed.pipe.stats.pushes == feed.pipe.stats.batches
    return np.asarray(params), traces


def twin(rows: dict[str, Any], batches: Any) -> Any:
    """Train with rows in this process, eagerly, and NumPy's sums; return the params."""
    params = jnp.ones(DIM)
    for batch in batches:
        user = np.concatenate([batch["user"], batch["friends"].reshape(-1)]) - (1 << 40)
        places = {
            "user": user[:BATCH],
            "friends": user[BATCH:].reshape(BATCH, 2),
            "item": batch["item"],
        }
        g, gradients = jax.grad(loss_of, argnums=(0, 1))(
            params, {name: jnp.array(each) for name, each in rows.items()}, places, batch["y"]
        )
        params = params - LR * g
        for name, each in gradients.items():
            rows[name] -= ROWS_LR * np.asarray(each)
    return np.asarray(params)


def test_rows_are_those_of_a_twin_and_few_steps_are_compiled(ps: Client, name: str) -> None:
    tables = {each: make(ps, f"{name}.{each}") for each in ("users", "items")}
    keys = np.arange(KEYS)
    rows = {"users": tables["users"].pull(keys + (1 << 40)), "items": tables["items"].pull(keys)}
    batches = data(60)
    params, traces = train(ps, tables, batches)
    expected = twin(rows, batches)
    assert np.abs(params - expected).max() < TOLERANCE
    assert np.abs(tables["users"].pull(keys + (1 << 40)) - rows["users"]).max() < TOLERANCE
    assert np.abs(tables["items"].pull(keys) - rows["items"]).max() < TOLERANCE
    assert tables["users"].pull_rows(keys + (1 << 40)).frequencies.sum() == 60 * BATCH * 3
    assert 1 <= len(traces) <= 4  # users have 75 to 90 distinct keys, items 27 to 32
    assert all(padded(size[0]) == size[0] for shapes in traces for size in shapes.values())


def test_with_staleness_every_batch_is_pushed_once(ps: Client, name: str) -> None:
    """Gradients of a linear loss depend on no row, so that every order gives the same sums."""
    table = make(ps, name, initializer="zeros")
    batches = data(40)
    gradient = jax.jit(
        lambda rows, places, y: jax.grad(lambda rows: (rows[places].sum(-1) * y).sum())(rows)
    )
    with Feed(ps, {"item": table}, batches, staleness=3) as feed:
        for _ in range(2):
            for t in feed:
                feed.push(t, {name: gradient(t.rows[name], t.places["item"], t.batch["y"])})
    expected = np.zeros((KEYS, DIM))
    for batch in batches * 2:
        np.add.at(expected, batch["item"], -ROWS_LR * batch["y"][:, None].astype(np.float64))
    assert np.abs(table.pull(np.arange(KEYS)) - expected).max() < 1e-5
    assert feed.pipe.stats.batches == feed.pipe.stats.pushes == 80


def test_a_skipped_batch_and_a_learning_rate(ps: Client, name: str) -> None:
    table = make(ps, name, initializer="zeros")
    with Feed(ps, {"item": table}, [{"item": [1, 2]}, {"item": [2, 3]}], pad=2) as feed:
        first, second = iter(feed), None
        feed.skip(next(first))
        second = next(first)
        assert second.rows[name].shape == (2, DIM)
        feed.push(second, {name: jnp.ones((2, DIM))}, lr=2.0)
        assert next(first, None) is None
    assert table.pull([1, 2, 3])[:, 0].tolist() == [0, -2, -2]


def test_refusals(ps: Client, name: str) -> None:
    table = make(ps, name)
    batches = [{"item": np.arange(20)}] * 4
    with pytest.raises(InvalidArgument, match="pad must be 'sqrt2' or a number of rows, got 'x'"):
        Feed(ps, {"item": table}, batches, pad="x")
    with pytest.raises(InvalidArgument, match=r"has 20 distinct keys, but pad is 19: pass pad=20"):
        next(iter(Feed(ps, {"item": table}, batches, pad=19)))
    with pytest.raises(InvalidArgument, match="neither pushed nor skipped"):
        list(Feed(ps, {"item": table}, batches))
    feed = Feed(ps, {"item": table}, batches)

    def push_all() -> None:
        for t in feed:
            feed.push(t, {name: jnp.full((23, DIM), jnp.nan)})

    with pytest.raises(PushFailed, match=r"step 0.*must be finite"):
        push_all()
    feed.pipe.close()


def test_lookup_inside_jit(ps: Client, name: str) -> None:
    table = make(ps, name)
    keys = jnp.array([[3, 4], [4, 5]])

    @jax.jit
    def step(params: Any, keys: Any) -> Any:
        rows = lookup(table, keys)
        loss = lambda params, rows: (rows * params).sum()  # noqa: E731
        return rows, jax.grad(loss, argnums=(0, 1))(params, rows)

    rows, (g, gradients) = step(2.0, keys)
    expected = table.pull(np.asarray(keys))
    assert np.asarray(rows).tolist() == expected.tolist()
    assert float(g) == pytest.approx(expected.sum(), abs=1e-5)
    assert np.asarray(gradients).tolist() == np.full((2, 2, DIM), 2.0).tolist()
    table.push(np.asarray(keys), np.asarray(gradients))
    assert np.asarray(step(2.0, keys)[0]).tolist() == table.pull(np.asarray(keys)).tolist()


def test_lookup_is_a_constant_for_grad_and_refuses_vmap(ps: Client, name: str) -> None:
    table = make(ps, name)
    inside = jax.grad(lambda w: (lookup(table, jnp.array([1, 2])) * w).sum())
    assert float(inside(1.0)) == pytest.approx(table.pull([1, 2]).sum(), abs=1e-5)
    assert float(jax.jit(inside)(1.0)) == pytest.approx(table.pull([1, 2]).sum(), abs=1e-5)
    with pytest.raises(ValueError, match="vmap"):
        jax.vmap(lambda key: lookup(table, key))(jnp.array([1, 2]))
    assert (lookup(table, jnp.array([9]), mode="serve") == 0).all()
    with pytest.raises(InvalidArgument, match="mode must be one of"):
        lookup(table, jnp.array([1]), mode="eval")  # type: ignore[arg-type]
