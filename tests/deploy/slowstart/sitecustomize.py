"""Python imports this file at the start of each process of a simulated pod.

It makes the recovery of a shard take SECONDS longer, while the file /checkpoints/slow-SHARD exists,
as if the shard had a long log or a slow disk.
"""

import os
import sys
import time
from pathlib import Path

SECONDS = 75.0  # more than the failures that each probe of the manifest allows


def slow_down(mark: Path) -> None:
    """Let this process wait at the begin of its replay while the file ``mark`` exists."""
    from psserver import replay

    original = replay._replay

    def slowed(*arguments):  # type: ignore[no-untyped-def]
        end = time.monotonic() + SECONDS
        while mark.exists() and time.monotonic() < end:
            time.sleep(0.05)
        return original(*arguments)

    replay._replay = slowed


if sys.orig_argv[-1] == "serve":
    slow_down(Path(f"/checkpoints/slow-{os.environ['PSCONFIG_SHARD']}"))
