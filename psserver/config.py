"""Read the settings of a server from flags, environment variables, a TOML file, or defaults.

A flag overrides an environment variable PSCONFIG_*, which overrides the file. A setting with an
unknown name is an error, whether it is a flag, a variable or a line of the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from psserver.flaghelp import HelpFormatter
from psserver.shardsettings import ShardSettings
from psserver.unusable import ConfigError

PREFIX = "PSCONFIG_"  # not PS_: for a service named ps, Kubernetes injects variables PS_...
CONFIG = "PSCONFIG_FILE"  # variable with the path of the TOML file


class ServerConfig(ShardSettings):
    """Serve one shard until SIGTERM or SIGINT.

    Each setting can be given as a flag, as an environment variable PSCONFIG_<SETTING>, or as a line
    of a TOML file. The file is named by --config FILE or by the variable PSCONFIG_FILE. A flag
    overrides a variable, and a variable overrides the file. Exit status: 0 after a signal, 2 if the
    shard cannot start, 74 if its disk fails, 75 if its GPU fails.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_prog_name="psserver serve",
    )

    policy_file: Path | None = Field(
        None,
        examples=["/etc/psserver/policy.toml"],
        description="TOML file that names the principals who may use this server, and what each of"
        " them may do (docs/security.md). What it does not allow is refused. It is read again when"
        " it changes. Without it, everybody who reaches the port may do everything",
    )
    audit_file: Path | None = Field(
        None,
        examples=["/var/log/psserver/audit.jsonl"],
        description="File to which a line is appended for each change of tables or checkpoints and"
        " for refused attempts. Without it, the lines go to the server's log if policy_file is set,"
        " and otherwise nowhere",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # init has the file's values; flags override both


def load(flags: Sequence[str], environment: Mapping[str, str] | None = None) -> ServerConfig:
    """Return the configuration from flags, environment and the TOML file that they name.

    flags        arguments of ``psserver serve``
    environment  variable -> value; None: the environment of this process

    Raises ConfigError, which names each unknown or invalid setting.
    """
    environment = os.environ if environment is None else environment
    known = {PREFIX + name.upper() for name in ServerConfig.model_fields} | {CONFIG}
    unknown = sorted(n for n in environment if n.upper().startswith(PREFIX) and n not in known)
    if unknown:
        raise ConfigError(f"unknown environment variables: {', '.join(unknown)}")
    rest = list(flags)
    path = environment.get(CONFIG)
    for at, flag in enumerate(rest):
        name, joined, value = flag.partition("=")
        if name == "--config":
            if not joined and at + 1 == len(rest):
                raise ConfigError("--config: expected the path of a TOML file, got nothing")
            path = value if joined else rest[at + 1]
            del rest[at : at + 2 - len(joined)]
            break
    source = CliSettingsSource[Any](ServerConfig, formatter_class=HelpFormatter)
    try:
        return CliApp.run(ServerConfig, cli_args=rest, cli_settings_source=source, **_file(path))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in _causes(error))) from error


def _file(path: str | None) -> dict[str, Any]:
    """Return setting -> value from the TOML file ``path``. Returns {} if ``path`` is None.

    Raises ConfigError if the file cannot be read or contains an unknown setting.
    """
    if path is None:
        return {}
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:  # unreadable, not UTF-8, not TOML
        raise ConfigError(f"config file {path}: {error}") from error
    for name in values:
        if name not in ServerConfig.model_fields:
            raise ConfigError(f"config file {path}: {name}: unknown setting")
    return values


def _causes(error: ValidationError) -> list[Any]:
    """Return the items of ``error.errors()`` that are causes, not consequences of other items.

    If a setting is invalid, the defaults that are computed from it get items too. These are left
    out, because the setting has its own item.
    """
    items = error.errors()
    return [item for item in items if item["type"] != "default_factory_not_called"] or items


def _explain(item: Any) -> str:
    """Format one item of ``ValidationError.errors()`` as text: ``setting: rule, got value``."""
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name}: unknown setting"
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message}, got {item['input']!r}" if name else message
