"""One shard as a client sees it, without a stream."""

from __future__ import annotations

import itertools
import threading
import time

import grpc

from psclient.channel import OPTIONS, Cancelled, Channel
from psclient.errors import PsError, SessionExpired, Unavailable
from psclient.retry import FIRST_PAUSE, LONGEST_PAUSE, retry, rpc_error
from psclient.session import Call, Session, pause_before, renumber
from psclient.stream import Link
from psproto import codec
from psproto import ps_pb2 as pb


class UnaryLink:
    """One shard behind unary calls: what clients of other languages do, and slower. Thread-safe."""

    def __init__(self, where: str, address: str, session: Session) -> None:
        self.where = where
        self.channel = Channel(address, OPTIONS)
        self.session = session
        self.changing = threading.Lock()

    def submit(self, call: Call, *, background: bool = False) -> None:
        """Send a request."""
        with self.changing:
            for push in call.exchange.pushes:
                self.session.number(push.header)
        call.message = codec.encode_exchange(call.exchange)
        self._send(call)

    def wait(self, call: Call) -> codec.Exchanged:
        """The answer to a submitted call; raises a PsError."""
        applied = False
        try:
            while True:
                try:
                    answer = codec.decode_exchanged(call.handle.result())
                    applied = True
                    return answer
                except Cancelled:
                    self._send(call)
                except grpc.RpcError as failure:
                    self._again(call, rpc_error(failure, self.where))
        finally:
            with self.changing:
                for push in call.exchange.pushes:
                    self.session.over(push.header, applied=applied)

    def watch(self, now: float) -> None:
        """Nothing: each call has its own deadline."""

    def close(self) -> None:
        """Close the channel; calls that wait fail."""
        self.channel.close()

    def _send(self, call: Call) -> None:
        call.attempts += 1
        left = max(call.deadline - time.monotonic(), 0.001)
        call.handle = self.channel.start("/ps.v1.RowService/Exchange", call.message, left)

    def _again(self, call: Call, error: PsError) -> None:
        """Send a failed call once more where that may help, or raise its error."""
        pause = pause_before(call, error)
        if pause is None and isinstance(error, Unavailable):
            pause = min(FIRST_PAUSE * 2 ** min(call.attempts, 8), LONGEST_PAUSE)
        if pause is None or time.monotonic() + pause >= call.deadline:
            raise error
        time.sleep(pause)
        if isinstance(error, SessionExpired):
            with self.changing:
                renumber(call, self.session)
            call.message = codec.encode_exchange(call.exchange)
        self._send(call)


def delete(
    link: Link | UnaryLink, header: pb.PushHeader, keys: codec.Keys, deadline: float
) -> pb.DeleteResponse:
    """Delete rows of one shard, once, however often it must be asked; raises a PsError."""
    session, attempts, data = link.session, 0, None
    with link.changing:
        session.number(header)

    def attempt(left: float) -> bytes:
        nonlocal attempts
        attempts += 1
        message = codec.encode_delete(header, keys)
        return link.channel.call("/ps.v1.RowService/Delete", message, left)

    try:
        try:
            data = retry(attempt, link.where, deadline, itertools.count())
        except SessionExpired:
            if attempts > 1:
                raise
            with link.changing:  # refused at its first attempt, so never applied
                if header.incarnation == session.incarnation:
                    session.renew()
                session.number(header)
            data = retry(attempt, link.where, deadline, itertools.count())
    finally:
        with link.changing:
            session.over(header, applied=data is not None)
    response: pb.DeleteResponse = pb.DeleteResponse.FromString(data)
    return response
