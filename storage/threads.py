"""Background threads that the system shows by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LONGEST = 15  # bytes of a name that Linux keeps


class Background(threading.Thread):
    """Daemon thread that runs a function; it does not keep the process from exiting.

    Tools such as ``top -H`` show its name. Without that, all threads are called "python".
    """

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        super().__init__(target=run, name=name, daemon=True)

    def run(self) -> None:
        """Tell the system the name, then run the function."""
        with suppress(OSError):  # no Linux, or /proc is not mounted
            own = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
            own.write_text(self.name[:LONGEST])
        super().run()
