"""Names of tables: new ones follow the rule, those that are stored already still load."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import Home, push, schema

from psproto import names
from psserver.errors import BadRequest

ODD = "a/../../x"  # older releases allowed it


def test_a_shard_creates_no_table_of_a_bad_name(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        with pytest.raises(BadRequest, match=r"^table name must be .*, got 'a/\.\./\.\./x'$"):
            home.shard.create_table(schema(ODD))
        assert home.shard.tables() == []


def test_a_stored_table_of_such_a_name_still_loads_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older, Home(tmp_path) as home:
        older.setattr(names, "problem", lambda *_: None)
        home.shard.create_table(schema(ODD))
        home.shard.exchange([push([1, 2], table=ODD)], [])
    for flushed in (False, True):  # from the log, then from the base
        with Home(tmp_path) as home:
            assert home.shard.create_table(schema(ODD)) == schema(ODD)  # as a trainer starts
            assert home.shard.describe(ODD)[1].rows == 2
            home.shard.exchange([push([1], table=ODD)], [])
            if not flushed:
                home.flusher.flush()
    with Home(tmp_path) as home:
        home.shard.drop_table(ODD)
        assert home.shard.tables() == []
