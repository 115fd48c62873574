"""Settings of a live table: what an alteration asks for, and what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psclient import checked
from psclient.choices import DURABILITIES
from psclient.errors import InvalidArgument, PsError
from psclient.schema import TableInfo, rule, table_info
from psproto import ps_pb2 as pb

STEPS = 1 << 47  # steps are below


@dataclass(frozen=True, slots=True)
class Alteration:
    """A table after an alteration."""

    table: TableInfo
    dropped_counters: int  # of keys that waited for admission; they start again from zero


def alter_request(
    name: str,
    *,
    lr: float | None,
    serving_default: float | None,
    durability: str | None,
    admission: str | None,
    admission_args: Mapping[str, float] | None,
    eviction: Mapping[str, Mapping[str, float]] | None,
    max_step_ahead: int | None,
) -> pb.AlterTableRequest:
    """Return the request for the values that are not None; InvalidArgument for a bad value."""
    at = f"table {checked.text('name', name)!r}: "
    if admission is None and admission_args is not None:
        raise InvalidArgument(f"{at}admission_args without admission: name the rule, too")
    schema, fields = pb.TableSchema(name=name), []
    if lr is not None:
        schema.optimizer.parameters["lr"] = checked.number(f"{at}lr", lr)
        fields.append("lr")
    if serving_default is not None:
        schema.serving_default = checked.number(f"{at}serving_default", serving_default)
        fields.append("serving_default")
    if durability is not None:
        level = checked.one_of("durability", durability, DURABILITIES)
        schema.durability = level  # type: ignore[assignment]
        fields.append("durability")
    if admission is not None:
        schema.admission.CopyFrom(rule(f"{at}admission", admission, admission_args))
        fields.append("admission")
    if eviction is not None:
        rules = checked.mapping(f"{at}eviction", eviction)
        schema.evictions.extend(rule(f"{at}eviction", *each) for each in rules.items())
        fields.append("evictions")
    if max_step_ahead is not None:
        ahead = checked.integer(f"{at}max_step_ahead", max_step_ahead, 0, STEPS)
        schema.max_step_ahead = ahead
        fields.append("max_step_ahead")
    if not fields:
        raise InvalidArgument(f"{at}no setting to alter was given")
    return pb.AlterTableRequest(schema=schema, fields=fields)


def alteration_of(shards: Sequence[pb.AlterTableResponse]) -> Alteration:
    """Return what all shards answered, by shard, as one.

    Raises SchemaMismatch if another alteration came between, so that shards differ.
    """
    answers: Any = shards  # they have the fields of a description
    return Alteration(table_info(answers), sum(shard.dropped_counters for shard in shards))


def incomplete(name: str, error: PsError) -> PsError:
    """Return an error of one shard, with what it means for the others."""
    whole = type(error)(
        f"{error}; other shards may have the new settings of table {name!r} already: repeat the"
        " same alteration to complete it"
    )
    whole.reason, whole.retry_after = error.reason, error.retry_after
    return whole
