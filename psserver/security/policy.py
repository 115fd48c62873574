"""A policy: which principals there are, how each proves who it is, and what each may do.

A principal is a person or a program that calls the server. A policy is a TOML file:

    [roles.trainer]                       # rights that several principals share
    grants = [{ verbs = ["pull", "push"], tables = ["ads.*"] }]

    [principals.trainer-a]
    tokens = ["9f86d081..."]              # SHA-256 of a bearer token, 64 hexadecimal digits
    certificates = ["uri:spiffe://prod/ns/ml/sa/trainer", "dns:trainer.ml.svc", "cn:trainer"]
    roles = ["trainer"]
    grants = [{ verbs = ["checkpoint"] }]
    requests_per_second = 1000            # 0 or absent: no limit
    bytes_per_second = 100e6
    inflight_bytes = 64e6

A pattern of table names has letters, digits and _ . / - and the wildcards * (any characters) and ?
(one character). What is not granted is denied.
"""

from __future__ import annotations

import fnmatch
import hmac
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from psserver.security.budgets import Limit
from psserver.security.verbs import ANY, SHARD_VERBS, TABLE_VERBS, VERBS
from psserver.unusable import ConfigError

MOST_BYTES = 4 << 20  # maximum size of a policy file
LONGEST_TABLE = 128  # characters of a table's name; longer names belong to no table
ALL = "*"
SHOWN = 24  # characters; longer values are not in messages: they may be tokens in a wrong place
KEPT = 4096  # decisions that are remembered per verb

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.@/-]{1,128}$")]
_Pattern = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_./*?-]{1,128}$")]
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Certificate = Annotated[str, StringConstraints(pattern=r"^(uri|dns|cn):[^\x00-\x1f\x7f]{1,2048}$")]
_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Grant(_Section):
    verbs: list[str] = Field(min_length=1)
    tables: list[_Pattern] = []


class _Role(_Section):
    grants: list[_Grant]


class _PrincipalSection(_Section):
    tokens: list[_Digest] = []
    certificates: list[_Certificate] = []
    roles: list[str] = []
    grants: list[_Grant] = []
    requests_per_second: _Rate = 0.0
    bytes_per_second: _Rate = 0.0
    inflight_bytes: _Rate = 0.0


class _Document(_Section):
    roles: dict[_Name, _Role] = {}
    principals: dict[_Name, _PrincipalSection] = {}


class Principal:
    """A principal of one version of the policy: its name, rights and budget.

    patterns  verb -> patterns of the tables on which it is granted; () for verbs without tables
    limit     budget of requests and bytes

    Thread-safe.
    """

    def __init__(self, name: str, patterns: Mapping[str, Sequence[str]], limit: Limit) -> None:
        self.name = name
        self.verbs = frozenset(patterns)
        self.limit = limit
        self._all = {verb for verb, tables in patterns.items() if ALL in tables}
        self._tables = {
            verb: re.compile("|".join(map(fnmatch.translate, tables)))
            for verb, tables in patterns.items()
            if tables and verb not in self._all
        }
        self._known: dict[str, dict[str, bool]] = {verb: {} for verb in self._tables}

    def holds(self, verb: str, table: str) -> bool:
        """Return whether the principal has the right (verb, table).

        table  name of a table; "" for verbs without tables; "*" for all tables together

        For the verb ANY, return whether it has any right on the table.
        """
        if verb == ANY:
            return any(self.holds(each, table) for each in TABLE_VERBS if each in self.verbs)
        if verb in self._all:
            return True
        known = self._known.get(verb)
        if known is None:
            return verb in self.verbs  # of the whole shard; a table verb without tables is invalid
        if (found := known.get(table)) is None:
            found = table != ALL and len(table) <= LONGEST_TABLE and self._matches(verb, table)
            if len(known) >= KEPT:
                known.clear()
            known[table] = found
        return found

    def _matches(self, verb: str, table: str) -> bool:
        return self._tables[verb].match(table) is not None


class Policy:
    """One version of the policy: finds the principal of a credential.

    principals    name -> principal
    tokens        SHA-256 of a bearer token -> its principal
    certificates  name in a client certificate, such as "dns:trainer.ml.svc" -> its principal
    """

    def __init__(
        self,
        principals: Mapping[str, Principal],
        tokens: Mapping[bytes, Principal],
        certificates: Mapping[str, Principal],
    ) -> None:
        self.principals = principals
        self._certificates = certificates
        self._tokens: dict[bytes, list[tuple[bytes, Principal]]] = {}
        for digest, principal in tokens.items():
            self._tokens.setdefault(digest[:4], []).append((digest, principal))

    def of_token(self, digest: bytes) -> Principal | None:
        """Return the principal whose bearer token has this SHA-256; None: there is none."""
        found = None
        for known, principal in self._tokens.get(digest[:4], ()):
            if hmac.compare_digest(known, digest):
                found = principal
        return found

    def of_certificate(self, names: Iterable[str]) -> tuple[str, Principal] | None:
        """Return (name in the certificate, its principal); None if no name has one, or if two names
        have different principals.

        names  all names of a verified client certificate, each such as "dns:trainer.ml.svc"
        """
        found = [(name, self._certificates[name]) for name in names if name in self._certificates]
        if len({principal.name for _, principal in found}) != 1:
            return None
        return found[0]


def parse(data: bytes) -> Policy:
    """Read a policy from the contents of its file. Raises ConfigError, which names the field.

    The messages contain no tokens, in case a file has one by mistake.
    """
    if len(data) > MOST_BYTES:
        raise ConfigError(f"a policy may have {MOST_BYTES} bytes, got {len(data)}")
    try:
        document = _Document.model_validate(tomllib.loads(data.decode()), strict=False)
    except RecursionError:
        raise ConfigError("not a TOML file: its lists or tables are nested too deeply") from None
    except ValidationError as error:
        problems = [_explain(item) for item in error.errors(include_url=False)]
        raise ConfigError("; ".join(problems[:5])) from None
    except ValueError as error:  # not UTF-8, not TOML
        raise ConfigError(f"not a TOML file: {error}") from None
    return _build(document)


def _build(document: _Document) -> Policy:
    principals: dict[str, Principal] = {}
    tokens: dict[bytes, Principal] = {}
    certificates: dict[str, Principal] = {}
    roles = {name: _patterns(f"roles.{name}", role.grants) for name, role in document.roles.items()}
    for name, section in document.principals.items():
        principal = principals[name] = _principal(name, section, roles)
        for at, digest in enumerate(section.tokens):
            _add(tokens, bytes.fromhex(digest), principal, f"tokens[{at}]")
        for at, entry in enumerate(section.certificates):
            _add(certificates, entry, principal, f"certificates[{at}]")
    return Policy(principals, tokens, certificates)


def _principal(
    name: str, section: _PrincipalSection, roles: Mapping[str, Mapping[str, list[str]]]
) -> Principal:
    """Return a principal with the rights of its section and its roles.

    roles  name -> rights of the role, as returned by ``_patterns``
    """
    where = f"principals.{name}"
    rights = _patterns(where, section.grants)
    for role in section.roles:
        if role not in roles:
            raise ConfigError(
                f"{where}.roles: there is no section [roles.{role}]; known: {', '.join(roles)}"
            )
        for verb, tables in roles[role].items():
            rights.setdefault(verb, []).extend(tables)
    limit = Limit(
        requests=section.requests_per_second,
        bytes=section.bytes_per_second,
        inflight=section.inflight_bytes,
    )
    return Principal(name, rights, limit)


def _add(known: dict[Any, Principal], key: Any, principal: Principal, field: str) -> None:
    """Record whose credential ``key`` is. Raises ConfigError if it is used twice."""
    if (other := known.setdefault(key, principal)) is not principal:
        raise ConfigError(
            f"principals.{principal.name}.{field}: principal {other.name} has the same one; a"
            " credential must belong to one principal"
        )


def _patterns(where: str, grants: Iterable[_Grant]) -> dict[str, list[str]]:
    """Return verb -> patterns of the tables on which it is granted.

    where  section of the file, for errors
    """
    rights: dict[str, list[str]] = {}
    for at, grant in enumerate(grants):
        for verb in grant.verbs:
            if verb != ALL and verb not in VERBS:
                raise ConfigError(
                    f"{where}.grants[{at}].verbs: expected * or one of {', '.join(VERBS)}, got"
                    f" {verb!r}"
                )
            if verb not in SHARD_VERBS and not grant.tables:
                raise ConfigError(
                    f"{where}.grants[{at}].tables: {verb} needs at least one pattern of table"
                    ' names, for example tables = ["ads.*"]'
                )
            for each in VERBS if verb == ALL else (verb,):
                tables = () if each in SHARD_VERBS else grant.tables
                rights.setdefault(each, []).extend(tables)
    return rights


def _explain(item: Any) -> str:
    """Return one item of ``ValidationError.errors()`` as text, without values that may be tokens:
    those of tokens, and long ones anywhere.
    """
    where = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown field"
    if "tokens" in item["loc"]:
        return f"{where}: must be the SHA-256 of a token, 64 hexadecimal digits in lower case"
    found = str(item["input"])
    return f"{where}: {item['msg']}" + (f", got {found!r}" if len(found) <= SHOWN else "")
