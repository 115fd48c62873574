"""Whole rows that are written while other clients drop and create tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stores import Direct, make_shard, schema

from psproto.codec import RowsMessage
from psserver.rows import RowTransfer
from storage.errors import UnknownTable


class Between(Direct):
    """Calls ``then`` after the first call."""

    def __init__(self, then: Any) -> None:
        self.then = then

    def run(self, call: Any) -> Any:
        answer, then, self.then = call(), self.then, lambda: None
        then()
        return answer


@pytest.mark.parametrize("dim", [1, 7])
def test_a_table_that_is_made_anew_gets_no_rows_of_another_width(dim: int) -> None:
    shard = make_shard()
    shard.create_table(schema("t", dim=2))

    def again() -> None:
        shard.drop_table("t")
        shard.create_table(schema("t", dim=dim))

    transfer: Any = RowTransfer(shard, Between(again), None, None)  # type: ignore[arg-type]
    keys = np.arange(3, dtype=np.uint64)
    message = RowsMessage(
        table="t",
        width=2,
        keys=memoryview(keys.tobytes()),
        rows=memoryview(np.ones((3, 2), np.float32).tobytes()),
        steps=memoryview(b""),
        frequencies=memoryview(b""),
    )
    with pytest.raises(UnknownTable):
        transfer.write_rows(message)
    assert not len(shard.dump()["t"].keys)
