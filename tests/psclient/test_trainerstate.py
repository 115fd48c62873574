"""The files of a Checkpointer, and what a trainer may do for each state of its servers."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from psclient import trainerstate
from psclient.behind import Servers, differences, gap_of, renumbered, require_policy
from psclient.errors import DataLoss, InvalidArgument, TrainerBehind
from psclient.trainerstate import (
    Directory,
    RankState,
    SessionState,
    ShardState,
    TrainerState,
    require_json,
)
from psclient.writing import Pace

SHARDS = [ShardState("aa", 7), ShardState("bb", 9)]
RANKS = [RankState({"batch": [1, "x"]}, [SessionState(1 << 63, 5, 3), SessionState(2, 5, 0)])]
STATE = TrainerState(10, SHARDS, RANKS, "trainer-10", seen=10, seconds=0.5)


def make(directory: Directory, state: TrainerState) -> Path:
    partial = directory.partial(state.step, "0" * 8, state.checkpoint)
    (partial / "a").write_text("dense")
    (partial / "sub").mkdir()
    (partial / "sub" / "b").write_text("more")
    directory.complete(partial, state)
    return directory.of(state.step)


def test_a_cut_is_read_as_it_was_written(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "new" / "run")
    assert directory.newest() is None
    make(directory, STATE)
    later = replace(STATE, step=20, seen=25)
    make(directory, later)
    assert directory.steps() == [10, 20]
    files = {"a": 5, os.path.join("sub", "b"): 4}
    assert directory.newest() == replace(later, files=files)
    assert directory.read(10) == replace(STATE, files=files)
    directory.change(replace(later, seen=30))
    assert directory.newest() == replace(later, seen=30)
    assert directory.partials() == []


def test_a_crash_at_any_moment_leaves_a_complete_cut_or_a_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash is simulated at each call of the system that makes something durable."""
    for crash in range(100):
        directory = Directory(tmp_path / str(crash))
        make(directory, STATE)
        calls = iter(range(1000))

        def count(name: str, calls: object = calls, crash: int = crash) -> None:
            real = getattr(os, name)

            def wrapped(*args: object) -> object:
                if next(calls) == crash:  # type: ignore[call-overload]
                    raise KeyboardInterrupt
                return real(*args)

            monkeypatch.setattr(trainerstate.os, name, wrapped)

        for name in ("fsync", "rename", "replace"):
            count(name)
        ended = False
        try:
            make(directory, replace(STATE, step=20, checkpoint="trainer-20"))
            ended = True
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        newest = Directory(tmp_path / str(crash)).newest()
        assert newest is not None
        assert newest.step in (10, 20)
        names = [name for _, name in directory.partials()]
        assert names in ([], ["trainer-20"], [""])
        assert (newest.step == 20) != bool(names)
        if ended:
            assert crash > 5
            return
    raise AssertionError("a cut takes more than 100 calls")


def test_a_removed_cut_is_gone_or_partial(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    path = make(directory, STATE)
    directory.remove(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["STATE", "a", os.path.join("sub", "b")])
def test_what_is_damaged_is_named(tmp_path: Path, name: str) -> None:
    directory = Directory(tmp_path)
    path = make(directory, STATE) / name
    data = path.read_bytes()
    for bad in (data[:-1], data + b"x"):
        path.write_bytes(bad)
        with pytest.raises(DataLoss, match=f"^{re.escape(str(path))} is "):
            directory.newest()
    path.unlink()
    with pytest.raises(DataLoss, match=f"^{re.escape(str(path))} is missing"):
        directory.newest()


def test_every_changed_byte_of_a_state_is_noticed(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    path = make(directory, STATE) / "STATE"
    data = path.read_bytes()
    for at in range(0, len(data) - 1, 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(DataLoss, match="its checksum is wrong"):
            directory.newest()


def test_a_directory_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match=r"^directory: .* cannot be created: "):
        Directory(tmp_path / "file" / "run")


@pytest.mark.parametrize("value", [None, 1, "x", [1, [2.5]], {"a": {"b": []}}, True])
def test_what_json_can_store_is_a_position(value: object) -> None:
    require_json("position", value)


@pytest.mark.parametrize("value", [(1,), {1: 2}, float("nan"), object(), {"a": {1}}, b"x"])
def test_what_json_cannot_store_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^position must be made of numbers"):
        require_json("position", value)


# ---- policies

NEW = [ShardState("cc", 7), SHARDS[1]]
LATER = [ShardState("aa", 8), SHARDS[1]]
EARLIER = [ShardState("aa", 6), SHARDS[1]]
CASES = [  # shards, step of the tables, ranks -> (agrees, policies that are not possible)
    (SHARDS, 10, 1, True, {}),
    (LATER, 12, 1, False, {}),
    (LATER, 10, 1, False, {}),
    (LATER, 9, 1, False, {"ahead": "pushes carry no training step"}),
    (EARLIER, 10, 1, False, {"once": "lost changes"}),
    (NEW, 3, 1, False, {"once": "restored"}),
    (SHARDS[:1], 12, 1, False, {"once": "restored, or are others"}),
    (LATER, 12, 2, False, {"once": "the cut has 1 ranks, and the trainer now has 2"}),
    (SHARDS, 10, 2, False, {"once": "the cut has 1 ranks"}),
]


@pytest.mark.parametrize(("shards", "step", "ranks", "agrees", "problems"), CASES)
def test_each_policy_is_applied_or_refused_by_name(
    shards: list[ShardState], step: int, ranks: int, agrees: bool, problems: dict[str, str]
) -> None:
    servers = Servers(shards, step)
    assert (differences(STATE, servers) == []) == (shards == SHARDS)
    assert gap_of(STATE, servers) == max(0, step - 10)
    if agrees:
        for policy in (None, "rewind", "once", "ahead"):
            assert require_policy(policy, STATE, servers, ranks) is None
        return
    with pytest.raises(TrainerBehind) as caught:
        require_policy(None, STATE, servers, ranks)
    for policy in ("rewind", "once", "ahead"):
        if problem := problems.get(policy):
            assert f"not '{policy}' (" in str(caught.value)
            with pytest.raises(TrainerBehind, match=f"with policy '{policy}': .*{problem}"):
                require_policy(policy, STATE, servers, ranks)
        else:
            assert f" '{policy}' (" in str(caught.value)
            assert require_policy(policy, STATE, servers, ranks) == policy


def test_new_numbers_keep_the_clients_of_the_same_ranks_and_shards() -> None:
    new = [SessionState(8, 3, 0), SessionState(9, 30, 0)]
    assert renumbered(STATE, [new, new]) == [
        RankState(RANKS[0].position, [SessionState(1 << 63, 6, 0), SessionState(2, 30, 0)]),
        RankState(None, new),
    ]
    assert renumbered(STATE, [new[:1]]) == [RankState(RANKS[0].position, new[:1])]


def test_the_copy_begins_as_late_as_the_last_one_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("psclient.writing.time.monotonic", lambda: now[0])
    pace = Pace(50, 2.0)
    begun = []
    for step in range(1, 100):
        if pace.begins(step):
            begun.append(step)
        now[0] += 0.5  # two steps per second: copies take 4 steps, and begin 8 before the cut
    assert begun == [*range(42, 51), *range(92, 100)]
