"""Deletes, durability and barriers through generated stubs alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from servers import eventually
from stubs import (
    APPLIED,
    FSYNC,
    LOG,
    WAIT,
    Conversation,
    Peer,
    delete_request,
    durable,
    embeddings,
    keys_of,
    pull_request,
    push_request,
    refusal,
    uint64,
)

from psproto import ps_pb2 as pb


def test_deleted_rows_start_anew_and_others_stay(peer: Peer, name: str) -> None:
    peer.create(name)
    one, two, three, never = peer.keys(4)
    pushed = peer.rows.Push(push_request(name, [one, two, three], [[1, 2]] * 3))
    done = peer.rows.Delete(delete_request(name, [three, never, one]))
    assert (done.version, done.deleted, done.duplicate) == (pushed.version + 1, 2, False)
    pulled = peer.rows.Pull(pull_request(name, [one, two, three], with_metadata=True))
    assert embeddings(pulled) == [[0, 0], [-1, -2], [0, 0]]
    assert pulled.versions == uint64([0, pushed.version, 0])
    again = peer.rows.Delete(delete_request(name, [one, one, two]))
    assert (again.version, again.deleted) == (done.version + 1, 1)
    described = peer.tables.DescribeTable(pb.DescribeTableRequest(name=name))
    assert described.stats.rows == 0


def test_a_repeated_delete_takes_effect_once(peer: Peer, name: str) -> None:
    peer.create(name)
    key = peer.keys(1)
    numbers = {"client_id": 0xDE1, "incarnation": 1}
    peer.rows.Push(push_request(name, key, [[1, 1]], **numbers, sequence=1))
    request = delete_request(name, key, **numbers, sequence=2)
    first = peer.rows.Delete(request)
    peer.rows.Push(push_request(name, key, [[4, 4]], **numbers, sequence=3))
    second = peer.rows.Delete(request)
    assert (first.duplicate, first.deleted) == (False, 1)
    assert (second.duplicate, second.version, second.deleted) == (True, first.version, 0)
    assert embeddings(peer.rows.Pull(pull_request(name, key))) == [[-4, -4]]


def test_a_bad_delete_is_refused_by_name_and_deletes_nothing(peer: Peer, name: str) -> None:
    peer.create(name)
    own = peer.keys(2)
    foreign = keys_of(1 - peer.server.shard, peer.server.shard_map, 1)
    pushed = peer.rows.Push(push_request(name, own, [[1, 1]] * 2))
    bad = {
        ("FAILED_PRECONDITION", "WRONG_SHARD"): delete_request(name, own + foreign),
        ("NOT_FOUND", "TABLE_NOT_FOUND"): delete_request("no.such.table", own),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT"): delete_request(name, own, durability=9),
        ("FAILED_PRECONDITION", "SESSION_EXPIRED"): delete_request(
            name, own, client_id=0xDE2, sequence=9, acknowledged=8
        ),
    }
    for wanted, request in bad.items():
        assert refusal(lambda request=request: peer.rows.Delete(request))[:2] == wanted
    for data in (b"\xff" * 9, b"\x1a\x03abc"):
        got = refusal(lambda data=data: peer.raw("RowService/Delete", data))
        assert got[:2] == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")
    described = peer.tables.DescribeTable(pb.DescribeTableRequest(name=name))
    assert (described.stats.rows, described.version) == (2, pushed.version)


@pytest.mark.parametrize("table", [0, APPLIED, LOG, FSYNC])
@pytest.mark.parametrize("asked", [0, APPLIED, LOG, FSYNC])
def test_a_change_is_answered_at_the_level_asked_for_or_the_table_s(
    peer: Peer, name: str, table: int, asked: int
) -> None:
    peer.create(name, durability=table)
    key = peer.keys(1)
    wanted = asked or table or LOG
    pushed = peer.rows.Push(push_request(name, key, [[1, 1]], durability=asked))
    assert pushed.achieved == wanted
    deleted = peer.rows.Delete(delete_request(name, key, durability=asked))
    assert deleted.achieved == wanted
    for done in (pushed, deleted):
        assert (wanted == FSYNC) <= (done.durable_version >= done.version)
    exchange = pb.ExchangeRequest(pushes=[push_request(name, key, [[1, 1]], durability=asked)])
    (answer,) = peer.rows.Exchange(exchange).pushes
    assert answer.achieved == wanted
    assert durable(peer) >= deleted.durable_version >= pushed.durable_version


def test_an_unknown_level_is_refused(peer: Peer, name: str) -> None:
    schema = pb.TableSchema(name=name, dim=1, durability=7)
    got = refusal(lambda: peer.tables.CreateTable(pb.CreateTableRequest(schema=schema)))
    assert got[:2] == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
    peer.create(name)
    request = push_request(name, peer.keys(1), [[1, 1]], durability=7)
    got = refusal(lambda: peer.rows.Push(request))
    assert got[:2] == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
    assert peer.tables.DescribeTable(pb.DescribeTableRequest(name=name)).stats.rows == 0


def test_pushes_of_a_stream_are_answered_on_disk_when_they_ask_for_it(
    peer: Peer, conversation: Conversation, name: str
) -> None:
    peer.create(name)
    key = peer.keys(1)
    ids = {}
    for level in (LOG, FSYNC, APPLIED, FSYNC):
        push = push_request(name, key, [[1, 1]], durability=level)
        ids[conversation.send(pb.ExchangeRequest(pushes=[push]))] = level
    for response in (next(conversation.responses) for _ in ids):
        (answer,) = response.exchange.pushes
        assert answer.achieved == ids[response.id]
        assert (answer.achieved == FSYNC) <= (answer.durable_version >= answer.version)


def test_a_version_can_be_awaited_on_disk(peer: Peer, name: str) -> None:
    peer.create(name)
    pushed = peer.rows.Push(push_request(name, peer.keys(1), [[1, 1]], durability=APPLIED))
    done = peer.log.WaitDurable(pb.WaitDurableRequest(version=pushed.version), timeout=WAIT)
    assert done.durable_version >= pushed.version
    assert peer.log.WaitDurable(pb.WaitDurableRequest(), timeout=WAIT).durable_version >= (
        pushed.version
    )
    assert durable(peer) >= pushed.version
    future = pb.WaitDurableRequest(version=pushed.version + 1_000_000)
    assert refusal(lambda: peer.log.WaitDurable(future))[:2] == (
        "OUT_OF_RANGE",
        "VERSION_IN_FUTURE",
    )


def test_everything_is_on_disk_soon_although_nobody_asks(peer: Peer, name: str) -> None:
    peer.create(name)
    pushed = peer.rows.Push(push_request(name, peer.keys(1), [[1, 1]], durability=APPLIED))
    eventually(lambda: durable(peer) >= pushed.version, 60.0)


@pytest.mark.parametrize("barrier", ["a", "epoch-1", "0" * 128, "a/b.c_d"])
def test_a_barrier_is_a_version_of_its_own(peer: Peer, name: str, barrier: str) -> None:
    peer.create(name)
    pushed = peer.rows.Push(push_request(name, peer.keys(1), [[1, 1]]))
    done = peer.log.Barrier(pb.BarrierRequest(name=barrier), timeout=WAIT)
    assert done.version == pushed.version + 1
    again = peer.rows.Push(push_request(name, peer.keys(1), [[1, 1]]))
    assert again.version == done.version + 1


@pytest.mark.parametrize("barrier", ["", "-a", "0" * 129, "a b", "\u00e4"])
def test_a_barrier_of_a_bad_name_is_refused(peer: Peer, barrier: str) -> None:
    got = refusal(lambda: peer.log.Barrier(pb.BarrierRequest(name=barrier)))
    assert got[:2] == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


def test_a_server_with_a_log_tells_its_lineage(peers: list[Peer], forgetful: Peer) -> None:
    lineages = {peer.server.lineage for peer in peers}
    assert len(lineages) == 2
    assert {len(lineage) for lineage in lineages} == {16}
    assert (forgetful.server.lineage, forgetful.server.durable_version) == (b"", 0)


def test_a_server_without_a_log_says_so(forgetful: Peer, name: str) -> None:
    no_log = ("FAILED_PRECONDITION", "NO_LOG", {}, False)
    assert refusal(lambda: forgetful.create(name, durability=FSYNC)) == no_log
    forgetful.create(name)
    key = [1]
    requests: list[Callable[[], object]] = [
        lambda: forgetful.log.WaitDurable(pb.WaitDurableRequest()),
        lambda: forgetful.log.Barrier(pb.BarrierRequest(name="b")),
        lambda: forgetful.rows.Push(push_request(name, key, [[1, 1]], durability=FSYNC)),
        lambda: forgetful.rows.Delete(delete_request(name, key, durability=FSYNC)),
    ]
    for request in requests:
        assert refusal(request) == no_log
    for level in (0, APPLIED, LOG):
        pushed = forgetful.rows.Push(push_request(name, key, [[1, 1]], durability=level))
        assert (pushed.achieved, pushed.durable_version) == (APPLIED, 0)
        deleted = forgetful.rows.Delete(delete_request(name, key, durability=level))
        assert (deleted.achieved, deleted.deleted) == (APPLIED, 1)
