"""Write a TOML file that lists all settings of a server, each with its description."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from psserver.config import ServerConfig
from psserver.memory import show
from psserver.tablesettings import TableSettings

WIDTH = 100  # maximum length of a line
TABLES = "tables"  # the only setting that is a section
HEADER = """\
All settings of a server. A line with # is a default or an example: remove the # to change it.
Written by `psserver settings`; to update the comments: `psserver settings --config FILE`."""


def given(config: ServerConfig) -> dict[str, Any]:
    """Return setting -> value of the settings that do not have their defaults by omission."""
    found = {name: getattr(config, name) for name in config.model_fields_set}
    if TABLES in found:
        found[TABLES] = {
            table: {name: getattr(each, name) for name in each.model_fields_set}
            for table, each in config.tables.items()
        }
    return found


def document(given: Mapping[str, Any]) -> str:
    """Return a TOML file with all settings.

    given  setting -> value; other settings are written as comments, with their defaults
    """
    parts = [_comment(HEADER)]
    for name, field in ServerConfig.model_fields.items():
        if name != TABLES:
            parts.append(_setting(name, field, given))
    tables = given.get(TABLES) or {}
    parts.append(_comment(_description(ServerConfig.model_fields[TABLES])))
    parts += [_section(name, values) for name, values in tables.items()]
    if not tables:
        parts.append(_section("user", None))
    return "\n".join(parts)


def _section(table: str, given: Mapping[str, Any] | None) -> str:
    """Return the section [tables.NAME]; as a comment if ``given`` is None."""
    head = f"[{TABLES}.{table if table.isidentifier() else json.dumps(table)}]\n"
    if given is None:
        head = f"# {head}"
    fields = TableSettings.model_fields.items()
    return head + "\n".join(_setting(name, field, given or {}) for name, field in fields)


def _setting(name: str, field: FieldInfo, given: Mapping[str, Any]) -> str:
    """Return description and line of one setting; the line is a comment if it is not given."""
    text = _comment(f"{_description(field)}. {_default(name, field)}")
    if name in given:
        return f"{text}{name} = {_value(given[name])}\n"
    value = _example(field) if field.default is None or field.default_factory else field.default
    return f"{text}# {name} = {_value(value)}\n"


def _default(name: str, field: FieldInfo) -> str:
    """Return a sentence about the default of a setting."""
    if field.default_factory is not None:
        return "Default: from the memory limit."
    if field.default is None:
        return "Not set by default."
    unit = f", {show(field.default)}" if name.endswith("_bytes") and field.default else ""
    return f"Default: {_value(field.default)}{unit}."


def _description(field: FieldInfo) -> str:
    assert field.description is not None
    return field.description


def _example(field: FieldInfo) -> Any:
    """Return the example value of a setting that has no fixed default."""
    assert field.examples
    return field.examples[0]


def _value(value: Any) -> str:
    """Return a number or a text in the syntax of TOML."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _comment(text: str) -> str:
    """Return text as comment lines of at most WIDTH characters."""
    lines = (textwrap.wrap(line, WIDTH - 2, break_on_hyphens=False) for line in text.splitlines())
    return "".join(f"# {line}\n" for each in lines for line in each)
