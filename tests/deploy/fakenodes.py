"""A fake clock, containers and probes, to run a control plane and a kubelet without a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.deploy.simulator.controlplane import ControlPlane
from tests.deploy.simulator.kubelet import Kubelet, NotYet

Object = dict[str, Any]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeProcess:
    """A container that runs until a test or a signal ends it.

    takes  seconds from SIGTERM to the end; it ends at once on SIGKILL
    """

    def __init__(self, clock: Clock, takes: float) -> None:
        self.signals: list[tuple[float, str]] = []
        self.status: int | None = None
        self._clock, self._takes = clock, takes
        self._end: float | None = None

    def poll(self) -> int | None:
        if self.status is None and self._end is not None and self._clock.now >= self._end:
            self.status = 0
        return self.status

    def terminate(self) -> None:
        self.signals.append((self._clock.now, "TERM"))
        self._end = self._clock.now + self._takes

    def kill(self) -> None:
        self.signals.append((self._clock.now, "KILL"))
        self.status = 137


class FakeNode:
    """A Runtime and a Prober.

    stops    seconds that a container takes to stop
    blocked  reason why no pod can be set up; "": all can
    serves   whether a probe is good: (container's arguments, seconds since its start, name of the
             service that the probe asks for) -> bool
    """

    def __init__(self, clock: Clock) -> None:
        self.stops, self.blocked = 1.0, ""
        self.serves: Callable[[list[str], float, str], bool] = lambda *_: True
        self.processes: dict[str, FakeProcess] = {}  # name of a pod -> its newest container
        self.starts: list[tuple[float, str, str]] = []  # time, pod, container
        self.gone: list[str] = []
        self._clock = clock
        self._at: dict[str, tuple[float, list[str]]] = {}  # address -> start, arguments
        self._addresses: dict[str, str] = {}  # uid -> address
        self._answers: dict[str, bool] = {}

    def set_up(self, pod: Object) -> str:
        if self.blocked:
            raise NotYet(self.blocked)
        address = f"10.0.0.{len(self._addresses) + 1}"
        self._addresses[pod["metadata"]["uid"]] = address
        return address

    def start(self, pod: Object, container: Object, attempt: int) -> FakeProcess:
        name = pod["metadata"]["name"]
        address = self._addresses[pod["metadata"]["uid"]]
        self._at[address] = self._clock.now, container.get("args", [])
        self.starts.append((self._clock.now, name, container["name"]))
        self.processes[name] = FakeProcess(self._clock, self.stops)
        return self.processes[name]

    def lose(self, pod: Object) -> None: ...

    def tear_down(self, pod: Object) -> None:
        self.gone.append(pod["metadata"]["name"])

    def ask(self, key: str, address: str, probe: Object) -> None:
        began, arguments = self._at[address]
        service = probe.get("grpc", {}).get("service", "")
        self._answers[key] = self.serves(arguments, self._clock.now - began, service)

    def answer(self, key: str) -> bool | None:
        return self._answers.pop(key, None)


class FakeCluster:
    """A control plane and a kubelet with fake containers; ``run`` lets time pass."""

    def __init__(self, *objects: Object) -> None:
        self.clock = Clock()
        self.node = FakeNode(self.clock)
        self.control = ControlPlane(self.clock)
        self.said: list[str] = []
        self.kubelet = Kubelet(self.control, self.node, self.node, self.clock, self.said.append)
        self.control.apply(objects)

    def run(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.control.step()
            self.kubelet.step()
            self.clock.now += 0.1

    def until(self, condition: Callable[[], bool], seconds: float = 100) -> float:
        """Run until a condition holds; return the seconds that passed."""
        start = self.clock.now
        while not condition():
            assert self.clock.now - start < seconds, self.events()
            self.run(0.1)
        return self.clock.now - start

    def settle(self) -> None:
        """Run until all pods of the set are updated and available."""
        self.until(lambda: self.control.is_rolled_out("ps"))

    def events(self) -> list[str]:
        """Return what happened to pods, for example "create ps-0", in order."""
        acts = ("create", "delete", "remove")
        return [f"{one.act} {one.name}" for one in self.control.events if one.act in acts]

    def forget(self) -> None:
        self.control.events.clear()

    def status(self, name: str) -> Object:
        return dict(self.control.get("Pod", name).get("status", {}))
