"""Slow readers take turns and pause."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from homes import Homes
from numpy.testing import assert_array_equal
from stores import Direct, Home, change, contents, make_shard, push, schema

from psproto import ps_pb2 as pb
from psserver import analysis
from psserver.analysis import SPARED_STORED, Analyses, Pace
from psserver.checkpoints import Checkpoints
from psserver.errors import BadRequest, Draining, TooLarge, WrongShard
from psserver.shard import Shard
from storage.admission.rules import make_admission
from storage.analysis import AGES, FREQUENCIES, NORMS, edges_of
from storage.errors import UnknownCheckpoint, UnknownTable
from storage.eviction.rules import make_eviction


def test_the_pause_after_a_slice_is_a_multiple_of_the_work_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    clock = iter([5.0, 5.5, 7.0, 8.0])
    monkeypatch.setattr(pace.time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(pace.time, "sleep", slept.append)
    engine: Any = Direct()
    assert Pace(engine, 19).run(lambda: "slice", lambda found: f"{found} done") == "slice done"
    assert slept == [19 * 1.5]


