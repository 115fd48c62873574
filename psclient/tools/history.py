"""File with the results of past analyses, one JSON object per line: it shows how a table grew."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from psclient.errors import InvalidArgument
from psclient.tools.summary import Analysis


@dataclass(frozen=True, slots=True)
class Moment:
    """The main numbers of one analysis. A history file has one Moment per line, as JSON."""

    time: float  # seconds since 1970
    table: str
    checkpoint: str | None  # name of the checkpoint; None: the live table
    rows: int
    bytes: int  # memory of the table
    waiting: int  # keys that wait for admission
    occurrences: int  # number of pushed occurrences of all keys with rows
    step: int  # largest training step pushed


def append_history(path: Path, result: Analysis) -> None:
    """Append an analysis to a history file; create the file if it does not exist."""
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
    """Return the analyses of a table in a history file, ordered by time.

    Raises InvalidArgument with the line number if a line is not an analysis.
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
                    f"{path}: line {number} is not an analysis, delete it: {error}"
                ) from error
            if moment.table == table:
                moments.append(moment)
    return sorted(moments, key=lambda moment: moment.time)
