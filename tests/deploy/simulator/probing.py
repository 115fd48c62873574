"""When a probe is due, and what its results mean: Kubernetes' rules, without a network.

A Probe is the state of one startup, readiness or liveness probe of one running container.
"""

from __future__ import annotations

from tests.deploy.simulator.objects import Object


def numbered(container: Object, kind: str) -> Object:
    """Return a probe of a container, with the number of its port, which it may give by name.

    kind  for example "readinessProbe"

    Raises KeyError if the container has no port of that name.
    """
    ports = {each["name"]: each["containerPort"] for each in container.get("ports", [])}
    probe: Object = dict(container[kind])
    for action in ("httpGet", "tcpSocket"):
        if isinstance(probe.get(action, {}).get("port"), str):
            probe[action] = {**probe[action], "port": ports[probe[action]["port"]]}
    return probe


class Probe:
    """Counts the results of one probe.

    passed  the verdict so far: False until ``successThreshold`` results in a row were good, then
            True until ``failureThreshold`` results in a row were bad
    """

    def __init__(self, spec: Object, now: float, *, passed: bool) -> None:
        """Begin to count.

        spec    the probe's fields in the manifest
        now     time at which the container started
        passed  verdict before the first result: True for a liveness probe
        """
        self.spec = spec
        self.passed = passed
        self._period: float = spec.get("periodSeconds", 10)
        self._due = now + spec.get("initialDelaySeconds", 0)
        self._row = 0  # equal results in a row
        self._last: bool | None = None

    def is_due(self, now: float) -> bool:
        """Return whether to probe now; if so, the next time is a period later."""
        if now < self._due:
            return False
        self._due = now + self._period
        return True

    def record(self, good: bool) -> bool:
        """Count a result. Return True if the probe failed ``failureThreshold`` times in a row."""
        self._row = self._row + 1 if good is self._last else 1
        self._last = good
        if good:
            self.passed = self.passed or self._row >= self.spec.get("successThreshold", 1)
            return False
        if self._row < self.spec.get("failureThreshold", 3):
            return False
        self.passed = False
        return True


class Backoff:
    """Delay before a container is started again: none, then 10 s, doubled up to 5 minutes.

    A container that ran for ten minutes begins anew.
    """

    def __init__(self, first: float = 10.0, longest: float = 300.0) -> None:
        self._first, self._longest, self._next = first, longest, 0.0

    def delay(self, ran: float) -> float:
        """Return the seconds to wait after a container has ended that ran for ``ran`` seconds."""
        if ran >= 2 * self._longest:
            self._next = 0.0
        delay = self._next
        self._next = min(self._longest, max(self._first, 2 * delay))
        return delay
