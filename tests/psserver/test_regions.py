"""The same-host lane against clients that do what they should not."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lanes import Memory, RawLane, mapped, offer_of, pull, push, reason
from numpy.testing import assert_array_equal
from servers import Cluster, Labels, eventually
from tables import DIM, summing

from psclient import Client, Table
from psproto import lanes
from psproto import ps_pb2 as pb

N = 100
KEYS = np.arange(N, dtype=np.uint64)
AFTER = 64 + 8 * N + 4 * N * DIM  # offset after the arrays of a push
U64 = 2**64 - 1


@pytest.fixture
def client(cluster1: Cluster, connect: Any) -> Client:
    return connect(cluster1)


@pytest.fixture
def offer(client: Client) -> pb.Lane:
    return offer_of(client)


@pytest.fixture
def table(client: Client, name: str) -> Table:
    return summing(client, name)


@pytest.fixture
def lane(offer: pb.Lane) -> Iterator[RawLane]:
    with RawLane(offer.path, offer.token) as lane:
        yield lane


@pytest.fixture
def memory(offer: pb.Lane, lane: RawLane) -> Iterator[Memory]:
    """Registered memory with the keys and gradients of a push."""
    memory = Memory(offer.token)
    assert reason(lane.register(memory)) == ""
    memory.put(64, KEYS)
    memory.put(64 + 8 * N, np.ones(N * DIM, np.float32))
    memory.put(AFTER, KEYS)
    yield memory
    memory.close()


def test_a_push_and_a_pull_in_one_message(lane: RawLane, memory: Memory, table: Table) -> None:
    room = AFTER + 8 * N
    reply = lane.ask(
        pb.LaneRequest(
            id=9,
            pushes=[push(table.name, N, DIM)],
            pulls=[pull(table.name, N, DIM, at=AFTER, room=room)],
        )
    )
    assert (reply.id, reason(reply)) == (9, "")
    assert reply.exchange.pulls[0].header.dim == DIM
    assert_array_equal(memory.get(room, N * DIM), -np.ones(N * DIM, np.float32))
    assert_array_equal(table.pull(KEYS), -np.ones((N, DIM), np.float32))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"seals": 0}, "must have the seal F_SEAL_SHRINK, got the seals 0x0"),
        ({"seals": fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL}, "must not have the seal F_SEAL_SEAL"),
        ({"holes": True}, "must have no holes: only 4096 of 1048576 bytes are allocated"),
        ({"beyond": True}, "must have no holes: only 4096 of 1048576 bytes are allocated"),
        ({"magic": b"garbage!"}, "must begin with b'pslane01', got b'garbage!'"),
        ({"claimed": 5}, "must have its size, 1048576, got 5"),
        ({"token": bytes(16)}, "must have the token of this server"),
        ({"size": 64}, "must have more than 64 bytes, got 64"),
    ],
    ids=lambda each: "" if isinstance(each, str) else next(iter(each)),
)
def test_memory_that_breaks_a_rule_is_refused_by_name(
    offer: pb.Lane, lane: RawLane, wrong: dict[str, Any], text: str
) -> None:
    memory = Memory(**{"token": offer.token, **wrong})
    reply = lane.register(memory)
    assert reason(reply) == "LANE_REFUSED"
    assert text in reply.error.message
    good = Memory(offer.token)
    assert reason(lane.register(good)) == ""  # the connection goes on
    memory.close()
    good.close()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"size": 1 << 21}, "expected a file of 2097152 bytes, got 1048576 bytes"),
        ({"size": U64}, "registered + 18446744073709551615 requested > lane_bytes=4294967296"),
        ({"kind": 0}, "field 'kind' must be LANE_KIND_MEMFD, got 0"),
        ({"kind": 99}, "field 'kind' must be LANE_KIND_MEMFD, got 99"),
    ],
)
def test_a_registration_that_breaks_a_rule_is_refused_by_name(
    offer: pb.Lane, lane: RawLane, fields: dict[str, int], text: str
) -> None:
    memory = Memory(offer.token)
    reply = lane.register(memory, **fields)
    assert reason(reply) in ("LANE_REFUSED", "LANE_LIMIT")
    assert text in reply.error.message
    memory.close()


def test_other_descriptors_than_memory_are_refused(
    offer: pb.Lane, lane: RawLane, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4096))
    read, write = os.pipe()
    on_disk = os.open(file, os.O_RDWR)
    region = pb.LaneRegion(region=0, kind=pb.LANE_KIND_MEMFD, size=4096)
    for fd in (read, on_disk, lane.socket.fileno()):
        reply = lane.ask(pb.LaneRequest(id=3, regions=[region]), (fd,))
        assert reason(reply) == "LANE_REFUSED"
    reply = lane.ask(pb.LaneRequest(id=3, regions=[region]))
    assert "expected 1 descriptors with the message, got 0" in reply.error.message
    for fd in (read, write, on_disk):
        os.close(fd)


def test_registered_memory_cannot_shrink_or_get_holes(memory: Memory) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 2 * memory.size)
    keep_size_punch_hole = 3
    assert CDLL(None).fallocate(memory.fd, keep_size_punch_hole, 0, 4096) == -1


@pytest.mark.parametrize(
    "wrong",
    [
        {"region": 1},
        {"offset": 0},
        {"offset": 65},
        {"offset": (1 << 20) - 8},
        {"offset": U64 - 7},
        {"size": U64 - 7},
        {"size": 1 << 40},
        {"size": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("field", ["keys", "gradients", "room"])
def test_a_slice_outside_the_memory_is_refused_by_name(
    lane: RawLane, memory: Memory, table: Table, field: str, wrong: dict[str, int]
) -> None:
    request = pb.LaneRequest(
        id=9,
        pushes=[push(table.name, N, DIM)],
        pulls=[pull(table.name, N, DIM, at=AFTER, room=AFTER + 8 * N)],
    )
    at = request.pulls[0].room if field == "room" else getattr(request.pushes[0], field)
    for name, value in wrong.items():
        setattr(at, name, value)
    reply = lane.ask(request)
    assert reply.id == 9
    if wrong == {"size": 12} and field != "keys":  # no rule of slices, but it does not fit the keys
        assert reason(reply) == ("DIM_MISMATCH" if field == "gradients" else "")
        return
    large = wrong.get("size", 0) > 1 << 30 and field != "room"
    assert reason(reply) == ("MESSAGE_TOO_LARGE" if large else "INVALID_ARGUMENT")
    assert large or f"field '{field}'" in reply.error.message
    assert_array_equal(table.pull(KEYS), np.zeros((N, DIM), np.float32))


def test_nothing_is_written_to_a_room_of_the_wrong_size(
    lane: RawLane, memory: Memory, table: Table
) -> None:
    room = AFTER + 8 * N
    for dim in (DIM - 1, DIM + 1):
        reply = lane.ask(
            pb.LaneRequest(id=9, pulls=[pull(table.name, N, dim, at=AFTER, room=room)])
        )
        assert (reason(reply), reply.exchange.pulls[0].header.dim) == ("", DIM)
    memory.put(room, np.full(N * DIM, 7, np.float32))
    lane.ask(pb.LaneRequest(id=9, pulls=[pull(table.name, N, DIM + 1, at=AFTER, room=room)]))
    assert_array_equal(memory.get(room, N * DIM), np.full(N * DIM, 7, np.float32))


def test_only_the_token_opens_the_lane(offer: pb.Lane) -> None:
    for token in (b"", bytes(16), offer.token[:-1]):
        with RawLane(offer.path) as lane:
            reply = lane.ask(pb.LaneRequest(id=1, token=token))
            assert reason(reply) == "LANE_REFUSED"
            assert "token of the lane that GetServerInfo returns" in reply.error.message
            assert lane.receive() is None


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\x04\x00\x00\x00\xff\xff\xff\xff"], ids=["length", "message"]
)
def test_garbage_ends_the_connection_with_an_error(
    offer: pb.Lane, lane: RawLane, data: bytes
) -> None:
    lane.send(data)
    reply = lane.receive()
    assert reply is not None
    assert (reply.id, reason(reply)) == (0, "MALFORMED_MESSAGE")
    assert lane.receive() is None


def test_long_messages_that_are_not_complete_count_as_in_flight(
    cluster1: Cluster, offer: pb.Lane
) -> None:
    def inflight() -> float:
        return cluster1.metrics(0)["ps_inflight_bytes", Labels()]

    with RawLane(offer.path, offer.token) as lane:
        eventually(lambda: inflight() == 0)
        lane.send(lanes.LENGTH.pack(1 << 20) + bytes(100))
        eventually(lambda: inflight() == 1 << 20)
    eventually(lambda: inflight() == 0)


def test_gradients_that_change_while_they_are_pushed_cannot_ruin_a_row(
    lane: RawLane, memory: Memory, table: Table
) -> None:
    """The server checks the copy that it applies. Each push is refused, or finite."""
    stop = threading.Event()
    gradients = np.frombuffer(memory.memory, np.float32, N * DIM, 64 + 8 * N)
    keys = np.frombuffer(memory.memory, np.uint64, N, 64)

    def change() -> None:
        while not stop.is_set():
            gradients[:] = np.nan
            keys[:] = 0
            gradients[:] = 1.0
            keys[:] = KEYS

    thread = threading.Thread(target=change)
    thread.start()
    seen = set()
    try:
        for i in range(100):
            request = pb.LaneRequest(id=i + 10, pushes=[push(table.name, N, DIM)])
            seen.add(reason(lane.ask(request)))
    finally:
        stop.set()
        thread.join()
    assert seen <= {"", "NON_FINITE"}
    assert np.isfinite(table.pull(KEYS)).all()


def test_the_memory_of_a_client_that_is_gone_is_unmapped(cluster1: Cluster, offer: pb.Lane) -> None:
    (pid,) = cluster1.pids(0)
    before, registered = mapped(pid), cluster1.metrics(0)["ps_lane_bytes", Labels()]
    with RawLane(offer.path, offer.token) as lane:
        for number in range(3):
            memory = Memory(offer.token)
            assert reason(lane.register(memory, number)) == ""
            memory.close()
        assert mapped(pid) == before + 3
        assert cluster1.metrics(0)["ps_lane_bytes", Labels()] == registered + 3 * memory.size
    eventually(lambda: mapped(pid) == before)
    assert cluster1.metrics(0)["ps_lane_bytes", Labels()] == registered


def test_gpu_memory_is_refused_by_a_server_without_a_gpu(
    lane: RawLane, memory: Memory, table: Table
) -> None:
    region = pb.LaneRegion(region=5, kind=pb.LANE_KIND_CUDA, size=4096, handle=bytes(64))
    reply = lane.ask(pb.LaneRequest(id=3, regions=[region]))
    assert reason(reply) == "LANE_REFUSED"
    assert "without hbm_bytes" in reply.error.message
    asked = pull(table.name, N, DIM, at=AFTER, room=AFTER + 8 * N)
    asked.rows.region, asked.rows.size = 5, 4 * N * DIM
    reply = lane.ask(pb.LaneRequest(id=4, pulls=[asked]))
    assert reason(reply) == "INVALID_ARGUMENT"
    assert "region 5 of GPU memory is not registered" in reply.error.message
