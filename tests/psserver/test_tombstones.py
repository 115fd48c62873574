"""The queue of tombstones against a plain list."""

from __future__ import annotations

import random

import numpy as np
import pytest

from psserver import tombstones
from psserver.tombstones import TombstoneQueue, Tombstones
from storage.records import Cause


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_is_a_list_that_loses_its_oldest(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(tombstones, "CHUNK", 4)
    rng = random.Random(seed)
    queue, model, version, horizon = TombstoneQueue(40), list[Tombstones](), 0, 0
    for _ in range(150):
        version += rng.choice((0, 1, 1, 3))
        dead = Tombstones(1, np.arange(rng.randrange(6), dtype=np.uint64), version, Cause.REQUEST)
        queue.add(dead)
        model += [dead] if len(dead.keys) else []
        while sum(len(each.keys) for each in model) > 40:
            horizon = model.pop(0).version
        assert queue.horizon == horizon
        seen = queue.all()
        assert [id(each) for each in seen] == [id(each) for each in model]
        assert len(seen) == len(model)
        after, limit = rng.randrange(version + 2), rng.randrange(1, 12)
        later = [each for each in model if each.version > after]
        while limit < len(later) and later[limit].version == later[limit - 1].version:
            limit += 1
        assert [id(each) for each in queue.after(after, limit)] == [id(e) for e in later[:limit]]


def test_what_was_captured_does_not_change() -> None:
    queue = TombstoneQueue(5000)
    key = np.zeros(1, np.uint64)
    for version in range(1, 2001):
        queue.add(Tombstones(1, key, version, Cause.NORM))
    seen = queue.all()
    for version in range(2001, 9001):
        queue.add(Tombstones(1, key, version, Cause.NORM))
    assert [each.version for each in seen] == list(range(1, 2001))
    assert len(queue.all()) == 5000
