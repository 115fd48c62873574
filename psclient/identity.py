"""rank_identity: the identity under which one rank of a distributed job pushes."""

from __future__ import annotations

import os
import time
from typing import TypedDict

from psclient import checked
from psclient.errors import InvalidArgument
from psclient.strings import hash_keys

RUN, RANK = "TORCHELASTIC_RUN_ID", "RANK"  # environment variables that torchrun sets
NO_RUN = ("", "none")  # torchrun's run id if none was chosen: all such jobs have the same


class RankIdentity(TypedDict):
    """Arguments of Client that identify one process of a rank; see ``rank_identity``."""

    client_id: int
    incarnation: int
    renew: bool


def rank_identity(run: str | None = None, rank: int | None = None) -> RankIdentity:
    """Return arguments for Client by which a process that takes over a rank fences the former one.

    run   name of the job, which no other job uses; None: that of torchrun
    rank  number of this process in the job; None: that of torchrun

        ps = Client(addresses, **rank_identity())

    A job may restart a rank while its former process still runs, for example on a machine that was
    cut off. All processes of a rank have the same client_id. The incarnation is the time of the
    call in nanoseconds, so a later process has a larger one. As soon as a shard has received a push
    of the later process, it refuses those of the former with SessionExpired, and because of
    ``renew=False`` the former process raises this error.

    The clocks of machines must differ by less than a restart takes. torchrun's restart count is
    not used: it does not grow on machines whose processes restart because another machine failed,
    and with an equal incarnation a shard would take the first pushes of the later process for
    repetitions of earlier ones.

    Raises InvalidArgument if torchrun has set no rank, or no run id: give it one with
    ``--rdzv-id`` or ``--standalone``, a new one for each start of the job.
    """
    name = os.environ.get(RUN, "") if run is None else checked.text("run", run)
    if name in NO_RUN:
        raise InvalidArgument(
            f"run must be the name of the job, which no other job uses; got {name!r}"
            f" ({'environment variable ' + RUN if run is None else 'argument'}): start torchrun"
            " with --standalone or --rdzv-id, or pass run"
        )
    given = os.environ.get(RANK, "") if rank is None else str(rank)
    if not given.isdecimal():
        raise InvalidArgument(
            f"rank must be the number of this process in the job, 0 or more; got {given!r}: start"
            " the process by torchrun, or pass rank"
        )
    (client_id,) = hash_keys([f"{name}/{int(given)}"])
    return RankIdentity(client_id=int(client_id) or 1, incarnation=time.time_ns(), renew=False)
