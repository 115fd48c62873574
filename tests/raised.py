"""Run tests while rows move between host memory and the memory of a fake GPU: `pytest --hbm`.

In about half of the tests, drawn by their names, every table of this process then gets a GPU, which
runs the real kernels late or in random order. Before any access, some rows may move up or down.
With `--cold` too, rows are in three tiers. Each test of a module with ``both = raised.both`` runs
with and without a GPU, even without the option.
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

import psproto  # noqa: F401 - installs the cache of kernels before storage has any

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
        self._dice = random.Random(_state["seed"])
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


# Tests that must run without a GPU: file -> beginnings of names; why
HOST = {
    "storage/test_table.py": (("test_a_pull_changes_nothing",), "it counts tiers"),
    "psserver/test_analyses.py": (
        ("test_a_summary_says", "test_rows_that_change", "test_a_server_that_stops"),
        "it counts tiers, or the rows of each message",
    ),
    "psserver/test_checkpoints.py": (("test_no_piece_of_work",), "it measures memory"),
    "psserver/test_cold_scans.py": (("test_an_analysis_tells",), "rows move before it looks again"),
    "psserver/test_inspection.py": (("test_neither_an",), "it compares statistics of tiers"),
    "psserver/test_room.py": (("test_",), "it measures memory"),
    "psserver/test_shard.py": (
        ("test_a_table_is_created", "test_a_pull_changes", "test_an_exchange_with", "test_memory_"),
        "it compares bytes of memory",
    ),
    "psserver/test_slices.py": (("test_",), "it counts rows that the CPU's kernels copy"),
    "psserver/test_sweeper.py": (
        ("test_the_optimizer_takes",),
        "it counts calls of the CPU's step",
    ),
}

_state = {"active": False, "seed": 0, "here": False}
_make = Table.__init__


def begin(item: pytest.Item) -> None:
    """Draw what moves in a test from its name."""
    seed = zlib.crc32(item.nodeid.encode())
    path = item.path.relative_to(Path(__file__).parent).as_posix()
    names, _ = HOST.get(path, ((), ""))
    excluded = any(item.name.startswith(each) for each in names)
    _state["seed"], _state["here"] = seed, seed & 2 and not excluded and compiler() is not None


def _new_table(self: Table, *args: Any, **kwargs: Any) -> None:
    _make(self, *args, **kwargs)
    if _state["here"]:
        self.attach_gpu(_gpu())


def _gpu() -> Gpu:
    seed = _state["seed"]
    return make_gpu(FakeDevice("random" if seed % 2 else "late", seed=seed), part=1 << 12)


def _patch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Table, "__init__", _new_table)
    patch.setattr(rowstore, "HbmTier", RestlessTier)


def activate() -> None:
    """Give tables of this process a GPU."""
    _state["active"] = True
    _patch(pytest.MonkeyPatch())


@pytest.fixture(autouse=True, params=["host", pytest.param("hbm", marks=needs_compiler)])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test of a module without a GPU, and with one. Returns "host" or "hbm"."""
    _state["here"] = request.param == "hbm"
    if _state["here"] and not _state["active"]:
        _patch(monkeypatch)
    return str(request.param)
