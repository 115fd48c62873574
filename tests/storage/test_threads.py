"""Background threads have names that the system shows."""

import threading
from pathlib import Path

from storage.threads import Background


def test_the_system_shows_the_first_15_bytes_of_the_name() -> None:
    found: list[str] = []

    def look() -> None:
        own = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
        found.append(own.read_text().rstrip("\n"))

    thread = Background("a name of many bytes", look)
    thread.start()
    thread.join()
    assert thread.daemon
    assert found == ["a name of many "]
