"""Read the settings of a server from flags, environment variables, a TOML file, or defaults.

A flag overrides an environment variable PSCONFIG_*, which overrides the file. A setting with an
unknown name is an error, whether it is a flag, a variable or a line of the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliImplicitFlag,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from psserver.addresses import is_loopback
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
    http_token_file: Path | None = Field(
        None,
        examples=["/etc/psserver/http-token"],
        description="File with a token that requests to the HTTP port (metrics_port) need, except"
        " /livez and /readyz: as a bearer token, or as the password that browsers ask for. Without"
        " it, everybody who reaches the port sees names and sizes of tables",
    )
    audit_file: Path | None = Field(
        None,
        examples=["/var/log/psserver/audit.jsonl"],
        description="File to which a line is appended for each change of tables or checkpoints and"
        " for refused attempts. Without it, the lines go to the server's log if policy_file is set,"
        " and otherwise nowhere",
    )
    plaintext: CliImplicitFlag[bool] = Field(
        False,
        description="Permit to serve without TLS on an address that other machines can reach."
        " Whoever reaches the port can then read the traffic. A loopback address needs no"
        " permission",
    )
    tls_certificate: Path | None = Field(
        None,
        examples=["/etc/psserver/tls/tls.crt"],
        description="File with the server's certificate in PEM, followed by those that lead to its"
        " CA. With it, all clients must use TLS. It and the files of tls_key and tls_ca are read"
        " again when they change; open connections stay open",
    )
    tls_key: Path | None = Field(
        None,
        examples=["/etc/psserver/tls/tls.key"],
        description="File with the private key of tls_certificate, in PEM and without a password",
    )
    tls_ca: Path | None = Field(
        None,
        examples=["/etc/psserver/tls/ca.crt"],
        description="File with the certificates of the CAs that sign certificates of clients, in"
        " PEM",
    )
    tls_client_auth: Literal["required", "none"] = Field(
        "required",
        description="Whether clients must have a certificate that a CA of tls_ca signed: required,"
        " or none. With none, only tokens tell clients apart",
    )

    @model_validator(mode="after")
    def _complete_tls(self) -> Self:
        needed = ["tls_certificate", "tls_key"]
        needed += ["tls_ca"] if self.tls_client_auth == "required" else []
        missing = [field for field in needed if getattr(self, field) is None]
        given = [
            field
            for field in ("tls_certificate", "tls_key", "tls_ca")
            if getattr(self, field) is not None
        ]
        if given and missing:
            raise ValueError(
                f"{missing[0]}: must be set, because {given[0]} is set; with"
                f" tls_client_auth={self.tls_client_auth}, TLS needs {', '.join(needed)}"
            )
        if not given and "tls_client_auth" in self.model_fields_set:
            raise ValueError(
                f"tls_client_auth: {self.tls_client_auth} has no effect without TLS; set"
                f" {', '.join(needed)}, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _no_plaintext_by_accident(self) -> Self:
        if self.tls or self.plaintext or is_loopback(self.host):
            return self
        raise ValueError(
            f"plaintext: with host={self.host} other machines can reach this server, and without"
            " TLS they can read and change all rows. Set tls_certificate, tls_key and tls_ca"
            " (docs/security.md), or host=127.0.0.1 if all clients are on this machine, or"
            " plaintext=true if you trust every machine that can reach the port"
        )

    @property
    def tls(self) -> bool:
        """Whether clients must use TLS."""
        return self.tls_certificate is not None

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
