"""Plan: what a load test sends, and with how many clients."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from psclient.choices import DURABILITIES, WIRES, Durability, Wire
from psclient.errors import InvalidArgument
from psclient.schema import MAX_DIM

MIXES = {
    "C": "pulls only",
    "F": "training steps: pull, then push to the same keys",
    "X": "training steps by exchange: push to the keys of the last step and pull, in one message",
    "B": "95 % pulls, 5 % pushes",
    "D": "95 % pulls of recent keys, 5 % pushes of new keys",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Settings of a load test that stay the same over all its runs. Checked when it is created.

    A request has ``batch`` keys of each table.
    """

    mix: str = "F"  # a key of MIXES
    tables: int = 1
    keys: int = 100_000  # per table; mix D: number of recent keys that are read
    dim: int = 32
    batch: int = 1000
    skew: float = 0.99  # exponent of the Zipf distribution of keys; 0: all are equally frequent
    clients: int = 4  # each is a psclient.Client with its own connections
    processes: int = 1  # processes that the clients are divided among
    in_flight: int = 64  # open loop: maximum number of requests in flight, of all clients together
    seed: int = 0
    prefix: str = "bench"  # the tables are PREFIX.0, PREFIX.1 and so on
    optimizer: str = "adagrad"
    durability: Durability = "log"
    wire: Wire = "float32"
    timeout: float = 10.0  # seconds of each request
    retry_refused: bool = False  # whether clients repeat refused requests, as psclient does

    def __post_init__(self) -> None:
        _require(self.mix in MIXES, "mix", f"one of {', '.join(MIXES)}", self.mix)
        _require(self.wire in WIRES, "wire", f"one of {', '.join(WIRES)}", self.wire)
        _require(
            self.durability in DURABILITIES,
            "durability",
            f"one of {', '.join(DURABILITIES)}",
            self.durability,
        )
        for name, low, high in (
            ("tables", 1, 1000),
            ("keys", 1, 1 << 40),
            ("dim", 1, MAX_DIM),
            ("batch", 1, 1 << 20),
            ("processes", 1, 1024),
            ("clients", self.processes, 1 << 16),
            ("in_flight", self.processes, 1 << 16),
            ("seed", 0, (1 << 63) - 1),
        ):
            value = getattr(self, name)
            _require(low <= value <= high, name, f"in {low}..{high}", value)
        _require(0 <= self.skew <= 10, "skew", "in 0..10", self.skew)
        _require(0 < self.timeout <= 3600, "timeout", "in 0..3600 s, but not 0", self.timeout)
        _require(bool(self.prefix), "prefix", "not empty", self.prefix)

    @property
    def names(self) -> list[str]:
        """Return the names of the tables."""
        return [f"{self.prefix}.{number}" for number in range(self.tables)]

    def as_json(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)


def plan_of(values: dict[str, Any]) -> Plan:
    """Return the Plan that ``as_json`` of another process returned; ignore unknown names."""
    known = {each.name for each in fields(Plan)}
    return Plan(**{name: value for name, value in values.items() if name in known})


def check_run(rate: float, seconds: float, warmup: float) -> None:
    """Check the arguments of a run; ``Fleet.run`` explains them. Raises InvalidArgument."""
    _require(math.isfinite(rate) and 0 <= rate <= 1e7, "rate", "in 0..10,000,000", rate)
    _require(0 < seconds <= 86_400, "seconds", "in 0..86,400, but not 0", seconds)
    _require(0 <= warmup <= 86_400, "warmup", "in 0..86,400", warmup)


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise InvalidArgument that names a setting, its rule and its value, unless ``condition``."""
    if not condition:
        raise InvalidArgument(f"{name} must be {rule}, got {value!r}")
