"""Settings of single tables, which are sections of a server's TOML file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LEAST_HBM = 32 << 20  # bytes; GPU memory is given to tables in pieces of up to this size


def _whole_piece(size: int) -> int:
    if 0 < size < LEAST_HBM:
        raise ValueError(f"must be 0, or at least {LEAST_HBM} (32 MiB)")
    return size


HbmBytes = Annotated[int, AfterValidator(_whole_piece)]


class TableSettings(BaseModel):
    """Settings of one table, from the section [tables.NAME] of the TOML file.

    They may be changed at each start. They need not name a table that exists.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host_bytes: int | None = Field(
        None,
        ge=1 << 20,
        examples=[1 << 30],
        description="Maximum memory for the rows and the index of this table, in bytes. Without it,"
        " only the setting host_bytes of the server limits the table",
    )
    hbm_bytes: HbmBytes | None = Field(
        None,
        ge=0,
        examples=[0],
        description="Maximum GPU memory for the rows of this table, in bytes, at least 32 MiB; 0:"
        " none. Without it, only the setting hbm_bytes of the server limits the table",
    )
    cache: Literal["lru", "lfu"] = Field(
        "lru",
        description="Rule that decides which rows leave memory first: lru, those that were not"
        " pushed for the longest time; lfu, those that were pushed least often",
    )
    half_life: float = Field(
        1e5,
        gt=0,
        description="With cache = lfu: number of training steps of the table after which a row that"
        " is not pushed counts as if it had been pushed half as often",
    )
