"""The schema of a table: all settings that are chosen when the table is created."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from storage.admission.rules import Admission, Always
from storage.errors import SchemaMismatch
from storage.eviction.contract import LAST_STEP, Eviction, require_distinct
from storage.initializers import Initializer
from storage.optimizer import Optimizer

MAX_DIM = 8192
MAX_STEP_AHEAD = 100_000_000  # steps; the default
Durability = Literal["applied", "log", "fsync"]
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSchema:
    """All settings of a table. Altering a table replaces its schema by a new one.

    The constructor raises ValueError, which names the table and the field, for a value that is not
    allowed.
    """

    name: str
    dim: int  # numbers in an embedding, the part of a row that a pull returns
    optimizer: Optimizer
    initializer: Initializer
    seed: int = 0  # seed of the initial values
    serving_default: float = 0.0  # every number that a serving pull returns for keys without a row
    durability: Durability = "log"  # durability of pushes that do not set one
    admission: Admission = field(default_factory=Always)  # which keys get a row
    evictions: tuple[Eviction, ...] = ()  # which rows are evicted; at most one rule per cause
    max_step_ahead: int = MAX_STEP_AHEAD  # a push's step - the table's step; 0: no limit

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"table name must be 1..128 letters, digits or any of _ . / - and start with a"
                f" letter, a digit or _, got {self.name[:200]!r}"
            )
        if not 1 <= self.dim <= MAX_DIM:
            raise ValueError(f"table {self.name!r}: dim must be in 1..{MAX_DIM}, got {self.dim}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"table {self.name!r}: seed must be in 0..2^64-1, got {self.seed}")
        if not math.isfinite(self.serving_default):
            raise ValueError(
                f"table {self.name!r}: serving_default must be finite, got {self.serving_default}"
            )
        if not 0 <= self.max_step_ahead <= LAST_STEP:
            raise ValueError(
                f"table {self.name!r}: max_step_ahead must be in 0..2^47-1, got"
                f" {self.max_step_ahead}"
            )
        try:
            require_distinct(self.evictions)
        except ValueError as error:
            raise ValueError(f"table {self.name!r}: {error}") from error

    @property
    def width(self) -> int:
        """Number of float32 numbers in a row: ``dim`` plus those of the optimizer state."""
        return self.dim + self.optimizer.state_width(self.dim)

    def require_equal(self, asked: TableSchema) -> None:
        """Raise SchemaMismatch, which names the first field that differs, unless ``asked`` equals
        this schema.

        asked  schema in a request to create this table
        """
        for each in dataclasses.fields(self):
            existing, requested = getattr(self, each.name), getattr(asked, each.name)
            if existing != requested:
                raise SchemaMismatch(self.name, each.name, existing, requested)
