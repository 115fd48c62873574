"""Alterations of a table: changes of the settings of a table that has rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psclient import checked
from psclient.choices import DURABILITIES
from psclient.errors import InvalidArgument, PsError
from psclient.schema import TableInfo, rule, table_info
from psproto import ps_pb2 as pb

STEPS = 1 << 47  # every training step is smaller than this number


@dataclass(frozen=True, slots=True)
class Alteration:
    """The result of altering a table's settings."""

    table: TableInfo  # settings and size of the table after the alteration
    dropped_counters: int  # keys that waited for admission and whose counts started again from 0


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
    """Build the request that changes those settings of table ``name`` that are not None.

    Client.alter_table explains the settings. Raises InvalidArgument for an invalid value, or if all
    settings are None.
    """
    at = f"table {checked.text('name', name)!r}: "
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
    fields += _set_rules(schema, at, admission, admission_args, eviction)
    if max_step_ahead is not None:
        ahead = checked.integer(f"{at}max_step_ahead", max_step_ahead, 0, STEPS)
        schema.max_step_ahead = ahead
        fields.append("max_step_ahead")
    if not fields:
        raise InvalidArgument(f"{at}expected at least one setting to alter, got none")
    return pb.AlterTableRequest(schema=schema, fields=fields)


def _set_rules(
    schema: pb.TableSchema,
    at: str,
    admission: str | None,
    admission_args: Mapping[str, float] | None,
    eviction: Mapping[str, Mapping[str, float]] | None,
) -> list[str]:
    """Set the admission and eviction rules that are not None; return the names of fields set.

    schema  written
    at      start of error messages: "table 'user': "

    Client.alter_table explains the other arguments. Raises InvalidArgument for an invalid value.
    """
    if admission is None and admission_args is not None:
        raise InvalidArgument(f"{at}admission_args requires admission, the name of the rule")
    fields = []
    if admission is not None:
        schema.admission.CopyFrom(rule(f"{at}admission", admission, admission_args))
        fields.append("admission")
    if eviction is not None:
        rules = checked.mapping(f"{at}eviction", eviction)
        schema.evictions.extend(rule(f"{at}eviction", *each) for each in rules.items())
        fields.append("evictions")
    return fields


def alteration_of(shards: Sequence[pb.AlterTableResponse]) -> Alteration:
    """Combine the answers of all shards to one alteration.

    Raises SchemaMismatch if the shards' settings differ because another client altered the table at
    the same time.
    """
    answers: Any = shards  # an AlterTableResponse has the fields of a DescribeTableResponse
    return Alteration(table_info(answers), sum(shard.dropped_counters for shard in shards))


def incomplete(name: str, error: PsError) -> PsError:
    """Append advice to the error of a shard that could not alter a table; return the new error.

    name   name of the table
    error  the shard's error

    The advice is to repeat the alteration, because other shards may have made it already.
    """
    whole = type(error)(
        f"{error}; other shards may have the new settings of table {name!r} already: repeat the"
        " same alteration to complete it"
    )
    whole.reason, whole.retry_after = error.reason, error.retry_after
    return whole
