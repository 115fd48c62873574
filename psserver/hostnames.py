"""Decide which host names a browser may use to open the HTTP port.

A web page of an attacker can let the DNS name of its own site lead to the address of a server
(DNS rebinding). The browser of a person who visits that site and who can reach the server would
then let the page read the server's answers, because to the browser both are one site. But the
browser sends the attacker's name in the field Host. So names that anybody can register are refused,
unless the settings contain them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

# Ends of names that cannot be registered, apart from "localhost", which has no dot.
PRIVATE = (".localhost", ".local", ".internal", ".svc", ".test", ".home.arpa")


def host_of(address: str) -> str:
    """Return the host of ``HOST:PORT`` or ``HOST``, in lower case, without brackets."""
    host = address.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def may_name(field: str | None, names: Collection[str]) -> bool:
    """Return whether a request with this field Host may be answered.

    field  value of the field; None: the request has none, so it is not a browser's
    names  names from the settings, in lower case
    """
    if field is None:
        return True
    host = host_of(field).removesuffix(".")
    if host in names or "." not in host or host.endswith(PRIVATE):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
