"""Server-side optimizers by name.

A row is [embedding | state]. Each class documents its state, and the state of a new row. Nothing is
global to a table: bias correction and decay count per row, so that recovery loses nothing. Rows
without a gradient do not change: weight decay, momentum and l2 shrinkage act on a row only when it
is pushed.

Hyper-parameters have the names and defaults of their sources. Where a source has no default
learning rate, the default is that of the most similar optimizer that has one.

To add an optimizer: write the class in the file of its family and add it to the tuple at the foot
of that file. Nothing else changes; the tests run over OPTIMIZERS.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from storage.adagrad import ADAGRAD
from storage.adam import ADAM, AdamAsync
from storage.ftrl import FTRL, GroupFtrl
from storage.optimizer import Optimizer, StepKernel
from storage.registry import build
from storage.sgd import SGD


def make_optimizer(name: str, lr: float | None, parameters: Mapping[str, float]) -> Optimizer:
    """Construct the optimizer with this name, for example "adam".

    lr          learning rate; None: the value in ``parameters``, or the default
    parameters  other hyper-parameters by name; those left out keep their defaults

    Raises ValueError for an unknown name or parameter, or for a value that is not allowed.
    """
    every = dict(parameters) if lr is None else {**parameters, "lr": lr}
    return build("optimizer", OPTIMIZERS, name, every)


def variants() -> list[Optimizer]:
    """Return optimizers that have every kernel between them."""
    every = [make_optimizer(name, None, {}) for name in OPTIMIZERS]
    return [*every, AdamAsync(apply_sparse_rmsprop=1), GroupFtrl(l21=1.0)]


def step_kernels() -> tuple[StepKernel, ...]:
    """Return the kernels of all optimizers, each once."""
    return tuple({each.kernel.name: each.kernel for each in variants()}.values())


def compile_all() -> None:
    """Run every optimizer once: each kernel is then compiled, or loaded from the cache."""
    for optimizer in variants():
        slab = np.zeros((1, 1 + optimizer.state_width(1)), np.float32)
        slab[0, 1:] = optimizer.initial_state(1)
        gradient = np.ones((1, 1), np.float32)
        optimizer.step(slab, np.zeros(1, np.int64), gradient, optimizer.lr, 0)


OPTIMIZERS: dict[str, type[Optimizer]] = {
    each.name: each for each in (*SGD, *ADAGRAD, *ADAM, *FTRL)
}
