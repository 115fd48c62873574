"""The one rule for names, and that all who create something follow it."""

from __future__ import annotations

import pytest

from psproto.names import LONGEST, RULES, problem

PARTS = ["a", "Z", "0", "_", "9.", "__", "a..b", "v1.2-b_c", "a" * LONGEST]
NEVER = [
    "",
    ".",
    "..",
    ".a",
    "-a",
    "a b",
    "a\n",
    "\na",
    "ä",
    "a:b",
    " a",
    "a\0",
    "a" * (LONGEST + 1),
]
PATHS = ["users/v1", "a/b/c", "_/0", "a/b..c"]
ESCAPES = ["/a", "a/", "/", "a//b", "a/./b", "a/../b", "a/../../x", "../a", "a/..", "a/.b", "a/-b"]


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", PARTS)
def test_one_part_is_a_name(kind: str, name: str) -> None:
    assert problem(kind, name) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", NEVER + ESCAPES)
def test_a_bad_name_is_refused_with_the_rule_and_the_name(kind: str, name: str) -> None:
    message = problem(kind, name)  # type: ignore[arg-type]
    assert message is not None
    assert message.startswith(f"{kind} name must be 1..128 letters, digits or any of _ . ")
    assert message.endswith(f"got {name!r}")


@pytest.mark.parametrize("name", PATHS)
def test_only_tables_and_barriers_have_parts(name: str) -> None:
    assert {kind for kind in RULES if problem(kind, name) is None} == {"table", "barrier"}  # type: ignore[arg-type]


def test_a_long_bad_name_is_not_repeated_in_full() -> None:
    message = problem("table", "?" * 100_000)
    assert message is not None
    assert len(message) < 500
