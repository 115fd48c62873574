"""A shard's data directory: whose it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from psproto.routing import ShardMap, even_map
from psserver.config import ConfigError
from psserver.datadir import OWNER, claim
from storage.errors import Corrupt


class TestClaim:
    def test_a_directory_is_its_shards_from_the_first_start_on(self, tmp_path: Path) -> None:
        for _ in range(2):
            claim(tmp_path, 1, even_map(2))
            assert os.listdir(tmp_path) == [OWNER]

    @pytest.mark.parametrize(("shard", "shards"), [(0, 2), (1, 3), (0, 1)])
    def test_another_shard_or_another_number_of_them_is_refused_with_both_named(
        self, tmp_path: Path, shard: int, shards: int
    ) -> None:
        claim(tmp_path, 1, even_map(2))
        with pytest.raises(ConfigError) as caught:
            claim(tmp_path, shard, even_map(shards))
        assert str(caught.value) == (
            f"data_dir: {tmp_path} is of shard 1 of 2 (shard map of epoch 1), and this is shard"
            f" {shard} of {shards} (shard map of epoch 1); for another number of shards:"
            " psctl checkpoint, psserver on new directories, psctl restore"
        )
        claim(tmp_path, 1, even_map(2))

    def test_another_map_of_as_many_shards_is_refused(self, tmp_path: Path) -> None:
        claim(tmp_path, 0, even_map(2))
        moved = ShardMap(2, even_map(2).shards, even_map(2).shard_of_bucket)
        with pytest.raises(ConfigError, match=r"epoch 1\), and this is .* epoch 2\)"):
            claim(tmp_path, 0, moved)

    def test_a_damaged_note_is_refused_by_name(self, tmp_path: Path) -> None:
        claim(tmp_path, 0, even_map(2))
        path = tmp_path / OWNER
        data = path.read_bytes()
        for at in range(0, len(data), 7):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(Corrupt, match=rf"^{path}: "):
                claim(tmp_path, 0, even_map(2))
