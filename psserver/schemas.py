"""Convert table schemas from and to protobuf messages, and from and to JSON for storage."""

from __future__ import annotations

import dataclasses
from typing import Any

from google.protobuf import json_format

from psproto import ps_pb2 as pb
from psserver.errors import BadRequest
from storage.admission.rules import Admission, make_admission
from storage.eviction.contract import Eviction
from storage.eviction.rules import EVICTIONS, make_eviction
from storage.initializers import make_initializer
from storage.optimizers import make_optimizer
from storage.schema import MAX_STEP_AHEAD, Durability, TableSchema

LEVELS: dict[int, Durability] = {
    pb.DURABILITY_APPLIED: "applied",
    pb.DURABILITY_LOG: "log",
    pb.DURABILITY_FSYNC: "fsync",
}
DURABILITIES: dict[Durability, pb.Durability] = {
    level: number  # type: ignore[misc]
    for number, level in LEVELS.items()
}


def read_schema(message: pb.TableSchema) -> TableSchema:
    """Return the schema in a message, with defaults for the fields that are not set.

    Raises BadRequest for an invalid value; its message names the table, the field and the limits.
    """
    try:
        return TableSchema(
            name=message.name,
            dim=message.dim,
            optimizer=make_optimizer(
                message.optimizer.name or "adagrad", None, dict(message.optimizer.parameters)
            ),
            initializer=make_initializer(
                message.initializer.name or "uniform", dict(message.initializer.parameters)
            ),
            seed=message.seed,
            max_step_ahead=(
                message.max_step_ahead if message.HasField("max_step_ahead") else MAX_STEP_AHEAD
            ),
            serving_default=message.serving_default,
            durability=read_durability(message),
            admission=read_admission(message),
            evictions=read_evictions(message),
        )
    except ValueError as error:
        raise refused(message.name, error) from error


def refused(table: str, error: ValueError) -> BadRequest:
    """Return a BadRequest with the text of ``error``.

    table  name of the table, which is put before the text unless the text contains it
    """
    text = str(error)
    where = "" if repr(table) in text else f"table {table[:200]!r}: "
    return BadRequest("INVALID_ARGUMENT", where + text)


def read_durability(message: pb.TableSchema) -> Durability:
    """Return the table's default durability in a message: "log" if it is not set.

    Raises ValueError for an unknown number.
    """
    level = LEVELS.get(message.durability or pb.DURABILITY_LOG)
    if level is None:
        raise ValueError(
            f"durability must be 1 (applied), 2 (log) or 3 (fsync), got {message.durability}"
        )
    return level


def read_admission(message: pb.TableSchema) -> Admission:
    """Return the table's admission rule in a message: "always" if it is not set.

    Raises ValueError if it is invalid.
    """
    rule = message.admission
    return make_admission(rule.name or "always", dict(rule.parameters))


def read_evictions(message: pb.TableSchema) -> tuple[Eviction, ...]:
    """Return the table's eviction rules in a message, sorted by name.

    Raises ValueError if one is invalid, or if there are more rules than kinds of rules.
    """
    if len(message.evictions) > len(EVICTIONS):
        raise ValueError(
            f"a table may have at most {len(EVICTIONS)} eviction rules,"
            f" got {len(message.evictions)}"
        )
    rules = [make_eviction(rule.name, dict(rule.parameters)) for rule in message.evictions]
    return tuple(sorted(rules, key=lambda rule: rule.name))


def write_schema(schema: TableSchema) -> pb.TableSchema:
    """Convert a schema to a message, with every field and every parameter of the rules."""
    return pb.TableSchema(
        name=schema.name,
        dim=schema.dim,
        optimizer=_rule(schema.optimizer),
        initializer=_rule(schema.initializer),
        seed=schema.seed,
        serving_default=schema.serving_default,
        durability=DURABILITIES[schema.durability],
        admission=_rule(schema.admission),
        evictions=map(_rule, schema.evictions),
        max_step_ahead=schema.max_step_ahead,
    )


def to_json(schema: TableSchema) -> dict[str, Any]:
    """Convert a schema to a dict that json.dumps accepts; ``from_json`` is the inverse."""
    values = json_format.MessageToDict(write_schema(schema), preserving_proto_field_name=True)
    return dict(values)


def from_json(values: dict[str, Any]) -> TableSchema:
    """Convert a dict that ``to_json`` returned back to a schema.

    Raises BadRequest for an invalid value, json_format.Error for a dict of a different form.
    """
    return read_schema(json_format.ParseDict(values, pb.TableSchema()))


def _rule(rule: Any) -> pb.Rule:
    """Convert a rule to a message with its name and all parameters.

    rule  an optimizer, an initializer, an admission rule or an eviction rule: a dataclass whose
          fields are its parameters
    """
    fields = dataclasses.fields(rule)
    parameters = {field.name: float(getattr(rule, field.name)) for field in fields}
    return pb.Rule(name=rule.name, parameters=parameters)
