"""How a table grew: a file that remembers analyses."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from psclient.errors import InvalidArgument
from psclient.tools.summary import Analysis


@dataclass(frozen=True, slots=True)
class Moment:
    """What a history remembers of an analysis."""

    time: float  # seconds since 1970
    table: str
    checkpoint: str | None
    rows: int
    bytes: int
    waiting: int
    occurrences: int
    step: int


def remember(path: Path, found: Analysis) -> None:
    """Append an analysis to a history, a file of one JSON object a line."""
    moment = Moment(
        round(found.time, 3),
        found.table,
        found.checkpoint,
        found.rows,
        found.bytes,
        found.waiting,
        found.occurrences,
        found.step,
    )
    with path.open("a") as file:
        file.write(json.dumps(asdict(moment)) + "\n")


def history(path: Path, table: str) -> list[Moment]:
    """What a history has of a table, by time; InvalidArgument names a line that has no analysis."""
    found = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                moment = Moment(**json.loads(line))
                float(moment.time), int(moment.rows), int(moment.bytes)
            except (TypeError, ValueError) as error:
                raise InvalidArgument(f"{path}: line {number} has no analysis: {error}") from error
            if moment.table == table:
                found.append(moment)
    return sorted(found, key=lambda moment: moment.time)
