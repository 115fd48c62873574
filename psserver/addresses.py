"""Check hosts, write addresses as host:port, and open listening sockets.

A host is a name, an IPv4 or an IPv6 address.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket

UNDER_UP = "PS_UNDER_UP"  # environment variable that ``psserver up`` sets for its shards
LAST_PORT = 65535
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,253})")


def bare_host(host: str) -> str:
    """Return ``host`` without the brackets that may enclose an IPv6 address.

    Raises ValueError if it is not exactly one name, IPv4 or IPv6 address, for example if a port
    follows.
    """
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


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_address(address: str) -> None:
    """Raise ValueError unless ``address`` is HOST:PORT, with brackets around an IPv6 address."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= LAST_PORT and host):
        raise ValueError("must be HOST:PORT, such as ps-0.ps:7000 or [fd00::1]:7000")
    if ":" in bare_host(host) and not host.startswith("["):
        raise ValueError("an IPv6 address must be in brackets: [fd00::1]:7000")


def addresses_of(peers: str, shards: int) -> list[str]:
    """Return the address of each shard of a cluster, by number; [] if ``peers`` is empty.

    peers   addresses separated by commas, or a pattern with {shard} in place of the number
    shards  number of shards; only a pattern needs it

    Raises ValueError if an address is malformed.
    """
    if "{shard}" in peers:
        found = [peers.replace("{shard}", str(shard)) for shard in range(shards)]
    else:
        found = [each.strip() for each in peers.split(",")] if peers else []
    for address in set(found[:1] if "{shard}" in peers else found):
        require_address(address)
    return found


def join(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(host: str, port: int) -> list[socket.socket]:
    """Return listening TCP sockets, one for each address that ``host`` resolves to.

    The host ``::`` also accepts IPv4. Addresses that this machine does not have are skipped.
    Raises OSError, with all sockets closed, if no address remains or if an address cannot be used
    for a different reason, for example because its port is in use.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    missing: OSError | None = None
    for family, _, _, _, address in found:
        both = host == "::" and socket.has_dualstack_ipv6()
        try:
            listeners.append(socket.create_server(address, family=family, dualstack_ipv6=both))
        except OSError as error:
            missing = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break
    else:
        if listeners:
            return listeners
    for listener in listeners:
        listener.close()
    assert missing is not None
    raise missing


def cannot_listen(field: str, host: str, port: int, error: OSError) -> str:
    """Return the error message for a port that cannot be opened: the reason, and what to do.

    field       name of the setting that contains the port, for example ``metrics_port``
    host, port  address that was tried
    error       raised by the operating system
    """
    number = error.errno or 0
    reason = os.strerror(number) if number > 0 else error.strerror or str(error)
    match number:
        case errno.EADDRINUSE:
            reason += "; stop the process that uses it, or choose another port"
        case errno.EACCES:
            reason += f"; ports below 1024 need privileges, and this is uid {os.geteuid()}"
        case errno.EADDRNOTAVAIL:
            reason += "; this machine does not have that address"
    return f"{field}: cannot listen on {join(host, port)}: {reason}"
