"""How a client undoes a restore, against shards that are away for a while."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from psclient import restores
from psclient.errors import PsError, Unavailable
from psproto import ps_pb2 as pb

Phase = pb.RestoreStatus.Phase.ValueType
Status = pb.RestoreStatus
ID = "a" * 16


class Shards:
    """The phase of each shard; None for one that does not answer. Stands in for the client."""

    def __init__(self, phases: Sequence[Phase | None], patch: pytest.MonkeyPatch) -> None:
        self.phases = list(phases)
        self.polls = 0
        self.back: dict[int, tuple[int, Phase]] = {}  # by poll: a shard that answers again
        patch.setattr(restores, "links", lambda _: range(len(self.phases)))
        patch.setattr(restores, "_poll", self._poll)
        patch.setattr(restores, "take_step", self._take_step)
        patch.setattr(restores, "POLL", 0.001)

    def _status(self, shard: int) -> Status | None:
        phase = self.phases[shard]
        return None if phase is None else Status(id=ID, phase=phase)

    def _poll(self, *_: Any) -> list[Status | None]:
        self.polls += 1
        if self.polls in self.back:
            shard, phase = self.back[self.polls]
            self.phases[shard] = phase
        return [self._status(shard) for shard in range(len(self.phases))]

    def _take_step(self, _: Any, shard: int, id: str, step: int, owner: str = "") -> Status:
        if self.phases[shard] is None:
            raise Unavailable("away")
        assert (id, step) == (ID, pb.RestoreRequest.STEP_ABORT)
        self.phases[shard] = Status.PHASE_ABORTED
        return Status(id=ID, phase=Status.PHASE_ABORTED)


def test_a_held_shard_that_comes_back_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """It restarted while the others were aborted, and would refuse all work."""
    shards = Shards([Status.PHASE_HELD, None], monkeypatch)
    shards.back[3] = (1, Status.PHASE_HELD)
    monkeypatch.setattr(restores, "PATIENCE", 5.0)
    restores._abort(None, ID, 5.0)  # type: ignore[arg-type]
    assert shards.phases == [Status.PHASE_ABORTED] * 2


def test_a_restore_that_cannot_begin_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shard is held, so nobody waits for the one that does not answer."""
    shards = Shards([Status.PHASE_PREPARED, None], monkeypatch)

    def on_all(*_: Any, **__: Any) -> list[Any]:
        raise Unavailable("shard 1 is away")

    monkeypatch.setattr(restores, "on_all", on_all)
    monkeypatch.setattr(restores, "describe", lambda *_: type("Info", (), {"rows": {}}))
    start = time.monotonic()
    monkeypatch.setattr(restores, "PATIENCE", 5.0)
    with pytest.raises(PsError, match="shard 1 is away"):
        restores._prepare(None, ID, "full", "b" * 16, False, None)  # type: ignore[arg-type]
    assert time.monotonic() - start < 4
    assert shards.phases == [Status.PHASE_ABORTED, None]
