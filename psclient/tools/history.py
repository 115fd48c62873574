"""Growth of a table: a file of earlier analyses, one JSON object per line."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from psclient.errors import InvalidArgument
from psclient.tools.summary import Analysis


@dataclass(frozen=True, slots=True)
class Moment:
    """The main figures of one analysis."""

    time: float  # seconds since 1970
    table: str
    checkpoint: str | None
    rows: int
    bytes: int
    waiting: int  # keys that are counted for admission
    occurrences: int
    step: int


def append_history(path: Path, result: Analysis) -> None:
    """Append an analysis to a history file, which is created if it does not exist."""
    moment = Moment(
        round(result.time, 3),
        result.table,
        result.checkpoint,
        result.rows,
        result.bytes,
        result.waiting,
        result.occurrences,
        result.step,
    )
    with path.open("a") as file:
        file.write(json.dumps(asdict(moment)) + "\n")


def read_history(path: Path, table: str) -> list[Moment]:
    """Return the analyses of a table in a history file, by time.

    Raises InvalidArgument with the number of a line that is not an analysis.
    """
    moments = []
    with path.open(errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                moment = Moment(**json.loads(line))
                time.localtime(moment.time)
                int(moment.rows), int(moment.bytes), int(moment.waiting), int(moment.step)
            except (TypeError, ValueError, OverflowError, OSError) as error:
                raise InvalidArgument(
                    f"{path}: line {number} is not an analysis: {error}"
                ) from error
            if moment.table == table:
                moments.append(moment)
    return sorted(moments, key=lambda moment: moment.time)
