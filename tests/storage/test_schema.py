"""Schemas: which values are valid, and which field an error names."""

from __future__ import annotations

from typing import Any

import pytest

from storage.admission.rules import make_admission
from storage.errors import SchemaMismatch
from storage.eviction.rules import make_eviction
from storage.initializers import make_initializer
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.schema import MAX_DIM, TableSchema

DIM = 3
MASK = 2**64 - 1


def schema(**changes: Any) -> TableSchema:
    fields: dict[str, Any] = {
        "name": "t",
        "dim": DIM,
        "optimizer": make_optimizer("sgd", 0.5, {}),
        "initializer": make_initializer("uniform", {}),
        "seed": 7,
        "serving_default": -2.5,
    }
    return TableSchema(**{**fields, **changes})


NAME_RULE = (
    "table name must be 1..128 letters, digits or any of _ . / - and start with a letter, a digit"
    " or _, got "
)


@pytest.mark.parametrize("name", ["a", "Z", "0", "_", "a" * 128, "users/v1.2-b_c", "9.", "__"])
def test_a_good_name_is_accepted(name: str) -> None:
    assert schema(name=name).name == name


@pytest.mark.parametrize(
    "name", ["", "a" * 129, ".a", "-a", "/a", "a b", "a\n", "ä", "a:b", " a", "a\0"]
)
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^table name") as caught:
        schema(name=name)
    assert str(caught.value) == NAME_RULE + repr(name)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("dim", 0, "dim must be in 1..8192, got 0"),
        ("dim", -1, "dim must be in 1..8192, got -1"),
        ("dim", MAX_DIM + 1, "dim must be in 1..8192, got 8193"),
        ("seed", -1, "seed must be in 0..2^64-1, got -1"),
        ("seed", 1 << 64, "seed must be in 0..2^64-1, got 18446744073709551616"),
        ("serving_default", float("nan"), "serving_default must be finite, got nan"),
        ("serving_default", float("inf"), "serving_default must be finite, got inf"),
        ("serving_default", float("-inf"), "serving_default must be finite, got -inf"),
    ],
)
def test_a_rule_that_is_broken_is_named_with_the_table_and_the_value(
    field: str, value: Any, rule: str
) -> None:
    with pytest.raises(ValueError, match=r"^table 't': ") as caught:
        schema(**{field: value})
    assert str(caught.value) == f"table 't': {rule}"


@pytest.mark.parametrize(
    ("field", "value"), [("dim", 1), ("dim", MAX_DIM), ("seed", 0), ("seed", MASK)]
)
def test_the_ends_of_the_ranges_are_accepted(field: str, value: int) -> None:
    assert getattr(schema(**{field: value}), field) == value


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_row_is_the_embedding_and_the_state(optimizer: str) -> None:
    rule = make_optimizer(optimizer, None, {})
    for dim in (1, 8, 33):
        assert schema(dim=dim, optimizer=rule).width == dim + len(rule.initial_state(dim))


CHANGES = {
    "name": "u",
    "dim": 4,
    "optimizer": make_optimizer("sgd", 0.25, {}),
    "initializer": make_initializer("normal", {}),
    "seed": 8,
    "serving_default": 0.0,
    "durability": "fsync",
    "admission": make_admission("counter", {"threshold": 3}),
    "evictions": (make_eviction("norm", {}),),
    "max_step_ahead": 5,
}


@pytest.mark.parametrize("field", TableSchema.__dataclass_fields__)
def test_the_field_in_which_two_schemas_differ_is_named(field: str) -> None:
    held = schema()
    held.require_equal(schema())
    with pytest.raises(SchemaMismatch) as caught:
        held.require_equal(schema(**{field: CHANGES[field]}))
    assert (caught.value.table, caught.value.field) == ("t", field)
    assert str(caught.value) == (
        f"table 't' exists with {field} {getattr(held, field)!r}, but {CHANGES[field]!r} was"
        " requested"
    )


def test_of_several_differences_the_first_is_named() -> None:
    with pytest.raises(SchemaMismatch, match=r"exists with dim 3, but 4 was requested"):
        schema().require_equal(schema(dim=4, seed=9))
