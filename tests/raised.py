"""Run tests while rows move between host memory and the memory of a fake GPU: `pytest --hbm`.

Every table of this process then gets a GPU, which runs the real kernels in random order. Before any
access, some rows may move up or down, drawn at random with the name of the test as the seed. Tests
of modules with ``both = raised.both`` run with and without, even without the option.
"""

from __future__ import annotations

import functools
import random
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "gpu"))

from cpukernels import compiler
from fakedevice import FakeDevice
from lifted import NONE, PIECE, make_gpu

from storage import rowstore
from storage.errors import OutOfMemory
from storage.gpu.gpu import Gpu
from storage.table import Table
from storage.tiers.hbm import HbmTier

OFTEN = 40  # accesses to a table after which rows move more rarely
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the CUDA kernels")


class RestlessTier(HbmTier):
    """A tier whose rows may move before any access."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, PIECE)
        self._dice = random.Random(_seed)
        self._accesses = 0

    def stir(self) -> None:
        """Move some rows up, and others down, or down alone; give memory back now and then."""
        self._accesses += 1
        if self._dice.random() > (0.5 if self._accesses < OFTEN else 0.1):
            return
        slots = np.flatnonzero(self.where[: self.slots.used] != -1)
        slots = slots[np.random.default_rng(self._dice.randrange(1 << 30)).random(len(slots)) < 0.3]
        near = self.in_hbm(slots)
        with suppress(OutOfMemory):  # the test fills the memory
            self.move(slots[~near] if self._dice.random() < 0.7 else NONE, slots[near])
        if self._dice.random() < 0.1:
            self.compact(self._dice.randrange(1 << 16))
            self.shrink_hbm()


def _restless(name: str) -> Callable[..., Any]:
    method = getattr(HbmTier, name)

    @functools.wraps(method)
    def moved(self: RestlessTier, *args: Any, **kwargs: Any) -> Any:
        self.stir()
        return method(self, *args, **kwargs)

    return moved


for _name in (
    "gather",
    "scatter",
    "step",
    "largest",
    "release",
    "allocate",
    "scan",
    "view",
    "norms",
):
    setattr(RestlessTier, _name, _restless(_name))


_seed = 0
_active = False
_make = Table.__init__


def begin(test: str) -> None:
    """Draw what moves in a test from its name."""
    global _seed
    _seed = zlib.crc32(test.encode())


def _new_table(self: Table, *args: Any, **kwargs: Any) -> None:
    _make(self, *args, **kwargs)
    self.attach_gpu(_gpu())


def _gpu() -> Gpu:
    return make_gpu(FakeDevice("random" if _seed % 2 else "late", seed=_seed), part=1 << 12)


def _patch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Table, "__init__", _new_table)
    patch.setattr(rowstore, "HbmTier", RestlessTier)


def activate() -> None:
    """Give every table of this process a GPU."""
    global _active
    _active = True
    _patch(pytest.MonkeyPatch())


@pytest.fixture(autouse=True, params=["host", pytest.param("hbm", marks=needs_compiler)])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test of a module without a GPU, and with one."""
    if request.param == "hbm" and not _active:
        _patch(monkeypatch)
    return str(request.param)
