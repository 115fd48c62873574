"""A trainer that ends in the middle and comes back under each policy, beside one that never did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cuts
import numpy as np
import pytest
from cuts import Trainer, assert_once, newest, one_more, parents, settle, stored, twin
from servers import Cluster

from psclient import Client, admin
from psclient.checkpointer import Start
from psclient.errors import LogDiverged, SessionExpired, TrainerBehind

pytestmark = pytest.mark.slow
cluster, table, trainer = cuts.cluster, cuts.table, cuts.trainer


PIPED = pytest.mark.parametrize("piped", [False, True], ids=["blocking", "pipeline"])


@PIPED
def test_rewind_ends_as_if_nothing_had_happened(
    trainer: Callable[..., Trainer], piped: bool
) -> None:
    one = trainer(piped=piped)
    assert one.resume() == Start(1, None, None, 0, 0, None)
    one.run(13)
    one.die()
    other = trainer(piped=piped)
    with pytest.raises(TrainerBehind, match=r"^dense is at step 10, servers saw 13; shard 0 was"):
        other.ck.resume()
    start = other.resume("rewind")
    assert (start.step, start.position, start.gap) == (11, {"batch": 10}, 3)
    other.run(20)
    other.end()
    assert other.seen == list(range(11, 21))
    assert other.dense == twin(20)
    assert_once(trainer().client, one.name, 20)


@PIPED
def test_once_computes_again_and_each_push_takes_effect_once(
    trainer: Callable[..., Trainer], piped: bool
) -> None:
    one = trainer(piped=piped)
    one.resume()
    one.run(13)
    one.die()
    other = trainer(piped=piped)
    start = other.resume("once")
    assert (start.step, start.gap, start.policy) == (11, 3, "once")
    other.run(12)
    other.die()  # and again, before the place of the first death
    third = trainer(piped=piped)
    assert third.resume("once").step == 11
    third.run(21)
    third.end()
    assert_once(trainer().client, one.name, 21)


@PIPED
def test_ahead_leaves_out_what_the_rows_have_seen(
    trainer: Callable[..., Trainer], piped: bool
) -> None:
    one = trainer(piped=piped)
    one.resume()
    one.run(13)
    one.die()
    other = trainer(piped=piped)
    start = other.resume("ahead")
    assert (start.step, start.skip, start.gap) == (14, 3, 3)
    assert start.position == {"batch": 10}
    other.run(14)
    other.die()
    third = trainer(piped=piped)
    assert third.resume("once").step == 14  # its numbers are those since the policy "ahead"
    third.run(18)
    third.end()
    assert_once(trainer().client, one.name, 18)


def test_a_trainer_that_dies_before_its_first_cut_comes_back_from_the_start(
    trainer: Callable[..., Trainer],
) -> None:
    one = trainer()
    one.resume()
    one.run(4)
    one.die()
    other = trainer()
    assert other.resume("once") == Start(1, None, None, 0, 4, "once")
    other.run(5)
    other.end()
    assert_once(trainer().client, one.name, 5)


def test_the_steps_of_other_tables_do_not_count(
    cluster: Cluster, trainer: Callable[..., Trainer], table: str
) -> None:
    one = trainer(tables=[table, "absent"])
    one.resume()
    with Client(cluster.addresses) as client:
        other = client.create_table("other", 1)
        other.push([1], np.ones((1, 1)), step=1000)
    one.run(7)
    one.die()
    start = trainer(tables=[table]).resume("ahead")
    assert (start.step, start.gap) == (8, 2)


def test_rewind_goes_back_to_the_start_before_the_first_cut(
    trainer: Callable[..., Trainer],
) -> None:
    one = trainer()
    one.resume()
    one.run(4)
    one.die()
    other = trainer()
    assert other.resume("rewind") == Start(1, None, None, 0, 4, "rewind")
    other.run(5)
    other.end()
    assert other.dense == twin(5)
    assert_once(trainer().client, one.name, 5)


def test_a_trainer_that_ended_goes_on_without_a_policy(trainer: Callable[..., Trainer]) -> None:
    one = trainer()
    one.resume()
    one.run(10)
    one.end()
    other = trainer()
    start = other.resume()
    assert (start.step, start.gap, start.policy) == (11, 0, None)
    other.run(15)
    other.end()
    assert other.dense == twin(15)


def test_a_refusal_names_steps_versions_and_what_each_policy_does(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    one = trainer()
    one.resume()
    one.run(7)
    one.end()
    with pytest.raises(TrainerBehind) as caught:
        trainer().ck.resume()
    name = newest(tmp_path)
    text = str(caught.value)
    assert text.startswith("dense is at step 5, servers saw 7; shard 0 was at version ")
    assert text.endswith(
        f"call resume with a policy: 'rewind' (restore checkpoint {name!r}, which undoes all pushes"
        " since), 'once' (compute the 2 steps again, each push taking effect once), 'ahead' (keep"
        " the rows, and leave the 2 steps out of the dense state)"
    )


def test_more_pushes_than_the_servers_remember_are_refused_by_name(
    trainer: Callable[..., Trainer],
) -> None:
    one = trainer(every=100)
    one.resume()
    one.run(166)
    one.die()
    other = trainer(every=100)
    assert other.resume("once").step == 101
    with pytest.raises(SessionExpired, match=r"must resume with policy 'rewind' instead of 'once'"):
        other.run(101)
    third = trainer(every=100)
    third.resume("rewind")
    third.run(110)
    third.end()
    assert_once(trainer().client, one.name, 110)


def test_servers_that_were_restored_meanwhile_are_named(trainer: Callable[..., Trainer]) -> None:
    one = trainer()
    one.resume()
    one.run(6)
    settle(one)
    with one_more(one) as operator:
        admin.checkpoint(operator, f"by-hand-{one.name}")
        one.run(8)
        settle(one)
        admin.restore(operator, f"by-hand-{one.name}", replace=True)
    with pytest.raises(LogDiverged, match=r"servers were restored while the trainer ran"):
        one.run(10)
    one.client.close()
    other = trainer()
    with pytest.raises(TrainerBehind, match=r"shard 0 has a new log"):
        other.ck.resume()
    with pytest.raises(TrainerBehind, match=r"with policy 'once': the servers were restored"):
        other.ck.resume("once")
    assert other.resume("rewind").step == 6


def test_old_cuts_are_removed_here_and_on_the_servers(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    one = trainer(keep=2)
    one.resume()
    one.run(30)
    one.end()
    left = ["step-000000000025", "step-000000000030"]
    assert sorted(each.name for each in (tmp_path / "run").iterdir()) == sorted(left)
    with one_more(one) as client:
        names = [each.name for each in admin.checkpoints(client) if each.name.startswith("trainer")]
        mine = [name for name in names if name in stored(tmp_path)]
        assert len(mine) == 2


def test_cuts_between_full_ones_contain_only_changes(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    one = trainer(full_every=3, keep=1)
    one.resume()
    one.run(10)
    one.ck.close()
    parent = parents(one)[newest(tmp_path)]
    assert parents(one)[parent or ""] is None  # full; it stays, because the newest needs it
    assert stored(tmp_path) == [parent, newest(tmp_path)]
    one.run(20)
    one.die()
    assert parents(one)[newest(tmp_path)] is None
    assert len(stored(tmp_path)) == 1
    other = trainer(full_every=3)
    other.resume()
    other.run(23)
    other.die()
    third = trainer(full_every=3)
    third.resume("rewind")
    third.run(25)
    third.end()
    assert third.dense == twin(25)
