"""Check the format of server addresses, and guess why a server cannot be reached."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from typing import Any

from psclient.errors import InvalidArgument

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # variables that gRPC reads, in this order
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]@?#]+):([0-9]{1,5})")


def checked_addresses(addresses: Any) -> list[str]:
    """Return ``addresses`` as a list, after checking the format of each address.

    Raises InvalidArgument unless ``addresses`` is a non-empty sequence of strings "host:port" or
    "unix:path".
    """
    if (
        isinstance(addresses, str)
        or not isinstance(addresses, Sequence)
        or not addresses
        or not all(isinstance(each, str) for each in addresses)
    ):
        raise InvalidArgument(
            "addresses must be a non-empty list of 'host:port', or one string 'name:port' with a"
            f" DNS name that leads to all shards, got {addresses!r}"
        )
    for shard, address in enumerate(addresses):
        if wrong := problem(address):
            raise InvalidArgument(f"addresses: shard {shard} at {address!r}: {wrong}")
    return list(addresses)


def checked_where(where: Any) -> str | list[str]:
    """Return where the shards of a cluster are, after checking the format.

    where  one DNS name with a port, such as "ps:7000", that leads to all shards; or a list of the
           addresses of all shards, in order

    Raises InvalidArgument if the format is wrong. A string with an IP address is refused too: it
    leads to one shard, so it must be in a list.
    """
    if isinstance(where, str) and where:
        if "," in where:
            raise InvalidArgument(
                f"addresses: write several addresses as a list, {where.split(',')!r}, not as one"
                f" string, {where!r}"
            )
        if wrong := problem(where):
            raise InvalidArgument(f"addresses: {where!r}: {wrong}")
        if is_name(where):
            return where
    return checked_addresses(where)


def is_name(address: str) -> bool:
    """Return whether an address is a valid "name:port", and not an IP address or a path."""
    host = address.rpartition(":")[0]
    if problem(address) or address.startswith("unix:") or host.startswith("["):
        return False
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return True
    return False


def problem(address: str) -> str | None:
    """Check the format of one address. Returns None if it is valid, otherwise an error message."""
    if address.startswith("unix:"):
        return None
    if "://" in address:
        return "write host:port, without a scheme such as http://"
    match = _HOST_PORT.fullmatch(address)
    if match is not None:
        return None if 1 <= int(match[2]) <= 65535 else "the port must be in 1..65535"
    if address.count(":") > 1 and "[" not in address:
        return f"write an IPv6 address in brackets and with its port, such as '[{address}]:7000'"
    if ":" not in address:
        return f"the port is missing; write it as in '{address or 'localhost'}:7000'"
    return "an address must be host:port, such as 'localhost:7000' or '[::1]:7000'"


def proxy_variable() -> str:
    """Return the environment variable whose proxy gRPC uses, if it may; "": none names a proxy."""
    return next((name for name in PROXIES if os.environ.get(name)), "")


def hint(text: str, *, proxy: bool) -> str:
    """Guess why a server could not be reached.

    text   gRPC's error message
    proxy  whether the client uses the proxy that the environment variables name

    Returns text to append to the error message, such as "; the host name cannot be resolved", or
    "" if there is no guess.
    """
    if "DNS" in text or "resol" in text:
        return "; the host name cannot be resolved"
    there = proxy_variable()
    if not there:
        return ""
    if proxy:
        return f"; the client uses the proxy of the environment variable {there} (proxy=True)"
    return (
        f"; the environment variable {there} names a proxy, which the client does not use: to use"
        " it, pass proxy=True to Client"
    )
