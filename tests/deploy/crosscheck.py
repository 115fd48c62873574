"""Compare the objects of a rendered manifest with each other and with the server.

A schema checks each field alone. These checks find, for example, a selector that matches no pod, a
volume that nobody mounts, or a probe for a service that the server does not have.

    checks_objects.py  names, labels, selectors, services, monitors
    checks_pod.py      volumes, ports, probes, resources, security of the pod
    checks_server.py   settings, variables, arguments, memory and grace period of the server
    checks_changes.py  fields that cannot be changed once an object exists
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import checks_objects
import checks_pod
import checks_server
from rendering import Object

from psserver.config import ConfigError

Check = Callable[[list[Object]], Iterable[str]]
CHECKS: tuple[Check, ...] = (*checks_objects.CHECKS, *checks_pod.CHECKS, *checks_server.CHECKS)


def problems(objects: list[Object]) -> list[str]:
    """Return what is wrong with the objects of one cluster: (check: what), [] if nothing is."""
    return [f"{check.__name__}: {what}" for check in CHECKS for what in _run(check, objects)]


def _run(check: Check, objects: list[Object]) -> list[str]:
    """Return the findings of one check; a field that it needs and does not find is a finding."""
    try:
        return list(check(objects))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ConfigError) as error:
        return [f"a field is missing or malformed: {error!r}"]
