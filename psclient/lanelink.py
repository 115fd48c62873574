"""LaneLink: connection to one shard through the same-host lane, or else through a gRPC stream.

A shard that offers a lane says so in its answer to GetServerInfo. The client opens the socket that
the answer names, and sends the token that it has: so it knows that the server there is the shard,
and that both are on one host. If the lane cannot be used, the link uses gRPC, or refuses every call
if the user demands the lane. When the lane breaks, the link asks the shard for its lane again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import grpc
from google.protobuf.message import DecodeError

from psclient.access import PLAIN, Access
from psclient.channel import Cancelled
from psclient.errors import NoLane, PermissionDenied, PsError, Unauthenticated
from psclient.lanepipe import HELLO_SECONDS, LanePipe
from psclient.pipe import GrpcPipe, Pipe, PipeLost
from psclient.retry import rpc_error
from psclient.routes import Route
from psclient.session import Call, Session
from psclient.stream import StreamLink
from psproto import codec
from psproto import ps_pb2 as pb

ASK_SECONDS = 1.0  # maximum time to ask the shard for its lane
SHORTEST = 0.05  # seconds that a server gets to answer the first message, whatever the deadlines
INFO = "/ps.v1.InfoService/GetServerInfo"


class _NoPipe:
    """A pipe that cannot be used: a lane that is demanded, but not there.

    why  the reason
    """

    def __init__(self, why: str) -> None:
        self._why = why

    def send(self, call: Call) -> None:
        call.keep()

    def receive(self) -> tuple[int, codec.Exchanged | pb.Status]:
        raise PipeLost(self._why)

    def answered(self, id: int) -> None:
        pass

    def delay(self) -> float:
        return 0.0

    def end(self) -> None:
        pass

    def cancel(self) -> None:
        pass


class LaneLink(StreamLink):
    """Connection to one shard through the same-host lane, if possible. Link explains the methods.

    demanded  whether calls fail if there is no lane; otherwise they use gRPC

    why  why the lane is not in use; "": it is
    """

    def __init__(
        self,
        where: str,
        route: Route,
        session: Session,
        access: Access = PLAIN,
        *,
        demanded: bool = False,
    ) -> None:
        super().__init__(where, route, session, access)
        self.why = "the shard was not asked yet"
        self._demanded = demanded
        self._offer: pb.Lane | None = None
        self._look = False  # whether to ask the shard for its lane before the next call

    def offered(self, info: pb.GetServerInfoResponse) -> None:
        """Take the shard's answer to GetServerInfo, and open its lane.

        Raises NoLane if the lane is demanded, but cannot be used.
        """
        with self.lock:
            self._take_offer(info)
            if self._offer is not None and self._pipe is None:
                self._reopen()
            if self._demanded and self.why:
                raise NoLane(
                    f"{self.where}: lane='require', but the lane cannot be used: {self.why}"
                )

    def submit(self, call: Call, *, background: bool = False) -> None:
        if self._look:
            self._look = False
            self._ask(call.deadline)
            if self._offer is not None:
                with self.lock:
                    pipe = self._drop_pipe()
                if pipe is not None:
                    pipe.cancel()
        super().submit(call, background=background)

    def _new_pipe(self, calls: Sequence[Call]) -> Pipe:
        if self._offer is not None:
            try:
                pipe = LanePipe(self._offer, _patience(calls))
                for call in calls:
                    pipe.send(call)
            except NoLane as error:
                self.why, self._offer = str(error), None
            else:
                self.why = ""
                return pipe
        return _NoPipe(self.why) if self._demanded else GrpcPipe(self.channel, calls)

    def _send(self, call: Call) -> None:
        try:
            super()._send(call)
        except NoLane as error:  # no memory for a region
            call.attempts -= 1
            self.why, self._offer = str(error), None
            pipe = self._drop_pipe()
            self._reopen()
            if pipe is not None:
                pipe.cancel()

    def _lost(self, pipe: Pipe, deadline: float) -> None:
        if isinstance(pipe, LanePipe) and pipe.refused:
            with self.lock:
                self.why, self._offer = pipe.refused, None
        elif isinstance(pipe, LanePipe | _NoPipe):
            self._ask(deadline)

    def _recovered(self) -> None:
        self._look = not isinstance(self._pipe, LanePipe)

    def _ask(self, deadline: float) -> None:
        """Ask the shard for its lane. The caller does not hold the lock.

        If the shard refuses this client, all unanswered calls fail with that error.

        deadline  monotonic seconds at which the caller must have its answer
        """
        seconds = min(ASK_SECONDS, max(deadline - time.monotonic(), 0.001))
        try:
            request = pb.GetServerInfoRequest().SerializeToString()
            answer = self.channel.call(INFO, request, seconds)
            info = pb.GetServerInfoResponse.FromString(answer)
        except (grpc.RpcError, Cancelled, PsError, DecodeError) as error:
            if isinstance(error, grpc.RpcError):
                error = rpc_error(error, self.channel, self.where)
            with self.lock:
                self._offer, self.why = None, f"the shard does not answer: {error}"
                if isinstance(error, Unauthenticated | PermissionDenied):
                    for call in [each for each in self._open.values() if not each.done]:
                        self._settle(call, None, error)
            return
        with self.lock:
            self._take_offer(info)

    def _take_offer(self, info: pb.GetServerInfoResponse) -> None:
        """Remember the lane that the shard offers. The caller holds the lock."""
        self._offer = info.lane if info.HasField("lane") else None
        if self._offer is None:
            self.why = "the server offers none: start it with lane=on"


def _patience(calls: Sequence[Call]) -> float:
    """Return how long to wait for a lane to open, in seconds: until the first of the deadlines."""
    first = min((call.deadline for call in calls), default=math.inf)
    return min(HELLO_SECONDS, max(first - time.monotonic(), SHORTEST))
