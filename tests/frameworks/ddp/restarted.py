"""One rank of a job that torchrun restarts, and a process of rank 0 that outlives the restart.

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 restarted.py ADDRESSES TABLE DIRECTORY
    restarted.py ADDRESSES TABLE DIRECTORY IDENTITY.json   # the process that outlives its rank

The first attempt pushes, then its rank 1 fails. The second attempt pushes and ends. After that, the
process that has the identity of the first attempt's rank 0 pushes once more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from psclient import Client, Table, rank_identity
from psclient.errors import SessionExpired

KEYS = np.arange(20)
SECONDS = 120


def push(table: Table) -> None:
    """Move the rows of KEYS by -1."""
    table.push(KEYS, np.ones((len(KEYS), table.dim), np.float32))


def outlive(client: Client, table: str, directory: Path) -> None:
    """Push; wait until the second attempt has pushed; push again, and note what came of it."""
    push(client.table(table))
    (directory / "pushed").touch()
    for rank in range(2):
        wait_for(directory / f"done{rank}")
    note = "pushed"
    try:
        push(client.table(table))
    except SessionExpired as error:
        note = f"SessionExpired: {error}"
    (directory / "note.tmp").write_text(note)
    (directory / "note.tmp").rename(directory / "note")


def wait_for(path: Path) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def attempt(addresses: str, table: str, directory: Path) -> None:
    """Run as one rank of one attempt."""
    identity = rank_identity()
    again, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    (directory / f"{again}.{rank}.json").write_text(json.dumps(identity))
    if again:
        with Client(addresses.split(","), timeout=60.0, **identity) as client:
            push(client.table(table))
        (directory / f"done{rank}").touch()
        return
    if rank == 0:
        command = [sys.executable, __file__, addresses, table, str(directory)]
        subprocess.Popen([*command, json.dumps(identity)], start_new_session=True)
    wait_for(directory / "pushed")
    if rank == 1:
        sys.exit(1)
    time.sleep(SECONDS)  # torchrun ends this process, because rank 1 has failed


if __name__ == "__main__":
    if len(sys.argv) > 4:
        with Client(sys.argv[1].split(","), timeout=60.0, **json.loads(sys.argv[4])) as former:
            outlive(former, sys.argv[2], Path(sys.argv[3]))
    else:
        attempt(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
