"""The decoders that the network reaches. To add one, write a target and add it to TARGETS.

A target takes any bytes. It raises an error if the decoder did something it must not do: raise an
error other than its own, or disagree with protobuf.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from google.protobuf.message import Message

from psclient.errors import PsError, decoded, error_of
from psproto import codec, lanes
from psproto import ps_pb2 as pb
from psserver import position, webmessages
from psserver.errors import BadRequest
from psserver.identity import Identity
from tests.psproto.wire_examples import KINDS, as_message, content, golden

SEEDS = Path(__file__).parent / "seeds"
MOST_BYTES = 4096  # longest input

Run = Callable[[bytes], None]


def wire(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)  # equal for NaN too, unlike messages


def like_protobuf(name: str) -> Run:
    """Return a target: the codec refuses a message, or reads it as protobuf's own class does."""
    kind = KINDS[name]

    def run(data: bytes) -> None:
        with suppress(codec.Malformed):
            ours = kind.decode(data)
            theirs = content(kind.message.FromString(data))
            assert wire(content(as_message(ours))) == wire(theirs)

    return run


def rows(data: bytes) -> None:
    with suppress(codec.Malformed):
        codec.decode_rows(data)


def stream_header(data: bytes) -> None:
    """The header of a request that is refused is read alone, and like the whole request."""
    with suppress(codec.Malformed):
        whole = codec.decode_stream_request(data)[0]
        assert wire(codec.decode_stream_header(data)) == wire(whole)


REGION = bytes(range(256)) * 64


def lane_request(data: bytes) -> None:
    """Requests of the same-host lane, with a region of 16 KiB."""
    with suppress(codec.Malformed, lanes.BadSlice):
        request = lanes.parse(data)
        lanes.request_bytes(request)
        lanes.decode_request(request, {1: memoryview(bytearray(REGION))}, codec.MOST_FIELDS)


def lane_response(data: bytes) -> None:
    """Replies of the same-host lane, to an exchange with two pulls."""
    pulls = [
        codec.PullMessage(pb.PullHeader(table="t", with_metadata=metadata), keys, dim=2)
        for metadata, keys in (
            (False, np.arange(3, dtype="<u8")),
            (True, np.arange(2, dtype="<u8")),
        )
    ]
    memory = memoryview(bytearray(REGION))
    with suppress(codec.Malformed):
        reply = lanes.decode_response(data)
        if reply.HasField("exchange"):
            lanes.exchanged(reply.exchange, codec.Exchange([], pulls), memory, [128, 4096])


def token(data: bytes) -> None:
    """Tokens of subscribers: what is accepted is encoded as the same bytes."""
    with suppress(BadRequest):
        assert position.decode(data).encode() == data


def identity(data: bytes) -> None:
    """The metadata ps-shard, as bytes or as text."""
    own = Identity(1, 3, "prod")
    for value in (data, data.decode("latin-1")):
        named = own.differs(value)
        assert named is not None or re.fullmatch(r"0*1/0*3/(prod)?", value)  # type: ignore[type-var]


def details(data: bytes) -> None:
    """The details of an error that a server sent: any bytes become a PsError."""
    status = decoded(pb.Status, data) or pb.Status(code=13)
    assert isinstance(error_of(status, "127.0.0.1:7000"), PsError)


def http(data: bytes) -> None:
    """The header of an HTTP request."""
    with suppress(ValueError):
        webmessages.parse(data)


_SLICE = pb.Slice(region=1, offset=128, size=16)
_LANE = pb.LaneRequest(
    id=1,
    pulls=[pb.LanePull(header=pb.PullHeader(table="t"), keys=_SLICE, room=_SLICE)],
    pushes=[
        pb.LanePush(
            header=pb.PushHeader(table="t", step=1, sequence=2),
            keys=_SLICE,
            counts=pb.Slice(region=1, offset=256, size=8),
            gradients=_SLICE,
        )
    ],
)

_POSITION = position.Position(
    lineage=bytes(16), epoch=1, tables=0, phase=position.Phase.TAIL, version=3
)

# name -> (target, first inputs)
TARGETS: dict[str, tuple[Run, tuple[bytes, ...]]] = {
    **{name: (like_protobuf(name), (golden(name),)) for name in KINDS},
    "WriteRowsRequest": (rows, (golden("Delta"),)),
    "StreamRequestHeader": (stream_header, (golden("StreamRequest"),)),
    "lane_request": (lane_request, (golden("LaneRequest"), wire(_LANE))),
    "lane_response": (lane_response, (golden("StreamResponse"),)),
    "token": (token, (_POSITION.encode(),)),
    "identity": (identity, (b"1/3/prod", b"1/3/", b"0/3/other")),
    "details": (details, (golden("Status"),)),
    "http": (http, (b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\n\r\n",)),
}


NAMES = (*TARGETS, "methods")


@contextmanager
def opened(name: str) -> Iterator[Run]:
    """Yield a target. "methods" has a server while the block runs, whose methods it calls."""
    if name != "methods":
        yield TARGETS[name][0]
        return
    from tests.fuzz.methods import Methods

    server = Methods()
    try:
        yield server.call
    finally:
        server.close()


def inputs(name: str) -> list[bytes]:
    """Return the first inputs of a target and its seeds."""
    if name == "methods":
        from tests.fuzz.methods import examples

        first = examples()
    else:
        first = list(TARGETS[name][1])
    file = SEEDS / f"{name}.txt"
    return first + [bytes.fromhex(line) for line in file.read_text().split("\n")[:-1]]


def save(name: str, found: list[bytes]) -> None:
    """Save the seeds of a target."""
    (SEEDS / f"{name}.txt").write_text("".join(f"{data.hex()}\n" for data in found))
