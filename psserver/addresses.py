"""Addresses to listen on: a host may be a name, an IPv4 or an IPv6 address, in brackets or not."""

from __future__ import annotations

import ipaddress
import re

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,253})")


def bare_host(host: str) -> str:
    """Return a host without brackets; ValueError for what is not a host alone."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in bare or bare != host:
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            raise ValueError(
                "must be a host without a port: a name, an IPv4 or an IPv6 address"
            ) from None
    elif not _NAME.fullmatch(bare):
        raise ValueError("must be a name, an IPv4 or an IPv6 address")
    return bare


def join(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
