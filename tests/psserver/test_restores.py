"""A restore, step by step: all or nothing, wherever the process dies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from homes import Homes, Node, Step, fill
from stores import schema

from psproto import ps_pb2 as pb
from psserver import restore, swap
from psserver.config import ConfigError, ServerConfig
from psserver.datadir import DataDirectory
from psserver.engine import Engine
from psserver.errors import (
    CheckpointBusy,
    NotEmpty,
    RestoreConflict,
)
from storage.errors import (
    Corrupt,
    DiskFull,
)
from storage.optimizers import make_optimizer
from storage.sealed import fields_of, seal_fields

ADAM = make_optimizer("adam", None, {})
ID = "0123456789abcdef"
Make = Callable[..., Homes]


def states(cluster: Homes) -> list[Any]:
    return [
        {name: dump.rows.tolist() for name, dump in node.shard.dump().items()}
        for node in cluster.nodes
    ]


def test_a_cluster_with_tables_is_replaced_only_if_that_is_said(make: Make) -> None:
    source, target = make(2), make(2)
    fill(source)
    source.checkpoint("full")
    target.create(schema("mine"))
    with pytest.raises(NotEmpty, match="'mine'"):
        target.restore("full")
    target.restore("full", replace=True)
    assert target.rows() == source.rows()


def test_a_table_that_comes_during_a_restore_is_not_replaced(make: Make) -> None:
    source, target = make(1), make(1)
    source.checkpoint("full")
    node = target.nodes[0]
    node.prepare("full", ID)
    target.create(schema("mine"))
    with pytest.raises(NotEmpty):
        node.step(ID, Step.STEP_HOLD)
    assert not node.restores.held
    assert node.step(ID, Step.STEP_ABORT).phase == pb.RestoreStatus.PHASE_ABORTED


def test_from_hold_to_release_the_shard_is_held(make: Make) -> None:
    source, target = make(1), make(1)
    fill(source)
    source.checkpoint("full")
    node = target.nodes[0]
    told = []
    node.prepare("full", ID)
    told.append(node.restores.held)
    for step in (Step.STEP_HOLD, Step.STEP_COMMIT, Step.STEP_RELEASE):
        for _ in range(2):  # a step may be repeated
            status = node.step(ID, step)
            told.append(node.restores.held)
    assert told == [False, True, True, True, True, False, False]
    assert status.phase == pb.RestoreStatus.PHASE_RELEASED
    assert target.rows() == source.rows()
    assert {path.name for path in node.directory.iterdir()} >= {"base", "log", "restore"}
    assert [path.name for path in (node.directory / "restore").iterdir()] == ["STATE"]


@pytest.mark.parametrize("last", [None, Step.STEP_HOLD, Step.STEP_COMMIT])
def test_until_it_is_released_what_was_there_can_come_back(make: Make, last: int | None) -> None:
    source, target = make(1), make(1)
    fill(source)
    source.checkpoint("full")
    target.create(schema("mine"))
    target.push(range(9), table="mine")
    before, node = target.rows(), target.nodes[0]
    lineage = node.home.log.lineage
    node.prepare("full", ID, replace=True)
    for step in (Step.STEP_HOLD, Step.STEP_COMMIT):
        if last is not None and step <= last:
            node.step(ID, step)
    for _ in range(2):
        assert node.step(ID, Step.STEP_ABORT).phase == pb.RestoreStatus.PHASE_ABORTED
    assert (target.rows(), node.home.log.lineage, node.restores.held) == (before, lineage, False)
    target.push(range(9), table="mine")
    target.restore("full", replace=True)
    assert target.rows() == source.rows()


def test_steps_out_of_their_order_are_refused(make: Make) -> None:
    source, target = make(1), make(1)
    source.checkpoint("full")
    node = target.nodes[0]
    for step in (Step.STEP_HOLD, Step.STEP_COMMIT):
        with pytest.raises(RestoreConflict):
            node.step(ID, step)
    node.prepare("full", ID)
    for step in (Step.STEP_COMMIT, Step.STEP_RELEASE):
        with pytest.raises(RestoreConflict):
            node.step(ID, step)
    node.step(ID, Step.STEP_HOLD)
    with pytest.raises(RestoreConflict):
        node.prepare("full", "f" * 16)
    for step in (Step.STEP_HOLD, Step.STEP_COMMIT, Step.STEP_RELEASE, Step.STEP_ABORT):
        with pytest.raises(RestoreConflict):
            node.step("f" * 16, step)


def test_what_does_not_fit_into_memory_leaves_what_was_there(make: Make) -> None:
    """The rows need no memory, but their index does."""
    source, target = make(1), make(1, memory_bytes=1 << 20)
    source.create(schema("large"))
    source.push(range(200_000), table="large")
    source.checkpoint("full")
    target.create(schema("mine"))
    target.push(range(9), table="mine")
    before, node = target.rows(), target.nodes[0]
    node.prepare("full", ID, replace=True)
    node.step(ID, Step.STEP_HOLD)
    status = node.step(ID, Step.STEP_COMMIT)
    assert status.phase == pb.RestoreStatus.PHASE_FAILED
    assert "budget" in status.why
    assert node.restores.held
    assert target.rows() == before
    node.step(ID, Step.STEP_ABORT)
    assert not node.restores.held
    target.push(range(9), table="mine")
    node.reopen()
    assert len(target.rows()["mine"]) == 9


class Died(Exception):
    """The process ends here."""


@pytest.mark.slow
def test_wherever_a_shard_dies_it_is_all_there_or_nothing(
    make: Make, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before each move and each sync in turn, also of what mends an earlier death."""
    source, target = make(1), make(1)
    fill(source)
    source.checkpoint("full")
    target.create(schema("mine"))
    target.push(range(9), table="mine")
    old, new = target.rows(), source.rows()
    target.nodes[0].home.written()
    target.nodes[0].close()
    deaths = 0

    def dying(real: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Died
            return real(*args, **more)

        return call

    for end in (Step.STEP_RELEASE, Step.STEP_ABORT):
        for fuse in range(1, 200):
            directory = tmp_path / f"dying-{end}-{fuse}"
            shutil.copytree(target.nodes[0].directory, directory)
            node = Node(directory, 0, 1, url).open()
            left = [fuse]
            with monkeypatch.context() as patch:
                for module in (restore, swap):
                    for name in {"sync", "write_state", "clean", "clear"} & vars(module).keys():
                        patch.setattr(module, name, dying(getattr(module, name), left))
                died = 0
                while True:
                    try:
                        drive(node, end)
                        break
                    except Died:
                        died += 1
                        node.home.close()
                        left[0] = fuse if died == 1 else 0  # once more, while it mends
                        while True:
                            node = Node(directory, 0, 1, url)
                            try:
                                node.open()
                                break
                            except Died:
                                left[0] = 0
                        rows = rows_of(node)
                        assert rows in (old["mine"], new), fuse
            assert rows_of(node) == (new if end == Step.STEP_RELEASE else old["mine"])
            assert not node.restores.held
            node.close()
            shutil.rmtree(directory)
            deaths += died
            if not died:
                break
        else:
            pytest.fail("it never came to an end")
    assert deaths > 30


@pytest.mark.parametrize("moves", [1, 2, 3])
def test_a_lost_state_in_the_middle_of_an_exchange_is_damage(
    make: Make, url: str, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """What was there before is in restore/old, and nobody may take it for left over."""
    cluster = make(1)
    fill(cluster)
    cluster.checkpoint("full")
    node = cluster.nodes[0]
    node.prepare("full", ID, replace=True)
    node.step(ID, Step.STEP_HOLD)
    node.restores.step(pb.RestoreRequest(id=ID, step=Step.STEP_COMMIT))
    node.home.written()
    node.close()
    left, move = [moves], swap._move

    def dying(source: Path, target: Path) -> None:
        if not left[0]:
            raise Died
        left[0] -= 1
        move(source, target)

    with monkeypatch.context() as patch, suppress(Died):
        patch.setattr(swap, "_move", dying)
        swap.settle(node.directory)
    state = node.directory / "restore" / "STATE"
    whole = state.read_bytes()
    state.unlink()
    before = sorted(node.directory.rglob("*"))
    for _ in range(2):
        with pytest.raises(
            Corrupt, match=r"restore/STATE: the file is missing, but .* to .*/restore/old/base"
        ):
            swap.settle(node.directory)
    assert sorted(node.directory.rglob("*")) == before
    with pytest.raises(
        ConfigError, match=r"^data_dir: DATA_LOSS: .*/restore/STATE: the file is missi"
    ):
        DataDirectory(
            node.directory, ServerConfig(), Engine(), lambda: node.shard, lambda: None
        ).open()
    state.write_bytes(whole)
    node.open()


def test_a_lost_base_that_was_restored_is_not_taken_for_a_new_one(make: Make) -> None:
    cluster = make(1)
    fill(cluster)
    cluster.checkpoint("full")
    cluster.push(range(9), 5.0)
    before = cluster.rows()
    node = cluster.nodes[0]
    node.prepare("full", ID, replace=True)
    node.step(ID, Step.STEP_HOLD)
    node.restores.step(pb.RestoreRequest(id=ID, step=Step.STEP_COMMIT))
    node.close()
    (node.directory / "restore" / "base" / "data.mdb").unlink()
    node.open()
    status = node.restores.step(pb.RestoreRequest())
    assert status.phase == pb.RestoreStatus.PHASE_FAILED
    assert status.why.endswith("base/data.mdb is gone")
    assert cluster.rows() == before


def rows_of(node: Node) -> Any:
    """The rows of the only table, or of the two of ``fill``."""
    found: dict[str, Any] = {}
    for name, dump in node.shard.dump().items():
        rows = zip(dump.keys.tolist(), dump.rows.tolist(), dump.meta.tolist(), strict=True)
        found[name] = {key: (row, meta) for key, row, meta in rows}
    return found.get("mine", found)


def drive(node: Node, end: int) -> None:
    """Go on with a restore from wherever it is, to its release, or up to COMMIT and back."""
    phase = node.restores.step(pb.RestoreRequest()).phase
    status = pb.RestoreStatus
    if phase == status.PHASE_UNSPECIFIED:
        node.prepare("full", ID, replace=True)
        phase = status.PHASE_PREPARED
    if phase == status.PHASE_PREPARED:
        phase = node.step(ID, Step.STEP_HOLD).phase
    if phase == status.PHASE_HELD:
        phase = node.step(ID, Step.STEP_COMMIT).phase
    if phase in (status.PHASE_LOADED, status.PHASE_COMMITTED):
        node.step(ID, end)


# ---- one owner


@pytest.fixture
def prepared(make: Make) -> Node:
    """A shard with a prepared restore of "full", whose clock is the attribute ``seconds``."""
    cluster = make(1)
    cluster.checkpoint("full")
    node = cluster.nodes[0]
    node.prepare("full", ID)
    node.seconds = 100.0  # type: ignore[attr-defined]
    node.restores._clock = lambda: node.seconds  # type: ignore[attr-defined]
    return node


def take(node: Node, step: int, owner: str, id: str = ID) -> pb.RestoreStatus:
    return node.restores.step(pb.RestoreRequest(id=id, step=step, owner=owner))  # type: ignore[arg-type]


def test_a_restore_has_one_owner_and_another_client_is_refused_by_name(prepared: Node) -> None:
    take(prepared, Step.STEP_HOLD, "a" * 16)
    for step in (Step.STEP_HOLD, Step.STEP_COMMIT, Step.STEP_RELEASE):
        with pytest.raises(
            RestoreConflict, match=rf"{ID} of checkpoint 'full' is driven by another client"
        ):
            take(prepared, step, "b" * 16)
    with pytest.raises(RestoreConflict, match="finish or abort"):
        prepared.prepare("full", "f" * 16)
    assert take(prepared, Step.STEP_HOLD, "a" * 16).phase == pb.RestoreStatus.PHASE_HELD


def test_an_owner_that_polls_stays_and_one_that_is_gone_is_replaced(prepared: Node) -> None:
    take(prepared, Step.STEP_HOLD, "a" * 16)
    for _ in range(5):
        prepared.seconds += restore.LEASE_SECONDS / 2  # type: ignore[attr-defined]
        take(prepared, Step.STEP_UNSPECIFIED, "a" * 16)
        with pytest.raises(RestoreConflict):
            take(prepared, Step.STEP_HOLD, "b" * 16)
    take(prepared, Step.STEP_UNSPECIFIED, "b" * 16)  # a look makes nobody the owner
    prepared.seconds += restore.LEASE_SECONDS  # type: ignore[attr-defined]
    take(prepared, Step.STEP_HOLD, "b" * 16)
    with pytest.raises(RestoreConflict):
        take(prepared, Step.STEP_COMMIT, "a" * 16)


def test_a_new_restore_has_a_new_owner(prepared: Node) -> None:
    take(prepared, Step.STEP_HOLD, "a" * 16)
    take(prepared, Step.STEP_ABORT, "a" * 16)
    prepared.prepare("full", "f" * 16)
    take(prepared, Step.STEP_HOLD, "b" * 16, "f" * 16)


def test_every_client_may_abort(prepared: Node) -> None:
    take(prepared, Step.STEP_HOLD, "a" * 16)
    take(prepared, Step.STEP_ABORT, "b" * 16)
    assert not prepared.restores.held


def test_a_step_on_a_full_disk_is_refused_by_name_and_changes_nothing(
    prepared: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(swap, "replace", replace)
        for step in (Step.STEP_HOLD, Step.STEP_ABORT):
            with pytest.raises(DiskFull):
                take(prepared, step, "a" * 16)
    assert not prepared.restores.held
    assert take(prepared, Step.STEP_HOLD, "a" * 16).phase == pb.RestoreStatus.PHASE_HELD


def test_a_shard_that_does_other_work_is_not_held(prepared: Node) -> None:
    with (
        prepared.checkpoints.work.alone("it fills table 't'"),
        pytest.raises(CheckpointBusy, match="it fills table 't'"),
    ):
        take(prepared, Step.STEP_HOLD, "a" * 16)
    assert not prepared.restores.held


@pytest.mark.parametrize(
    "damage",
    [
        {"phase": "unknown"},
        {"phase": 3},
        {"replace": "yes"},
        {"id": "../x"},
        {"name": ""},
        {"more": 1},
    ],
)
def test_a_state_of_wrong_types_is_damage(prepared: Node, damage: dict[str, Any]) -> None:
    path = prepared.directory / "restore" / "STATE"
    state = prepared.restores._state
    path.write_bytes(seal_fields(fields_of(state) | damage))
    with pytest.raises(Corrupt, match=f"STATE: {next(iter(damage))}"):
        swap.settle(prepared.directory)
