"""Measure a JAX training loop: rows as inputs of the compiled step, or pulled by it.

One process trains an MLP (multilayer perceptron) on rows of one table on one server. A step is the
time from one batch to the next; "outside" is its time beyond a step of "alone". Loops take turns.

    alone           the same compiled step on rows that are on the device already
    callback        the step pulls the rows itself: psclient.jax.lookup of the distinct keys inside
                    jit. The gradients are pushed after it
    input, exact    psclient.jax.Feed with staleness 0: rows are inputs, gradients are outputs
    input, stale 1  the same with staleness 1

"processor ms" is the processor time of the trainer and the server per step; "cores busy" is this
time divided by that of the step. XLA computes with as many threads as the machine has cores.

Needs the extra jax (docs/trainers.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, arguments
from benchmarks.servers import cpu, shards
from benchmarks.step import fill
from benchmarks.work import Work, standard_work
from psclient import Client, Table
from psclient.jax import Feed, lookup
from psclient.padding import padded

FIELDS = 10  # keys per sample
MODELS = {"small": [128, 64], "large": [512, 256]}  # widths of the hidden layers
WARM = 3  # steps at the start of each turn that are not measured
TARGET = 0.6  # of the time outside of "input, exact", compared with "callback"

Batch = dict[str, Any]  # "key": int32[samples, FIELDS], "label": float32[samples]
Steps = Iterable[Any]  # makes one step per iteration
Loop = Callable[[list[Any], Table, list[Batch]], Steps]  # called with weights, table and batches


def new_model(hidden: list[int], width: int) -> list[Any]:
    """Return the weights of an MLP: [kernel, bias, ...]."""
    rng, weights = np.random.default_rng(0), []
    for size in (*hidden, 1):
        weights += [rng.standard_normal((width, size), np.float32) / width**0.5, np.zeros(size)]
        width = size
    return [jnp.array(each, jnp.float32) for each in weights]


def trained(weights: list[Any], rows: Any, places: Any, labels: Any) -> tuple[list[Any], Any]:
    """Return (new weights, gradients of the rows)."""

    def loss_of(weights: list[Any], rows: Any) -> Any:
        x = rows[places].reshape(len(labels), -1)
        for at in range(0, len(weights), 2):
            x = x @ weights[at] + weights[at + 1]
            x = jax.nn.relu(x) if at + 2 < len(weights) else x[:, 0]
        return (jnp.logaddexp(0, x) - labels * x).mean()

    gradients, row_gradients = jax.grad(loss_of, argnums=(0, 1))(weights, rows)
    return [w - 0.01 * g for w, g in zip(weights, gradients, strict=True)], row_gradients


step = jax.jit(trained)


def alone(pad: int) -> Loop:
    def steps(model: list[Any], table: Table, batches: list[Batch]) -> Steps:
        ready = []
        for batch in batches:
            _, places = np.unique(batch["key"], return_inverse=True)
            ready.append(jnp.array(places.reshape(batch["key"].shape), jnp.int32))
        rows = jnp.zeros((pad, table.dim))
        for batch, places in zip(batches, ready, strict=True):
            model, gradients = step(model, rows, places, batch["label"])
            yield jax.block_until_ready(gradients)

    return steps


def callback(table: Table, pad: int) -> Loop:
    @jax.jit
    def pulling(model: list[Any], keys: Any, places: Any, labels: Any) -> Any:
        return trained(model, lookup(table, keys), places, labels)

    def steps(model: list[Any], _: Table, batches: list[Batch]) -> Steps:
        for batch in batches:
            distinct = table.client.batch(batch["key"])
            count = len(distinct.keys)
            keys = np.zeros(pad, np.int32)
            keys[:count] = distinct.keys
            places = distinct.split.inverse.reshape(distinct.shape)
            model, gradients = pulling(model, keys, places, batch["label"])
            table.client.push_distinct({table.name: (distinct, np.asarray(gradients)[:count])})
            yield None

    return steps


def rows_as_inputs(staleness: int, pad: int) -> Loop:
    def steps(model: list[Any], table: Table, batches: list[Batch]) -> Steps:
        features = {"key": table}
        with Feed(table.client, features, batches, staleness=staleness, pad=pad) as feed:
            for t in feed:
                rows = t.rows[table.name]
                model, gradients = step(model, rows, t.places["key"], t.batch["label"])
                feed.push(t, {table.name: gradients})
                yield None

    return steps


@dataclass
class Times:
    """Seconds of the measured steps of one loop.

    steps  of each step
    busy   processor time of trainer and server, over all measured steps
    """

    steps: list[float] = field(default_factory=list)
    busy: float = 0.0


def measure(
    made: dict[str, Any], table: Table, turns: list[list[Batch]], pids: list[int]
) -> dict[str, Times]:
    """Return the times by loop. The first turn compiles, and is not measured.

    made  {name of the loop: (weights, function that makes its steps)}
    pids  process ids of the servers
    """
    times, pids = {name: Times() for name in made}, [os.getpid(), *pids]
    for number, batches in enumerate(turns):
        for name, (weights, steps) in made.items():
            begin = used = 0.0
            for at, _ in enumerate(steps(weights, table, batches)):
                now = time.perf_counter()
                if at > WARM and number:
                    times[name].steps.append(now - begin)
                if at == WARM:
                    used = sum(map(cpu, pids))
                    now = time.perf_counter()
                begin = now
            if number:
                times[name].busy += sum(map(cpu, pids)) - used
    return times


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--samples", type=int, default=1000, help="Samples per batch (default: %(default)s)."
    )
    given = parser.parse_args()
    report = Report("trainers_jax", given.json)
    work = Work(rows=50_000 if given.quick else 300_000, batch=given.samples * FIELDS)
    rounds, count = (2, 15) if given.quick else (6, 40)
    rng = np.random.default_rng(3)
    drawn = [
        {
            "key": ids.astype(np.int32).reshape(-1, FIELDS),
            "label": rng.random(given.samples, np.float32),
        }
        for ids, _, _ in standard_work(work, (rounds + 1) * count)
    ]
    pad = padded(max(len(np.unique(batch["key"])) for batch in drawn))
    turns = [drawn[at : at + count] for at in range(0, len(drawn), count)]
    for name, hidden in MODELS.items():
        with shards(1) as (addresses, pids), Client(addresses) as client:
            table = client.create_table("t", work.dim, optimizer="adagrad", lr=0.05)
            fill(table, np.arange(work.rows))
            loops: dict[str, Loop] = {
                "alone": alone(pad),
                "callback": callback(table, pad),
                "input, exact": rows_as_inputs(0, pad),
                "input, stale 1": rows_as_inputs(1, pad),
            }
            weights = new_model(hidden, FIELDS * work.dim)
            times = measure({each: (weights, f) for each, f in loops.items()}, table, turns, pids)
        p50 = {each: float(np.median(some.steps)) * 1e3 for each, some in times.items()}
        base = p50["callback"] - p50["alone"]
        report.section(
            f"{name} model, hidden layers {hidden}, {given.samples:,} samples of {FIELDS} keys,"
            f" {work.rows:,} rows of {work.dim}",
            [
                {
                    "loop": each,
                    "step p50 ms": ms,
                    "outside p50 ms": ms - p50["alone"],
                    "outside / callback": None if each == "alone" else (ms - p50["alone"]) / base,
                    "target": TARGET if each == "input, exact" else None,
                    "processor ms": times[each].busy / len(times[each].steps) * 1e3,
                    "cores busy": times[each].busy / sum(times[each].steps),
                    "steps": len(times[each].steps),
                }
                for each, ms in p50.items()
            ],
        )
    report.close()


if __name__ == "__main__":
    main()
