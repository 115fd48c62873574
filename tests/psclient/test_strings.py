"""Keys of strings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xxhash

from psclient import hash_keys
from psclient.errors import (
    InvalidArgument,
)


class TestStrings:
    @pytest.mark.slow
    def test_keys_of_strings_are_xxh64(self) -> None:
        random = np.random.default_rng(12)
        strings: list[Any] = ["", "a", "male", "ж", "日本語", "🙂" * 9, b"\0", b"\xff\xfe"]
        strings += [random.bytes(n) for n in range(100)]
        encoded = [s.encode() if isinstance(s, str) else s for s in strings]
        expected = [xxhash.xxh64_intdigest(s) for s in encoded]
        keys = hash_keys(strings)
        assert keys.dtype == np.uint64
        assert keys.tolist() == expected

    @pytest.mark.parametrize(
        "strings", ["male", b"ab", [1, 2], [b"a", None], ["\ud800"], [bytearray(2)]]
    )
    def test_what_is_no_list_of_strings_is_refused(self, strings: Any) -> None:
        with pytest.raises(InvalidArgument, match="strings must be "):
            hash_keys(strings)

    def test_no_strings_give_no_keys(self) -> None:
        assert hash_keys([]).shape == (0,)
